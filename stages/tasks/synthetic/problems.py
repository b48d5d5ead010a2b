"""Procedural problems with worked solutions: pure Python, seeded, extensible by one function.

A problem has two written forms. *Plain* is like text of a web page, `347+586=933`; *worked* shows the steps,
`347+586:7+6+0=13;…:933`, and ends with the answer after the last colon. The question, up to and including its `=` or
`:`, carries no loss in training, because it cannot be predicted. In a conversation the user asks the question, and the
assistant answers, with the steps as its reasoning or without.

A task is a function of a random generator and optionally a level of difficulty; without a level it draws from all its
problems. Sums and sorts of all levels have the same form and width and differ in the amount of state to remember; a
traced program is longer the more values it has.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer (`;` between them), and the answer."""

    task: str
    question: str
    steps: str
    answer: str

    @property
    def prompt(self) -> str:
        """The model's prompt at evaluation."""
        return f"{self.question}:"


def add(rng: random.Random, level: int | None = None) -> Problem:
    """Draws two numbers of three digits, which are added digit by digit from the right.

    The step `7+6+0=13` is digit+digit+carry=sum.

    The level is the number of carries, 0 to 3.
    """
    if level is not None and level not in range(4):
        raise ValueError(f"add has the levels 0 to 3 (carries), not {level}")
    while True:
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        steps, carry, carries = [], 0, 0
        for x, y in zip(str(a)[::-1], str(b)[::-1], strict=True):
            total = int(x) + int(y) + carry
            steps.append(f"{x}+{y}+{carry}={total:02d}")
            carry = total // 10
            carries += carry
        if level in (None, carries):
            return Problem("add", f"{a}+{b}", ";".join(steps), str(a + b))


def sort(rng: random.Random, level: int | None = None) -> Problem:
    """Draws five digits, which are sorted by insertion: each step shows the digits so far in order.

    The level is the number of digits that are less than the one before, 0 to 4.
    """
    return _sort(rng, "sort", 5, level)


def sort_six(rng: random.Random, level: int | None = None) -> Problem:
    """Draws six digits to sort: for a model that learned from five, a task that it rarely solves.

    The level is the number of digits that are less than the one before, 0 to 5.
    """
    return _sort(rng, "sort_six", 6, level)


def _sort(rng: random.Random, task: str, count: int, level: int | None) -> Problem:
    if level is not None and level not in range(count):
        raise ValueError(f"{task} has the levels 0 to {count - 1} (descents), not {level}")
    while True:
        digits = [rng.choice("0123456789") for _ in range(count)]
        if level in (None, sum(b < a for a, b in pairwise(digits))):
            break
    so_far: list[str] = []
    steps = []
    for digit in digits:
        so_far = sorted([*so_far, digit])
        steps.append("".join(so_far))
    return Problem(task, f"sort {''.join(digits)}", ";".join(steps), "".join(sorted(digits)))


def trace(rng: random.Random, level: int | None = None) -> Problem:
    """Draws a small Python program, which is executed line by line: `a=7;b=a+2;c=b-4;print(c)`.

    The steps are the values in between, `b=9`, and the answer is what it prints. Each assignment changes the value
    of the one before; all values are single digits. The level is the number of values in between, 1 to 8; without a
    level there are 1 to 4.
    """
    if level is not None and level not in range(1, 9):
        raise ValueError(f"trace has the levels 1 to 8 (values in between), not {level}")
    variable, value = rng.choice("abcdef"), rng.randrange(10)
    values = {variable: value}
    lines, steps = [f"{variable}={value}"], []
    for _ in range((level or rng.randint(1, 4)) + 1):
        # Sorted, so that the draw does not depend on the order in which variables were set.
        others = [(name, number) for name, number in sorted(values.items()) if name != variable]
        operands = [*((str(digit), digit) for digit in range(1, 10)), *others]
        results = [
            (f"{variable}{sign}{operand}", value + change)
            for operand, number in operands
            for sign, change in (("+", number), ("-", -number))
            if change and 0 <= value + change <= 9
        ]
        expression, value = rng.choice(results)
        variable = rng.choice("abcdef")
        values[variable] = value
        lines.append(f"{variable}={expression}")
        steps.append(f"{variable}={value}")
    return Problem("trace", ";".join([*lines, f"print({variable})"]), ";".join(steps[:-1]), str(value))


TASKS: dict[str, Callable[..., Problem]] = {"add": add, "sort": sort, "sort_six": sort_six, "trace": trace}
# Problems of each task; of `trace`, whose short programs are drawn more often, so many that repeats are as frequent.
SPACES = {"add": 900**2, "sort": 10**5, "sort_six": 10**6, "trace": 3_200_000}


def plain(problem: Problem) -> tuple[str, int]:
    """Returns (text, number of leading characters without loss)."""
    return f"{problem.question}={problem.answer}", len(problem.question) + 1


def worked(problem: Problem) -> tuple[str, int]:
    """Returns (text, number of leading characters without loss)."""
    return f"{problem.prompt}{problem.steps}:{problem.answer}", len(problem.prompt)


FORMS: dict[str, Callable[[Problem], tuple[str, int]]] = {"plain": plain, "worked": worked}


def messages(problem: Problem, thinking: bool) -> list[dict[str, str]]:
    """Returns a conversation; with `thinking`, the steps are the assistant's reasoning."""
    answer = {"role": "assistant", "content": problem.answer}
    if thinking:
        answer["reasoning_content"] = problem.steps
    return [{"role": "user", "content": problem.question}, answer]


def draw(tasks: Mapping[str, float], count: int, rng: random.Random) -> list[Problem]:
    """Returns `count` problems from the whole space of each task; repeats are possible.

    Tasks are chosen with the given weights.
    """
    names = sorted(tasks)
    weights = [tasks[name] for name in names]
    return [TASKS[name](rng) for name in rng.choices(names, weights, k=count)]


def expected_distinct(tasks: Mapping[str, float], count: float) -> float:
    """Returns the expected number of different problems among those that `draw` returns."""
    total = sum(tasks.values())
    return sum(-SPACES[name] * math.expm1(-count * weight / total / SPACES[name]) for name, weight in tasks.items())


def draw_distinct(task: str, count: int, rng: random.Random, without: Collection[str] = ()) -> list[Problem]:
    """Returns `count` problems of one task with different questions, none of them in `without`.

    Raises ValueError if the task has too few problems.
    """
    problems = draw_up_to(task, count, rng, None, without)
    if len(problems) < count:
        raise ValueError(f"task {task} gave only {len(problems)} different problems of {count}")
    return problems


def draw_up_to(task: str, count: int, rng: random.Random, level: int | None, without: Collection[str]) -> list[Problem]:
    """Draws distinct problems, and fewer than `count` if the task has fewer: drawing ends when few new ones appear."""
    problems: dict[str, Problem] = {}
    misses = 0
    while len(problems) < count and misses < 20 * len(problems) + 1000:
        problem = TASKS[task](rng) if level is None else TASKS[task](rng, level)
        if problem.question in without:
            misses += 1
            continue
        misses = misses + 1 if problem.question in problems else 0
        problems.setdefault(problem.question, problem)
    return list(problems.values())
