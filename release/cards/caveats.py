"""The caveats at the top of a card: sentences that follow from the figures by rule.

- The task: the share of held-out requests in which the model does it, if the reward measures that (the part `task`).
- A rise of a reward from one phase to the next without a measured rise of its task: of the mean reward on held-out
requests, and of the reward that a phase was trained on.
- Regressions from one phase to the next, and those on sources that the phase did not read.

A rise exceeds `SURE` standard errors of the difference; for a regression one standard error is enough.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

from release.assembly.data_facts import OrderFacts
from release.assembly.model_facts import ModelFacts
from release.assembly.score_facts import ChatScores
from release.assembly.training import FirstAndLast
from release.cards.tables import count, titles, with_error
from stages.evaluation.scores import Figure, Mean, ModelScores
from stages.evaluation.settings import SURE

RULE = (
    "By rule from the figures below: what got worse from one phase to the next by more than a standard error of the "
    f"difference, and every reward that rose by more than {SURE} of them where its task did not."
)
NONE = "No reward rose without its task, and nothing that was measured got worse from one phase to the next."


def caveat_sentences(model: ModelFacts) -> list[str]:
    """The caveats that follow from the facts of one model, which its repository alone can prove."""
    sentences = [
        *_task_sentence(model),
        *_reward_without_task(model),
        *_trained_reward_without_task(model),
        *_regressions(model),
    ]
    return [f"- {sentence}" for sentence in sentences] or [NONE]


def unread(scores: Mapping[str, ModelScores], order: Mapping[str, OrderFacts]) -> list[str]:
    """Sources with a rise of bits per byte in phases that read none of their documents.

    scores: of a model, in the order of training; order: `order` of the facts of a dataset.
    """
    lines = []
    for before, after in pairwise(scores):
        phase = PHASE.get(after, after.replace("long-", "longcontext-"))
        sources_read = order[phase].sources() if phase in order else set()
        unread_sources = [source for source in _risen(scores[before], scores[after]) if source not in sources_read]
        if unread_sources:
            lines.append(f"- Not trained on in {phase}: {', '.join(unread_sources)}.")
    return lines


PHASE = {"base": "pretrain", "mid": "midtrain"}
"""The phase of a model, if their names differ."""


def parts(chat: Mapping[str, ChatScores]) -> dict[str, dict[str, Mean]]:
    """The parts of the reward of each model that answered the held-out requests, in the order of training."""
    parts_by_model: dict[str, dict[str, Mean]] = {}
    for name, row in chat.get("preferences", {}).items():
        parts_by_model.setdefault(row["before"], row["sides"]["before"]["parts"])
        parts_by_model[name] = row["sides"]["model"]["parts"]
    return parts_by_model


def rises(before: Figure, after: Figure, errors: float = SURE) -> bool:
    """Whether a value rises by more than that many standard errors of the difference."""
    return bool(after["value"] - before["value"] > errors * math.hypot(before["se"], after["se"]))


def _task_sentence(model: ModelFacts) -> Iterator[str]:
    measured = parts(model.chat)
    if measured and "task" in (last := measured[list(measured)[-1]]):
        yield (
            f"This model does all of what was asked in {with_error(last['task'], 3)} of {count(last['task']['n'])} "
            "held-out requests. That its answers are preferred to another model's says no more than that."
        )


def _reward_without_task(model: ModelFacts) -> Iterator[str]:
    """Phases in which the mean reward on held-out requests rose and the share with a done task did not."""
    measured = parts(model.chat)
    for before, after in pairwise(measured):
        old, new = measured[before], measured[after]
        if "task" in new and rises(old["reward"], new["reward"]) and not rises(old["task"], new["task"]):
            risen = [name for name in new if name not in ("reward", "task") and rises(old[name], new[name])]
            risen_parts = (
                ", ".join(f"{name} ({_change(old[name], new[name])})" for name in risen) or "no part by itself"
            )
            yield (
                f"**A reward rose and its task did not**: from {before} to {after} the preference reward rose "
                f"({_change(old['reward'], new['reward'])}), and the share of answers that do what was asked did not "
                f"({_change(old['task'], new['task'])}). What rose: {risen_parts}."
            )


def _trained_reward_without_task(model: ModelFacts) -> Iterator[str]:
    """Phases in which the training reward rose and its held-out figure did not."""
    chat, measured = model.chat.get("test", {}), parts(model.chat)
    for before, after in pairwise(chat):
        for kind, reward in _rewards(model, after).items():
            if not rises(reward["first"], reward["last"]):
                continue
            change = f"({_change(reward['first'], reward['last'])}, means of the first and the last steps)"
            start = f"while {after} was trained, its reward for {kind} rose {change}, and"
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


def _rewards(model: ModelFacts, phase: str) -> dict[str, FirstAndLast]:
    """The rewards that a phase was trained on, by kind of task; none for a phase without a log."""
    return model.training[phase].rewards if phase in model.training else {}


def _regressions(model: ModelFacts) -> Iterator[str]:
    """Figures that got worse from one model to the next by more than a standard error of the difference, one line for
    each phase."""
    names, test = titles(model.scores), model.chat.get("test", {})
    for before, after in pairwise(model.scores):
        old, new = model.scores[before], model.scores[after]
        regressions = [
            f"bits per byte of {source} ({_change(old['bits_per_byte'][source], new['bits_per_byte'][source])})"
            for source in _risen(old, new)
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


def _risen(before: ModelScores, after: ModelScores) -> list[str]:
    """Sources whose bits per byte rose."""
    old, new = before["bits_per_byte"], after["bits_per_byte"]
    return [source for source, row in new.items() if source in old and rises(old[source], row, 1)]


def _change(before: Figure, after: Figure) -> str:
    return f"{with_error(before, 3)} → {with_error(after, 3)}"
