"""The card's tables about models that converse: answers to problems, preferences, and what items share with training
data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.core.text import escaped
from release.cards import caveats
from release.cards.tables import count, table

Facts = dict[str, Any]
SHOWN = 4
"""Sample pairs that a card shows."""


def of(chat: Facts, contamination: Facts | None) -> dict[str, list[str]]:
    """All tables; empty ones of a release without such models."""
    preferences = chat.get("preferences", {})
    last = preferences[list(preferences)[-1]] if preferences else None
    return {
        "chat_test": answers(chat.get("test", {})),
        "chat_fresh": answers(chat.get("fresh", {})),
        "preferences": wins(preferences),
        "reward_parts": reward_parts(chat),
        "preference_samples": samples(last) if last else [],
        "contamination": overlaps(contamination) if contamination else [],
        "clean_scores": clean(contamination) if contamination else [],
        "detector": detector(contamination) if contamination else [],
    }


def answers(scores: Facts) -> list[str]:
    """One row a model and kind of problem."""
    body = []
    for name, found in scores.items():
        parts = {**found["problems"], "all problems": found["problems_all"]}
        for kind, part in parts.items():
            most = max(part["at"], key=int)
            body.append([
                name, kind, str(part["samples"]["accuracy"]["n"]), _value(part["greedy"]["accuracy"]),
                _value(part["samples"]["accuracy"]), *(_value(part["at"][most][what]) for what in ("pass", "maj")),
                f"{part['samples']['tokens']:.1f}", f"{part['samples']['truncated']:.1%}",
                f"{part['samples']['reasoning']:.1%}",
            ])  # fmt: skip
        for kind, part in found["judged"].items():
            cells = ["", _value(part["reward"]), "", "", f"{part['tokens']:.1f}", f"{part['truncated']:.1%}", ""]
            body.append([name, f"{kind} (mean of the judge)", str(part["reward"]["n"]), *cells])
    k = max((max(part["problems_all"]["at"], key=int) for part in scores.values()), default="k")
    head = [
        "model",
        "what",
        "items",
        "greedy",
        "pass@1",
        f"pass@{k}",
        f"maj@{k}",
        "tokens",
        "cut off",
        "with reasoning",
    ]
    return table(head, body) if body else []


def wins(preferences: Facts) -> list[str]:
    body = []
    for name, found in preferences.items():
        rate = found["win_rate"]
        sides = {side: found["sides"][side]["parts"]["reward"] for side in ("before", "model")}
        body.append([
            name, found["before"], count(rate["n"]), f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})",
            count(found["wins"]), count(found["ties"]), count(found["losses"]),
            *(_value(sides[side]) for side in ("before", "model")),
        ])  # fmt: skip
    head = ["model", "against", "requests", "wins", "won", "tied", "lost"]
    return table([*head, "judge's mean of the other", "judge's mean"], body) if body else []


def reward_parts(chat: Facts) -> list[str]:
    """The judge's mean on the held-out requests of all models, and what it is made of: one row a part."""
    measured = caveats.parts(chat)
    names = ordered([name for found in measured.values() for name in found])
    body = [
        [name, *(_value(found[name]) if name in found else "not measured" for found in measured.values())]
        for name in names
    ]
    return table(["part of the reward", *measured], body) if body else []


def ordered(names: Iterable[str]) -> list[str]:
    """Parts of a reward, each once: the whole and the task first."""
    return sorted(set(names), key=lambda name: (name != "reward", name != "task", name))


def samples(found: Facts) -> list[str]:
    """A few pairs, whose texts are fenced so that no sign of theirs is markup."""
    body = []
    for row in found["examples"][:SHOWN]:
        cells = [f"{_plain(row[side]['answer'])} ({row[side]['reward']:.2f})" for side in ("before", "model")]
        body.append([_plain(row["question"]), *cells])
    return table(["request", f"{found['before']} (judge)", f"{found['model']} (judge)"], body)


def overlaps(report: Facts) -> list[str]:
    body = [
        [split, *(count(counts[verdict]) for verdict in ("clean", "overlap", "contaminated"))]
        for split, counts in report["items"].items()
    ]
    return table(["items", "clean", "overlap", "contaminated"], body)


def clean(report: Facts) -> list[str]:
    """The score of each table on all items and on the clean ones."""
    body = []
    for role, kinds in report["scores"].items():
        for kind, row in kinds.items():
            subset = row["clean"]
            cells = [_value(subset), str(subset["n"])] if subset else ["no item is clean", "0"]
            body.append([role, kind, _value(row["full"]), str(row["full"]["n"]), *cells])
    return table(["measured by", "what", "all items", "n", "clean items", "n"], body) if body else []


def detector(report: Facts) -> list[str]:
    found, absent = report["detector"]["recall"], report["detector"]["false_positives"]
    return [
        f"Of {count(found['planted'])} items planted into a copy of the corpus the detector found "
        f"{count(found['found'])}; of {count(absent['absent'])} that are not there, {count(absent['found'])}."
    ]


def _value(row: Facts) -> str:
    return f"{row['value']:.3f} ± {row['se']:.3f}"


def _plain(text: str) -> str:
    """A text in one table cell as it is: no line break, no bar, no back-tick, nothing that is markup or
    steers a terminal."""
    shown = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{escaped(shown[:160])}`" if shown else "(nothing)"
