"""Generation and scoring of answers: the chat template around a sampler, verifiers with retries, and turns with tools.

One process (rank 0) draws and scores, and sends the results to the other ranks.

In a phase with tools, the policy draws a turn, tools answer the calls in it, and the policy draws the next one after
the results. A call is `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write it, after
the reasoning of a turn that ends with `<|im_end|>`. An answer is exact by token: it is the ids of its question, those
drawn, those of the results in the chat template, those drawn next, and so on. Drawn ids are never made into text and
encoded again.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.formats.tokenizer import END, PAD, SPECIAL_TOKENS, TURN_END, load_for_corpus
from stages.generation.protocols import AnswerGenerator, Completion, Prompt, ToolCall, Turn
from stages.rl.protocols import Answer, Call, Parts, Response, Verifier, VerifierFailed
from stages.rl.rollout.rollouts import Rollout
from stages.rl.tools.settings import Tools
from stages.scorers import answer_of
from stages.tasks import Row

# Times that a failed verifier is tried again before the phase stops.
RETRIES = 2
# Seconds before the first new attempt; each further pause is twice as long.
RETRY_SECONDS = 2.0
# Calls of a turn that are answered; further ones are not.
MOST_CALLS = 8
# The mark in place of the rest of a result. stages/rl/rewards/gym_server.py looks for its beginning.
CUT = "\n[cut: {} more characters]"
# The form of a call, for messages to the model.
FORM = '{"name": ..., "arguments": {...}}'


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

    def encode_prompt(self, row: Row) -> tuple[int, ...]:
        """Returns the token ids of a task's question up to the assistant's turn.

        Raises:
            AtomError: The question or a tool contains the name of a special token.
        """
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
        return [] if self.tools is None else self.tools.schemas(row)

    def encode_results(self, results: Sequence[str]) -> list[int]:
        """Returns the token ids between a turn that calls tools and the next one. No result ends its turn."""
        return self._encode_pieces(chat.after_calls(results))

    def encode_question(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Returns the token ids of messages up to the assistant's turn, whatever their texts are."""
        return self._encode_pieces(chat.question_pieces(messages))

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
                return verifier.score(answers)
            except VerifierFailed as error:
                if attempt == RETRIES:
                    raise
                self.note(f"{error}; retrying")
                time.sleep(RETRY_SECONDS * 2**attempt)
        raise AssertionError("unreachable")

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


@dataclass(frozen=True)
class Limits:
    """Bounds of an answer: its turns, the tokens of one turn, and those of the question with all that follows."""

    max_turns: int
    max_new_tokens: int
    context_length: int


@dataclass(frozen=True)
class Request:
    """A call to answer.

    Attributes:
        row: The task.
        texts: Texts of all calls of its answer so far, its own the last.
    """

    row: Row
    texts: Sequence[str]


class Toolbox:
    """The running tools of a phase."""

    def __init__(self, tools: Tools) -> None:
        """Starts the tools of the recipe's section. Raises AtomError if a requirement is missing."""
        self.tools = tools
        self.running = {}
        try:
            for tool in tools.offered:
                self.running[tool.tool] = tool.open()
        except BaseException:
            self.close()
            raise

    def answer(self, requests: Sequence[Request]) -> list[ToolCall]:
        """Returns the calls with their results, in order.

        Raises:
            ToolFailed: A tool cannot answer.
        """
        # A call that cannot be read has its error as the result, so that the model can correct it.
        calls = [read_call(r.texts[-1], self.tools, r.row, r.texts[:-1]) for r in requests]
        answered = {n: call for n, call in enumerate(calls) if not isinstance(call, Call)}
        for name, tool in self.running.items():
            chosen = {n: call for n, call in enumerate(calls) if isinstance(call, Call) and call.tool == name}
            results = tool.run(list(chosen.values())) if chosen else []
            for n, result in zip(chosen, results, strict=True):
                answered[n] = finished_call(
                    requests[n].texts[-1], chosen[n].name, result.status, result.text, self.tools
                )
        return [answered[n] for n in range(len(calls))]

    def close(self) -> None:
        for tool in self.running.values():
            tool.close()


