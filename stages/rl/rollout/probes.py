"""Probes of tasks: the reward of answers that solve nothing.

A policy learns whatever the verifier rewards. So before a phase, the verifier scores answers that are written without
solving the task: constants, numbers that are none, single characters, the question itself, the most frequent right
answers, and others in the form that the verifier reads. Their mean reward may not be more than MARGIN above chance.

- **Chance** of a bin is the share of its tasks that have the most frequent right answer, which the best constant earns
  where right answers alone are rewarded, but at most EVEN. It is 0 if the rows state no right answer. A task of two
  answers has chance EVEN; where one of them is right more often, a policy would learn to give it always, and that is
  no chance.
- All answers are scored on SCREENED tasks. The best FINALISTS of them are scored again on up to PROBED other tasks, so
  that none of many answers is best by luck. A bin is refused if the mean, less Z standard errors and one task, is more
  than MARGIN above chance. In a small bin all answers are scored on all tasks.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

from pipeline.core.errors import AtomError
from stages.confidence import Mean, clustered
from stages.formats.seeds import seed_of
from stages.rl.protocols import Answer, Parts, Response
from stages.rl.rewards.registry import verifier_class
from stages.tasks.rows import Row, bin_of, question

# The file of the probes of a phase's tasks.
PROBES = "probes.json"
# The mean reward above chance that an answer may earn without solving the task.
MARGIN = 0.05
# The largest chance that follows from the right answers: of two that are equally frequent.
EVEN = 0.5
# Tasks of the first scoring and of the second one, answers that reach the second, and frequent right answers.
SCREENED, PROBED, FINALISTS, FREQUENT = 16, 256, 3, 3
# Half the width of a normal 99 % interval, in standard errors.
Z = 2.576
CONSTANTS = (
    "", " ", "\n", "nan", "inf", "-inf", "1e999", *"0123456789", "-1", "0.5", *"aeAx.?!-*$",
    '"', "Yes", "No", "True", "False", "None", "[]", "[0]", "{}", "()", "I do not know.",
)  # fmt: skip
Score = Callable[[Sequence[Answer]], Sequence[Parts]]


class ProbedAnswer(TypedDict):
    """An answer and its mean reward.

    Attributes:
        name: What it is, such as the constant in quotes.
    """

    name: str
    reward: Mean


class ProbedBin(TypedDict):
    """The probes of the tasks of one kind and level.

    Attributes:
        tasks: Number of tasks.
        verifier: Its name.
        chance: Mean reward that chance earns.
        acknowledged: The mean reward that the recipe acknowledges; None if it acknowledges none.
        answers: The best answers, the best first; none for a verifier that is trained later.
    """

    tasks: int
    verifier: str
    chance: float
    acknowledged: float | None
    answers: list[ProbedAnswer]


def probe(rows: Sequence[Row], score: Score, seed: int, acknowledged: float | None = None) -> ProbedBin:
    """Scores the tasks of one bin.

    Args:
        rows: All tasks of the bin, which have one verifier.
        score: Scores answers by their verifier; raises VerifierFailed for a reward that is no finite number.
        seed: The recipe's.
        acknowledged: The mean reward that the recipe acknowledges.
    """
    # By a salted hash, so that the drawn tasks do not depend on the order of the rows.
    salt = f"{seed_of(f'probes/{bin_of(rows[0])}', seed)}/"
    drawn = sorted(rows, key=lambda row: hashlib.sha256(f"{salt}{row['id']}".encode()).digest())
    # The most frequent right answer is what the best constant answer would earn.
    golds = Counter(gold for row in rows if (gold := right_answer(row)) is not None)
    frequent = [gold for gold, _ in golds.most_common(FREQUENT)]
    # In a small bin there are no other tasks for a second look.
    screened = SCREENED if len(drawn) >= 2 * SCREENED else len(drawn)
    best = _means(drawn[:screened], frequent, score, None)[:FINALISTS]
    if finals := drawn[screened : screened + PROBED]:
        best = _means(finals, frequent, score, {answer["name"] for answer in best})
    return {
        "tasks": len(rows),
        "verifier": str(rows[0]["verifier"]),
        "chance": min(EVEN, golds[frequent[0]] / len(rows)) if frequent else 0.0,
        "acknowledged": acknowledged,
        "answers": best,
    }


def require_solving(name: str, probed: ProbedBin) -> None:
    """Raises AtomError if an answer that solves nothing earns too much in the bin `name`."""
    limit = probed["chance"] + MARGIN
    if (acknowledged := probed["acknowledged"]) is not None:
        limit = max(limit, acknowledged)
    for answer in probed["answers"]:
        reward = answer["reward"]
        # Less one task too, since the standard error is 0 where all rewards are equal.
        if reward["value"] - Z * reward["se"] - 1 / reward["n"] > limit:
            raise AtomError(
                f"tasks {name}: {answer['name']}, which solves nothing, earns a mean reward of {reward['value']:.3f} ± "
                f"{reward['se']:.3f} on {reward['n']} tasks, where chance earns {probed['chance']:.3f}; a policy would "
                "learn this answer: leave the tasks out, or state in the source the acknowledged_reward up to which "
                "they are used"
            )


def right_answer(row: Row) -> str | None:
    """Returns the right answer that a row states, if any."""
    gold = row.get("expected_answer", row.get("answer"))
    return None if gold is None else str(gold)


def unsolved_answers(row: Row, frequent: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the answers to a task that solve nothing.

    Args:
        row: The task.
        frequent: The most frequent right answers.
    """
    for constant in CONSTANTS:
        yield repr(constant), constant
    for gold in frequent:
        yield f"the frequent answer {gold[:40]!r}", gold
    text = question(row).strip()
    yield "the question", text
    yield "the last line of the question", text.splitlines()[-1] if text else ""
    yield from verifier_class(str(row["verifier"])).unsolved(row).items()


def _means(rows: Sequence[Row], frequent: Sequence[str], score: Score, names: set[str] | None) -> list[ProbedAnswer]:
    """Returns the mean reward of each answer over tasks, the best first.

    Args:
        rows: The tasks.
        frequent: The most frequent right answers.
        score: Scores answers by the verifier of the tasks.
        names: Names of the answers; None for all.
    """
    answers: list[tuple[str, Answer]] = [
        (name, (row, Response.parse(text, finished=True)))
        for row in rows
        for name, text in dict(unsolved_answers(row, frequent)).items()
        if names is None or name in names
    ]
    rewards: dict[str, list[float]] = {}
    for (name, _), parts in zip(answers, score([answer for _, answer in answers]), strict=True):
        rewards.setdefault(name, []).append(parts["reward"])
    answered: list[ProbedAnswer] = [{"name": name, "reward": _mean(values)} for name, values in rewards.items()]
    return sorted(answered, key=lambda answer: -answer["reward"]["value"])


def _mean(values: Sequence[float]) -> Mean:
    """Returns a mean with its standard error over tasks; 0 for one task, which never decides."""
    return clustered(values) if len(values) > 1 else {"value": values[0], "se": 0.0, "n": 1}
