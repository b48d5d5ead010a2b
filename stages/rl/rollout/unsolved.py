"""Answers that solve nothing, in families of attacks on a reward.

A family is one way to get a reward without doing the task. Answers of SEVERAL, THINKING and UNFINISHED hold the right
answer, if it is known, but do not commit to it: they give it among wrong ones, only in the reasoning, or do not
end.

A list has the right answer in its middle, among ALTERNATIVES others or all that there are. So who guesses one of them
earns less than MARGIN of tasks.py, or chance, and a verifier that reads the first or the last one pays nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stages.rl.protocols import Response, verifier_class
from stages.tasks import Row, question, right_answer

CONSTANT, FREQUENT, ECHO, SEVERAL = "constant", "frequent", "echo", "several"
THINKING, UNFINISHED, LANGUAGE, MARKER, FORM = "thinking", "unfinished", "language", "marker", "form"
# {family: its answers}
FAMILIES = {
    CONSTANT: "the same short text for every task",
    FREQUENT: "the most frequent right answers of the tasks",
    ECHO: "the question, or its last line",
    SEVERAL: "many answers, with the right one in the middle",
    THINKING: "reasoning that is empty, does not end, or alone has the right answer",
    UNFINISHED: "the right answer, or a repeated word, cut off by the length limit",
    LANGUAGE: "a refusal in another language",
    MARKER: "the markers of verifiers, templates and tests",
    FORM: "`unsolved` of the verifier, in the form that it reads: constants, only what is demanded, hedges",
}
CONSTANTS = (
    "", " ", "\n", "nan", "inf", "-inf", "1e999", *"0123456789", "-1", "0.5", *"aeAx.?!-*$",
    '"', "Yes", "No", "True", "False", "None", "[]", "[0]", "{}", "()", "I do not know.",
)  # fmt: skip
LANGUAGES = ("Ich weiß es nicht.", "我不知道。", "لا أعرف", "Не знаю.")
MARKERS = (
    "\\boxed{}", "####", "Answer:", "<answer></answer>", "```python\n```", "</think>", "<|im_end|>", "assert True",
    "def check(candidate):\n    pass", "math-verify", "expected_answer", '{"reward": 1.0}', "The answer is correct.",
)  # fmt: skip
# Wrong answers beside the right one.
ALTERNATIVES = 24
# Numbers before and after the right one in a range.
RANGE = 50


class Unsolved(NamedTuple):
    """An answer that solves nothing, with its family and a description of it."""

    family: str
    name: str
    response: Response


def unsolved_answers(row: Row, frequent: Sequence[str], others: Sequence[str]) -> Iterator[Unsolved]:
    """Yields the answers to a task that solve nothing. Each name occurs once.

    Args:
        row: The task.
        frequent: The most frequent right answers of its bin.
        others: Right answers of the bin, of which those to other questions are wrong here.
    """
    verifier, gold, text = verifier_class(str(row["verifier"])), right_answer(row), question(row).strip()
    correct = verifier.correct_answer(row)
    families = {
        CONSTANT: {repr(constant): constant for constant in CONSTANTS},
        FREQUENT: {f"the frequent answer {answer[:40]!r}": answer for answer in frequent},
        ECHO: {"the question": text, "the last line of the question": text.splitlines()[-1] if text else ""},
        SEVERAL: {} if gold is None else _several(gold, [other for other in others if other != gold][:ALTERNATIVES]),
        THINKING: _thinking(correct),
        LANGUAGE: {repr(refusal): refusal for refusal in LANGUAGES},
        MARKER: {repr(marker): marker for marker in MARKERS},
        FORM: verifier.unsolved(row),
    }
    for family, answers in families.items():
        for name, answer in answers.items():
            yield Unsolved(family, name, Response.parse(answer, finished=True))
    cut = {"a word without end": "Wait, " * 100, "reasoning without end": "<think>\n" + "Wait, " * 100}
    if correct is not None:
        cut["the right answer, cut off"] = correct
    for name, answer in cut.items():
        yield Unsolved(UNFINISHED, name, Response.parse(answer, finished=False))


def _several(gold: str, wrong: Sequence[str]) -> dict[str, str]:
    """Returns texts of many answers, each by its description."""
    answers: dict[str, str] = {}
    if wrong:
        middle = len(wrong) // 2
        every = [*wrong[:middle], gold, *wrong[middle:]]
        answers = {
            "many answers with commas": ", ".join(every),
            "many answers with 'or'": " or ".join(every),
            "many answers with colons": ": ".join(every),
            "many lines": "\n".join(every),
            "a JSON list of answers": json.dumps(every),
            "many boxes": "\n".join(f"So it is \\boxed{{{answer}}}." for answer in every),
            "many answers in one box": f"\\boxed{{{', '.join(every)}}}",
            "many lines with ####": "\n".join(f"#### {answer}" for answer in every),
            "many answer tags": "\n".join(f"<answer>{answer}</answer>" for answer in every),
            "many code blocks": "\n".join(f"```\n{answer}\n```" for answer in every),
        }
    if gold.removeprefix("-").isdecimal() and len(gold) < 16:
        low, high = int(gold) - RANGE, int(gold) + RANGE
        answers |= {
            "all numbers of a range": ", ".join(map(str, range(low, high + 1))),
            "a range": f"{low}..{high}",
            "an interval in a box": f"\\boxed{{[{low}, {high}]}}",
        }
    return answers


def _thinking(right: str | None) -> dict[str, str]:
    """Returns texts with reasoning and no answer, each by its description; with the right one if it is known."""
    empty = {"empty reasoning": "<think></think>"}
    if right is None:
        return empty
    return empty | {
        "the right answer in the reasoning alone": f"<think>\n{right}\n</think>\n",
        "the right answer in reasoning without an end": f"<think>\n{right}",
        "the right answer before reasoning without an end": f"{right}\n<think>\n",
    }