def read_call(request: str, tools: Tools, row: Row, before: Sequence[str] = ()) -> Call | ToolCall:
    """Returns the call, or what is wrong with it as its result.

    Args:
        request: Text of the model between the tags.
        tools: Tools that the phase offers.
        row: The task.
        before: Texts of the answer's earlier calls.
    """

    def refused(status: str, text: str, name: str = "") -> ToolCall:
        return finished_call(request, name, status, f"error: {text}", tools)

    try:
        call = json.loads(request)
    except (ValueError, RecursionError):
        return refused("unreadable", f"the call is not JSON; write {FORM}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return refused("unreadable", f"the call names no tool; write {FORM}")
    name, arguments, functions = call["name"], call.get("arguments"), tools.functions(row)
    if name not in functions:
        return refused("unknown", f"there is no such tool; there are {', '.join(functions)}", name[:100])
    tool, _ = functions[name]
    if not isinstance(arguments, dict):
        return refused("arguments", f"the call has no arguments; write {FORM}", name)
    if reason := tool.refusal(arguments):
        return refused("arguments", reason, name)
    earlier = [read_call(text, tools, row) for text in before]
    return Call(tool.tool, name, arguments, row, [c for c in earlier if isinstance(c, Call) and c.tool == tool.tool])


def finished_call(request: str, tool: str, status: str, result: str, tools: Tools) -> ToolCall:
    """Returns the call with its result, which is cut if it is too long."""
    tool, text = (value.encode(errors="replace").decode() for value in (tool, result))  # no table has lone surrogates
    if len(text) > (most := tools.max_result_characters):
        text = text[:most] + CUT.format(len(text) - most)
    return {"request": request, "tool": tool, "status": status, "result": text}


def is_result(text: str, tools: Tools) -> bool:
    """Returns True if the text can be that of a finished call."""
    rest = text[tools.max_result_characters :]
    return not rest or re.fullmatch(re.escape(CUT).replace(r"\{\}", "[0-9]+"), rest) is not None


class Episode:
    """An answer that is drawn turn by turn: `take` a drawn turn, `resume` with the results of its calls."""

    def __init__(self, chat: Chat, row: Row, seed: int, limits: Limits) -> None:
        self.chat, self.row, self.seed, self.limits = chat, row, seed, limits
        self.offers_tools = bool(chat.functions(row))
        self.question = chat.encode_prompt(row)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.turns: list[Turn] = []
        self.versions: list[tuple[str, int]] = []
        self.is_finished = False

    def prompt(self) -> Prompt:
        """Returns the prompt of the next turn, which has a seed of its own."""
        number = len(self.turns) + 1
        # The first turn has the seed of the answer, so an answer without calls is as it would be without tools.
        seed = self.seed if number == 1 else seed_of(f"turn/{number}", self.seed)
        return Prompt((*self.question, *self.ids), seed)

    def take(self, drawn: Completion) -> list[str]:
        """Appends a turn. Returns its calls, if they are to be answered; none if the answer ends here."""
        self.ids += drawn.ids
        self.logprobs += drawn.logprobs
        self.turns.append({"sampled": len(drawn.ids), "calls": [], "appended": 0})
        for policy, tokens in drawn.versions:
            if self.versions and self.versions[-1][0] == policy:
                # Successive tokens of one policy are one span, also across turns.
                tokens += self.versions.pop()[1]
            self.versions.append((policy, tokens))
        calls = []
        # A turn that its maximum length cut, or that ended the document, calls nothing.
        if self.offers_tools and drawn.finished and drawn.ids[-1] == self.chat.turn_end:
            text = answer_of(self.chat.decode(drawn.ids[:-1]))
            calls = [request.strip() for request in chat.CALL_TEXT.findall(text)][:MOST_CALLS]
        self.is_finished = drawn.finished and not calls
        # In the last turn, calls stay without an answer.
        return calls if len(self.turns) < self.limits.max_turns else []

    def requests(self, calls: Sequence[str]) -> list[Request]:
        """Returns the calls of the last turn, each with its task and all calls so far."""
        before = [call["request"] for turn in self.turns for call in turn["calls"]]
        return [Request(self.row, [*before, *calls[: n + 1]]) for n in range(len(calls))]

    def resume(self, calls: Sequence[ToolCall]) -> bool:
        """Appends the results of the last turn's calls.

        Returns True if there is room for another turn. If not, the answer ends unfinished, without the results.
        """
        self.turns[-1]["calls"] = list(calls)
        appended = self.chat.encode_results([call["result"] for call in calls])
        self.ids += appended
        if len(self.question) + len(self.ids) + self.limits.max_new_tokens > self.limits.context_length:
            # Results without room for another turn are no part of the answer, since nothing follows them.
            del self.ids[len(self.ids) - len(appended) :]
            return False
        self.logprobs += [0.0] * len(appended)
        self.turns[-1]["appended"] = len(appended)
        return True

    def completion(self) -> Completion:
        return Completion(
            tuple(self.ids),
            tuple(self.logprobs),
            self.is_finished,
            tuple(self.versions),
            tuple(self.turns),
        )


def draw_turns(
    sampler: AnswerGenerator,
    chat: Chat,
    toolbox: Toolbox,
    limits: Limits,
    requests: Sequence[tuple[Row, int]],
    greedy: bool = False,
) -> list[Completion]:
    """Returns one completion for each (task, seed), all of them turn by turn.

    Raises what the sampler raises, and ToolFailed if a tool cannot answer.
    """
    episodes = [Episode(chat, row, seed, limits) for row, seed in requests]
    active = list(episodes)
    while active:
        drawn = sampler.generate([episode.prompt() for episode in active], greedy)
        calling = [(e, calls) for e, turn in zip(active, drawn, strict=True) if (calls := e.take(turn))]
        answered = iter(toolbox.answer([request for episode, calls in calling for request in episode.requests(calls)]))
        active = [episode for episode, calls in calling if episode.resume([next(answered) for _ in calls])]
    return [episode.completion() for episode in episodes]


def problem_of_turns(r: Rollout, chat: Chat, row: Row, limits: Limits | None) -> str | None:
    """Returns the reason why the turns of an answer from a file cannot be those of its tokens; None if they can.

    The calls must be in the drawn tokens, and the results in those between them. Each turn must end or go on as it
    would.
    """
    if limits is None or r.turns is None:
        return None if limits is None and r.turns is None else "has turns, or lacks them, unlike the phase"
    try:
        return _problem(r, Episode(chat, row, r.seed, limits))
    except TypeError:  # a value is missing
        return "has turns that are none"


def _problem(r: Rollout, episode: Episode) -> str | None:
    chat, place, goes_on = episode.chat, 0, True
    assert chat.tools is not None
    for turn in r.turns or ():
        ids = tuple(r.ids[place : place + turn["sampled"]])
        if turn["sampled"] < 1 or len(ids) < turn["sampled"] or not goes_on:
            return "has a turn that was not drawn, or one after its end"
        requests = episode.take(Completion(ids, tuple(r.logprobs[place : place + len(ids)]), ids[-1] in chat.stops))
        if [call["request"] for call in turn["calls"]] != requests:
            return "has calls of tools other than those in its tokens"
        for call in turn["calls"]:
            expected = read_call(call["request"], chat.tools, episode.row)
            if isinstance(expected, Call):
                is_possible = call["tool"] == expected.name and is_result(call["result"], chat.tools)
            else:
                is_possible = call == expected
            if not is_possible:
                return f"has a result that a call of {call['tool'] or 'no tool'} cannot have"
        goes_on = bool(requests) and episode.resume(turn["calls"])
        place += turn["sampled"] + turn["appended"]
    drawn = episode.completion()
    if goes_on or drawn.turns != tuple(r.turns or ()) or drawn.ids != tuple(r.ids):
        return "has results of tools other than those in its tokens"
    if drawn.logprobs != tuple(r.logprobs) or drawn.finished != r.finished:
        return "has log-probabilities of tokens that were not drawn, or another end than its tokens"
    return None
