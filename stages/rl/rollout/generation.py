"""From tasks to scored answers: the chat template around a sampler, verifiers by name, and their failures.

One process (rank 0) draws and scores; the others are told what there is to learn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.stage import Report
from pipeline.core.store import Artifact
from stages.data import chat
from stages.data.tokenizer import END, PAD, TURN_END
from stages.rl.protocols import Completion, Parts, Prompt, Response, Row, Sampler, Verifier, VerifierFailed

RETRY_SECONDS = 2.0


class Chat:
    """The release's tokenizer and template. tokenizer: its artifact, or the folder of an exported model."""

    def __init__(self, tokenizer: Artifact | Path) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        special = self.tokenizer.get_vocab()
        self.pad, self.end, self.turn_end = special[PAD], special[END], special[TURN_END]
        self.stops = (self.end, self.turn_end)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def ask(self, row: Row) -> tuple[int, ...]:
        """The ids of a task's question up to the assistant's turn. Raises AtomError if it holds a special token's
        name."""
        messages = row["responses_create_params"]["input"]
        try:
            chat.check(messages)
        except ValueError as error:
            raise AtomError(f"task {row['id']}: {error}; leave it out") from None
        text = chat.render(messages, ask=True)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def response(self, found: Completion) -> Response:
        ids = found.ids[:-1] if found.finished else found.ids
        return Response.of(self.tokenizer.decode(list(ids), skip_special_tokens=False), found.finished)


class Verifiers:
    """The verifiers that tasks name, each made when first needed."""

    def __init__(self, made: Mapping[str, Verifier], retries: int, report: Report) -> None:
        self.made, self.retries, self.report = dict(made), retries, report

    def score(self, answers: Sequence[tuple[Row, Response]]) -> list[Parts]:
        """The parts of each answer's reward. A verifier that fails is retried; then VerifierFailed stops the step
        with nothing lost: no answer is ever given 0 because its verifier was out of order."""
        found: dict[int, Parts] = {}
        for name in sorted({str(row["verifier"]) for row, _ in answers}):
            own = [i for i, (row, _) in enumerate(answers) if row["verifier"] == name]
            found |= zip(own, self._ask(self.made[name], [answers[i] for i in own]), strict=True)
        return [found[i] for i in range(len(answers))]

    def _ask(self, verifier: Verifier, answers: list[tuple[Row, Response]]) -> list[Parts]:
        for attempt in range(self.retries + 1):
            try:
                return self._reported(verifier.name, answers, verifier.score(answers))
            except VerifierFailed as error:
                if attempt == self.retries:
                    raise
                self.report.note(f"{error}; retrying")
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    def _reported(self, name: str, answers: list[tuple[Row, Response]], scored: list[Parts]) -> list[Parts]:
        """A note of the answers that ended what judges them, which their reward of 0 does not show."""
        killed = [str(row["id"]) for (row, _), parts in zip(answers, scored, strict=True) if parts.get("killed")]
        if killed:
            self.report.note(
                f"verifier {name}: {len(killed)} of {len(answers)} answers were ended by force, or ended what judges "
                f"them; their reward is 0; the first is to task {killed[0]}"
            )
        return scored

    def close(self) -> None:
        for verifier in self.made.values():
            verifier.close()


def draw(sampler: Sampler, chat: Chat, asked: Sequence[tuple[Row, int]], greedy: bool = False) -> list[Completion]:
    """One completion for each (task, seed)."""
    ids = {str(row["id"]): chat.ask(row) for row, _ in asked}
    return sampler.generate([Prompt(ids[str(row["id"])], seed) for row, seed in asked], greedy)


def accuracy(scored: Sequence[tuple[Row, Parts]]) -> dict[str, Any]:
    """Mean reward by kind of task, in the order of their names."""
    by_kind: dict[str, list[float]] = {}
    for row, parts in scored:
        by_kind.setdefault(str(row["kind"]), []).append(parts["reward"])
    return {kind: sum(rewards) / len(rewards) for kind, rewards in sorted(by_kind.items())}
