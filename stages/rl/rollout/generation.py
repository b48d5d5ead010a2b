"""Generation and scoring of answers: the chat template around a sampler, and verifiers with retries.

One process (rank 0) draws and scores, and sends the results to the other ranks.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.formats import chat
from stages.formats.tokenizer import END, PAD, SPECIAL_TOKENS, TURN_END, load_for_corpus
from stages.generation.protocols import AnswerGenerator, Completion, Prompt
from stages.rl.protocols import Answer, Parts, Response, Verifier, VerifierFailed
from stages.rl.tools.settings import Tools
from stages.tasks.rows import Row

# Times that a failed verifier is tried again before the phase stops.
RETRIES = 2
# Seconds before the first new attempt; each further pause is twice as long.
RETRY_SECONDS = 2.0


class Chat:
    """The release's tokenizer and template.

    Args:
        tokenizer: Its artifact, or the folder of an exported model.
        tools: Those that tasks offer.
    """

    def __init__(self, tokenizer: Artifact | Path, tools: Tools | None = None) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        special = self.tokenizer.get_vocab()
        self.pad, self.end, self.turn_end = special[PAD], special[END], special[TURN_END]
        self.stops = (self.end, self.turn_end)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.tools = tools
        self._special, self._plain = special, load_for_corpus(tokenizer / "tokenizer.json")
        self._latest: tuple[Row, tuple[int, ...]] | None = None

    def encode_prompt(self, row: Row) -> tuple[int, ...]:
        """Returns the token ids of a task's question up to the assistant's turn.

        Raises:
            AtomError: The question or a tool contains the name of a special token.
        """
        latest = self._latest  # read once: several threads may draw
        if latest is None or latest[0] is not row:  # the answers of a group come one after another
            latest = self._latest = row, self._encode_prompt(row)
        return latest[1]

    def _encode_prompt(self, row: Row) -> tuple[int, ...]:
        messages, functions = row["responses_create_params"]["input"], self.functions(row)
        try:
            chat.check(messages)
            chat.check_tools(functions)
        except ValueError as error:
            raise AtomError(f"task {row['id']}: {error}; leave it out") from None
        text = chat.render(chat.without_calls(messages), ask=True, tools=functions)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def functions(self, row: Row) -> list[dict[str, Any]]:
        """Returns the functions that a task offers, in the form of OpenAI's chat API."""
        functions = {} if self.tools is None else self.tools.functions(row)
        return [{"type": "function", "function": schema} for _, schema in functions.values()]

    def encode_results(self, results: Sequence[str]) -> list[int]:
        """Returns the token ids between a turn that calls tools and the next one. No result ends its turn."""
        return self._encode_pieces(chat.after_calls(results))

    def encode_question(self, text: str) -> list[int]:
        """Returns the token ids of a question up to the assistant's turn, whatever its text is."""
        return self._encode_pieces(chat.question_pieces(text))

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which names of special tokens are ordinary text."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def _encode_pieces(self, pieces: Sequence[str]) -> list[int]:
        """Returns the token ids of a text in pieces."""
        # A special token of the template is a piece of its own. A content never is: where it is the name alone, the
        # piece before it or after it has the template's line end.
        ids: list[int] = []
        for piece in pieces:
            ids += [self._special[piece]] if piece in SPECIAL_TOKENS else self.encode_text(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text, with special tokens by name."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def response(self, completion: Completion) -> Response:
        # Without the stop token, which no verifier reads.
        ids, earlier = completion.ids[:-1] if completion.finished else completion.ids, []
        for turn in (completion.turns or ())[:-1]:
            earlier.append((self.decode(ids[: turn["sampled"] - 1]), turn["calls"]))
            ids = ids[turn["sampled"] + turn["appended"] :]
        return replace(Response.parse(self.decode(ids), completion.finished), earlier=tuple(earlier))


class Verifiers:
    """The verifiers of a phase by name, with retries."""

    def __init__(self, verifiers: Mapping[str, Verifier], note: Callable[[str], object]) -> None:
        """Takes the verifiers by name. `note` prints a line to the log."""
        self.by_name, self.note = dict(verifiers), note
        self.lock = threading.Lock()

    def score(self, answers: Sequence[Answer]) -> list[Parts]:
        """Returns the parts of each answer's reward.

        A failing verifier is retried; then VerifierFailed stops the step without loss: a failed verifier never gives a
        reward of 0, and neither does one that is no number. Calls of several threads take turns.
        """
        parts: dict[int, Parts] = {}
        # Verifiers score in batches of their own, in a fixed order.
        for name in sorted({str(row["verifier"]) for row, _ in answers}):
            indices = [i for i, (row, _) in enumerate(answers) if row["verifier"] == name]
            with self.lock:
                scored = self._score_with_retries(self.by_name[name], [answers[i] for i in indices])
            for i, part in zip(indices, scored, strict=True):
                for part_name, value in part.items():
                    # NaN would pass every comparison of rewards, and become an advantage.
                    if not math.isfinite(value):
                        raise VerifierFailed(
                            f"verifier {name}: the {part_name} of an answer to task {answers[i][0]['id']} is {value}, "
                            "which is no number; correct the verifier"
                        )
                parts[i] = part
        return [parts[i] for i in range(len(answers))]

    def _score_with_retries(self, verifier: Verifier, answers: list[Answer]) -> list[Parts]:
        for attempt in range(RETRIES + 1):
            try:
                return self._note_killed(verifier.name, answers, verifier.score(answers))
            except VerifierFailed as error:
                if attempt == RETRIES:
                    raise
                self.note(f"{error}; retrying")
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

    def _note_killed(self, name: str, answers: list[Answer], scored: list[Parts]) -> list[Parts]:
        """Reports the answers that were killed or that killed their verifier.

        A reward of 0 does not show this.
        """
        killed = [str(row["id"]) for (row, _), parts in zip(answers, scored, strict=True) if parts.get("killed")]
        if killed:
            self.note(
                f"verifier {name}: {len(killed)} of {len(answers)} answers were killed, or ended the process "
                f"that scores them; their reward is 0; the first is to task {killed[0]}"
            )
        return scored

    def close(self) -> None:
        for verifier in self.by_name.values():
            verifier.close()


def draw(
    sampler: AnswerGenerator, chat: Chat, requests: Sequence[tuple[Row, int]], greedy: bool = False
) -> list[Completion]:
    """Returns one completion for each (task, seed)."""
    # A prompt is encoded once, however many answers it has.
    ids = {str(row["id"]): chat.encode_prompt(row) for row, _ in requests}
    return sampler.generate([Prompt(ids[str(row["id"])], seed) for row, seed in requests], greedy)


def mean_reward_by_kind(scored: Sequence[tuple[Row, Parts]]) -> dict[str, float]:
    """Returns the mean reward by kind of task, in the order of their names."""
    by_kind: dict[str, list[float]] = {}
    for row, parts in scored:
        by_kind.setdefault(str(row["kind"]), []).append(parts["reward"])
    return {kind: sum(rewards) / len(rewards) for kind, rewards in sorted(by_kind.items())}
