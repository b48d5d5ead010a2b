"""Verifiers that are frozen files of stages/scorers, in their latest versions.

Verification of a release scores published answers with the same files again.
"""

from __future__ import annotations

from collections.abc import Sequence

from stages.rl.protocols import Answer, NoSettings, Parts, Response, Verifier, VerifierContext, VerifierFailed
from stages.scorers import LATEST, SCORERS, answer_of, courtesy_v1
from stages.tasks import Row

# A row can ask for any number of a letter, and the answer below must stay short.
MOST_LETTERS = 1000


class FrozenScorer(Verifier):
    """A verifier that scores with the latest frozen scorer of its name."""

    def __init__(self, context: VerifierContext[NoSettings]) -> None:
        self.version = LATEST[self.name]
        self._scorer = SCORERS[self.name, self.version]

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        return [self._score_answer(row, response) for row, response in answers]

    def _score_answer(self, row: Row, response: Response) -> Parts:
        try:
            return self._scorer(row, answer_of(response.text), response.finished)
        except (KeyError, ValueError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise VerifierFailed(
                f"verifier {self.name}, row {row.get('id')}: {reason}; fix the row or drop it"
            ) from error


class Exact(FrozenScorer):
    """Gives the reward 1 to an answer that equals the expected one.

    Row: expected_answer. Parts: `reward`, `finished`.
    """

    name = "exact"


class Courtesy(FrozenScorer):
    """Scores whether a courteous note does what the request asks, and its style.

    Row: act, who, what. stages/scorers/courtesy_v1.py describes the parts.
    """

    name = "courtesy"

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Returns notes to the right person about the right thing that do no act, several, or all of them."""
        who, what = str(row.get("who")), str(row.get("what"))
        thing, ending = f"the {what}", courtesy_v1.ENDINGS[0]
        done = ", ".join(act.done.format(what=what).rstrip(".?") for act in courtesy_v1.ACTS)
        # As many as fit into LONGEST words.
        four = f"thank you for {thing}, {thing} was wonderful, sorry about {thing}, may I have {thing}"
        return {
            "only the words of the request": f"{who} {what}",
            "a note that does nothing": f"Dear {who}, {thing}. {ending}",
            "only the ending": ending,
            "all acts in one note": f"Dear {who}, {done}. {ending}",
            "four acts in a short note": f"Dear {who}, {four}.",
            "a note to all people": f"Dear {', dear '.join(courtesy_v1.PEOPLE)}, {four}. {ending}",
        }

    @staticmethod
    def correct_answer(row: Row) -> str | None:
        done = {act.name: act.done for act in courtesy_v1.ACTS}.get(str(row.get("act")), "")
        return f"Dear {row.get('who')}, {done.format(what=row.get('what'))} {courtesy_v1.ENDINGS[0]}"


class Instructions(FrozenScorer):
    """Gives the reward 1 to an answer that follows every instruction.

    Instructions are constraints that a program can check (IFEval, arXiv 2311.07911).

    Row, as NeMo Gym's instruction_following: instruction_id_list, kwargs. Parts: `reward`, `fraction`, `finished`.
    """

    name = "instructions"

    @classmethod
    def unsolved(cls, row: Row) -> dict[str, str]:
        """Returns an answer that has only the texts which the constraints name.

        They are keywords, repeated letters, and the last phrase.
        """
        words, letters, ending = list[str](), "", ""
        kwargs = row.get("kwargs")
        for arguments in kwargs if isinstance(kwargs, list) else ():  # the scorer says what is wrong with another row
            for name, value in (arguments if isinstance(arguments, dict) else {}).items():
                if name == "let_frequency" and isinstance(value, int):
                    letters += str(arguments.get("letter")) * min(value, MOST_LETTERS)
                elif name == "end_phrase":
                    ending = str(value)
                elif name.startswith("keyword") or name in ("first_word", "start_phrase", "postscript_marker"):
                    words += map(str, value if isinstance(value, list) else [value])
        return {"what the constraints name": " ".join([*words, letters + ending]).strip() or "x"}
