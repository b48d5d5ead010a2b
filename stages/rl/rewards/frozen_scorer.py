"""A verifier that is a frozen file of stages/scorers, in its latest version."""

from __future__ import annotations

from collections.abc import Sequence

from stages.rl.protocols import Answer, NoSettings, Parts, Response, Row, Verifier, VerifierContext, VerifierFailed
from stages.scorers import LATEST, RESPONSES, SCORERS


class FrozenScorer(Verifier):
    """The scorer whose name is that of the class. Verification of a release scores published answers with it again."""

    def __init__(self, context: VerifierContext[NoSettings]) -> None:
        self.version = LATEST[self.name]
        self._scorer, self._read = SCORERS[self.name, self.version], RESPONSES[self.name, self.version]

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        return [self._score_answer(row, response) for row, response in answers]

    def _score_answer(self, row: Row, response: Response) -> Parts:
        try:
            return self._scorer(row, self._read(response.text), response.finished)
        except (KeyError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise VerifierFailed(
                f"verifier {self.name}, row {row.get('id')}: {reason}; fix the row or drop it"
            ) from error
