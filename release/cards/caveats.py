"""The caveats at the top of a card: sentences that follow from the figures by rule.

- The sources whose held-out text a baseline encodes in fewer bits than the model.
- The task: the share of held-out requests in which the model does it, if the reward measures that (the part `task`).
- A rise of a reward from one phase to the next without a measured rise of its task: of the mean reward on held-out
requests, of a win rate, and of the reward that a phase was trained on. Likewise a rise beside a part of the reward that
fell.
- Regressions from one phase to the next.

A rise exceeds `SURE` standard errors of the difference; for a regression one standard error is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from release.cards import baseline_tables
from release.cards.tables import count, title, titles, with_error, with_interval
from release.facts.model_facts import ModelFacts
from release.facts.score_facts import ChatScores
from stages.confidence import Figure, Mean
from stages.evaluation.gates import SURE

RULE = (
    "By rule from the figures below: where xz or byte n-grams need fewer bits than the model, what got worse from one "
    "phase to the next by more than a standard error of the difference, and every reward that rose by more than "
    f"{SURE} of them where its task did not, or a part of it fell."
)
NONE = "No reward rose without its task, and nothing that was measured got worse from one phase to the next."


def caveat_sentences(model: ModelFacts) -> list[str]:
    """Returns the caveats that follow from the facts of one model, which its repository alone can prove."""
    sentences = [
        *baseline_tables.worse(model),
        *_task_sentence(model),
        *_reward_without_task(model),
        *_trained_reward_without_task(model),
        *_regressions(model),
    ]
    return [f"- {sentence}" for sentence in sentences] or [NONE]


def parts(chat: Mapping[str, ChatScores]) -> dict[str, dict[str, Mean]]:
    """Returns the parts of the reward of each model that answered the held-out requests, in the order of training."""
    parts_by_model: dict[str, dict[str, Mean]] = {}
    for name, row in chat.get("preferences", {}).items():
        # The first model has no comparison of its own: its parts stand in that of the next.
        parts_by_model.setdefault(row["before"], row["sides"]["before"]["parts"])
        parts_by_model[name] = row["sides"]["model"]["parts"]
    return parts_by_model


def rises(before: Figure, after: Figure, errors: float = SURE) -> bool:
    """Returns True if a value rises by more than that many standard errors of the difference."""
    return bool(after["value"] - before["value"] > errors * math.hypot(before["se"], after["se"]))


def _task_sentence(model: ModelFacts) -> Iterator[str]:
    measured = parts(model.chat)
    if measured and "task" in (last := measured[list(measured)[-1]]):
        yield (
            f"This model does all that is asked in {with_error(last['task'], 3)} of {count(last['task']['n'])} "
            "held-out requests. A win in the comparison of answers does not mean that it does more of them."
        )


def _reward_without_task(model: ModelFacts) -> Iterator[str]:
    """Yields a sentence on each pair of models of which the later one earns more, or wins, without a better task.

    It is better if the share with a done task rose. Of a reward that measures no task, no part may have fallen.
    """
    # Neighbors in training, and pairs that were compared, in this order and each once.
    measured, comparisons = parts(model.chat), model.chat.get("preferences", {})
    compared = {(row["before"], name): row for name, row in comparisons.items()}
    # A pair may be both neighbors in training and compared; a dict keeps the order and drops the second.
    for before, after in dict.fromkeys([*pairwise(measured), *compared]):
        row, gains = compared.get((before, after)), []
        old, new = measured[before], measured[after]
        if row is not None:  # both sides answered the same requests
            old, new = (row["sides"][side]["parts"] for side in ("before", "model"))
        if rises(old["reward"], new["reward"]):
            gains.append(f"the preference reward rose ({_change(old['reward'], new['reward'])})")
        # The lower end of the interval, so that a win by chance is none.
        if row is not None and (rate := row["win_rate"])["low"] > 0.5:
            gains.append(f"{title(after)} won {with_interval(rate)} of {count(rate['n'])} comparisons")
        if not gains:
            continue
        # What fell from old to new is what rises in the other direction.
        risen, fallen = (
            ", ".join(f"{name} ({_change(old[name], new[name])})" for name in names)
            for names in (moved(old, new), moved(new, old))
        )
        start = f"from {title(before)} to {title(after)} {' and '.join(gains)}, and"
        if "task" in new and not rises(old["task"], new["task"]):
            verb = "fell" if rises(new["task"], old["task"]) else "did not"
            also_fell = f" What fell: {fallen}." if fallen else ""
            yield (
                f"**A reward rose and its task {verb}**: {start} the share of answers that do what was asked {verb} "
                f"({_change(old['task'], new['task'])}). What rose: {risen or 'no part by itself'}.{also_fell}"
            )
        elif fallen:
            yield f"**A reward rose and a part of it fell**: {start} of its parts fell {fallen}."


def moved(old: Mapping[str, Mean], new: Mapping[str, Mean]) -> list[str]:
    """Returns the parts of a reward that rise from `old` to `new`, except for the whole and the task."""
    return [name for name in new if name not in ("reward", "task") and name in old and rises(old[name], new[name])]


def _trained_reward_without_task(model: ModelFacts) -> Iterator[str]:
    """Yields a sentence on each phase in which the training reward rose and its held-out figure did not."""
    chat, measured = model.chat.get("test", {}), parts(model.chat)
    for before, after in pairwise(chat):
        log = model.training.get(after)
        for kind, reward in log.rewards.items() if log else ():
            if not rises(reward["first"], reward["last"]):
                continue
            change = f"({_change(reward['first'], reward['last'])}, means of the first and the last steps)"
            start = f"during {title(after)}, its reward for {kind} rose {change}, and"
            if kind in chat[after]["problems"]:
                target = f"the share of right answers to test problems ({kind})"
                old, new = (chat[name]["problems"][kind]["samples"]["accuracy"] for name in (before, after))
            elif kind in chat[after]["judged"] and all("task" in measured.get(name, {}) for name in (before, after)):
                target = "the share of answers to held-out requests that do what was asked"
                old, new = measured[before]["task"], measured[after]["task"]
            else:
                yield f"**A reward rose, and no task was measured**: {start} no held-out figure tells what it gave."
                continue
            if not rises(old, new):
                yield f"**A reward rose and its task did not**: {start} {target} did not ({_change(old, new)})."


def _regressions(model: ModelFacts) -> Iterator[str]:
    """Yields one line for each phase, with the figures that got worse by more than a standard error."""
    names, test = titles(model.scores), model.chat.get("test", {})
    # A model is compared with the one before it, since a phase can only spoil what was there.
    for before, after in pairwise(model.scores):
        old, new = model.scores[before], model.scores[after]
        bits = old["bits_per_byte"]
        regressions = [
            f"bits per byte of {source} ({_change(bits[source], row)})"
            for source, row in new["bits_per_byte"].items()
            if source in bits and rises(bits[source], row, 1)
        ]
        pairs = [
            (f"exact match of {task}", old["accuracy"].get(task, row), row) for task, row in new["accuracy"].items()
        ]
        if before in test and after in test:
            for kind, row in test[after]["problems"].items():
                accuracy = [figures["samples"]["accuracy"] for figures in (test[before]["problems"][kind], row)]
                pairs.append((f"pass@1 of {kind}", *accuracy))
            pairs += [
                (f"preference reward of {kind}", test[before]["judged"][kind]["reward"], row["reward"])
                for kind, row in test[after]["judged"].items()
            ]
        regressions += [f"{measure} ({_change(low, high)})" for measure, low, high in pairs if rises(high, low, 1)]
        if regressions:
            yield f"From {names[before]} to {names[after]} these got worse: {', '.join(regressions)}."


def _change(before: Figure, after: Figure) -> str:
    return f"{with_error(before, 3)} → {with_error(after, 3)}"
