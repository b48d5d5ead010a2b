"""The card's tables about chat models: answers to problems, preferences, and overlaps of items with training data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from pipeline.core.text import escaped
from release.cards import caveats
from release.cards.tables import PHASES, count, table, title, with_error, with_interval
from release.facts.data_facts import DataFacts
from release.facts.score_facts import ChatScores, ExampleAnswer
from stages.confidence import Figure, Mean
from stages.evaluation.scores import AnswerScores, ComparisonScores, ContaminationReport
from stages.rl.rollout.probes import MARGIN

SHOWN, CHARACTERS = 4, 160
"""Sample pairs that a card shows, and characters of a text."""
OUTPUT = 600
"""Characters of the answer below the first example of a card."""


def answers(scores: Mapping[str, AnswerScores]) -> list[str]:
    """One row for each model and kind of problem."""
    body = []
    for name, model_scores in scores.items():
        parts = {**model_scores["problems"], "all problems": model_scores["problems_all"]}
        for kind, part in parts.items():
            if part is None:
                continue
            max_k = max(part["at"], key=int)
            body.append([
                kind, title(name), str(part["samples"]["accuracy"]["n"]), _value(part["greedy"]["accuracy"]),
                _value(part["samples"]["accuracy"]), *(_value(part["at"][max_k][m]) for m in ("pass", "maj")),
                f"{part['samples']['tokens']:.1f}", f"{part['samples']['truncated']:.1%}",
                f"{part['samples']['reasoning']:.1%}",
            ])  # fmt: skip
        for kind, row in model_scores["judged"].items():
            cells = ["", _value(row["reward"]), "", "", f"{row['tokens']:.1f}", f"{row['truncated']:.1%}", ""]
            body.append([f"{kind} (preference reward)", title(name), str(row["reward"]["n"]), *cells])
    totals = [model_scores["problems_all"] for model_scores in scores.values()]
    k = max((max(part["at"], key=int) for part in totals if part), default="k")
    head = [
        "kind",
        "model after",
        "items",
        "greedy",
        "pass@1",
        f"pass@{k}",
        f"maj@{k}",
        "tokens",
        "cut off",
        "with reasoning",
    ]
    kinds = list(dict.fromkeys(row[0] for row in body))
    body.sort(key=lambda row: kinds.index(row[0]))
    return table(head, body, labels=3) if body else []


def wins(preferences: Mapping[str, ComparisonScores]) -> list[str]:
    """One column for each comparison: the win rate, and beside it the task's own success, the reward, and the parts of
    it that rose or fell, before → after."""
    if not preferences:
        return []
    sides = [(row["sides"]["before"]["parts"], row["sides"]["model"]["parts"]) for row in preferences.values()]
    body = [
        ["requests: won, tied, lost", *map(_outcomes, preferences.values())],
        ["wins, ties as half (95 %)", *(with_interval(row["win_rate"]) for row in preferences.values())],
        ["does what was asked (`task`)", *(_change("task", old, new) for old, new in sides)],
        ["preference reward", *(_change("reward", old, new) for old, new in sides)],
        ["parts of it that rose", *(_changes(caveats.moved(old, new), old, new) for old, new in sides)],
        ["parts of it that fell", *(_changes(caveats.moved(new, old), old, new) for old, new in sides)],
    ]
    return table(["", *(f"{title(name)} against {title(row['before'])}" for name, row in preferences.items())], body)


def _change(name: str, old: Mapping[str, Mean], new: Mapping[str, Mean]) -> str:
    return f"{_value(old[name])} → {_value(new[name])}" if name in old and name in new else "not measured"


def _changes(names: Iterable[str], old: Mapping[str, Mean], new: Mapping[str, Mean]) -> str:
    return "; ".join(f"{name} {_change(name, old, new)}" for name in names) or "none"


def _outcomes(row: ComparisonScores) -> str:
    return f"{count(row['win_rate']['n'])}: {count(row['wins'])}, {count(row['ties'])}, {count(row['losses'])}"


def reward_parts(chat: Mapping[str, ChatScores]) -> list[str]:
    """The mean reward on the held-out requests of all models, and its parts: one row for each part."""
    measured = caveats.parts(chat)
    names = ordered([name for model_parts in measured.values() for name in model_parts])
    body = [
        [
            name,
            *(
                _value(model_parts[name]) if name in model_parts else "not measured"
                for model_parts in measured.values()
            ),
        ]
        for name in names
    ]
    return table(["part of the reward", *map(title, measured)], body) if body else []


def ordered(names: Iterable[str]) -> list[str]:
    """The distinct parts of a reward: the whole and the task first."""
    return sorted(set(names), key=lambda name: (name != "reward", name != "task", name))


def samples(preferences: Mapping[str, ComparisonScores]) -> list[str]:
    """A few pairs of the last comparison, with texts as code, so that no character of them is markup."""
    if not preferences:
        return []
    comparison, lines = preferences[list(preferences)[-1]], []
    for row in comparison["examples"][:SHOWN]:
        lines.append(f"- {_code_cell(row['question'])}")
        for side in ("before", "model"):
            answer = f"{_code_cell(row[side]['answer'])} (reward {row[side]['reward']:.2f})"
            lines.append(f"  - {title(comparison[side])}: {answer}")
    return lines


def examples(answers: Iterable[ExampleAnswer]) -> list[str]:
    """One item for each answer: the request, and the answer with its reasoning; none without answers."""
    items = [
        f"- {answer.kind}, {'right' if answer.right else 'wrong'}: {_code_cell(answer.request)} → "
        f"{_code_cell(answer.text)}"
        for answer in answers
    ]
    rule = (
        "The first problems of each kind by their ids, with right answers and wrong ones; reasoning included, cut off "
        f"at {count(CHARACTERS)} characters. Nobody chose them:"
    )
    return [rule, "", *items] if items else []


def probes(data: DataFacts) -> list[str]:
    """One row for the tasks of each kind and level: the best of the answers that solve nothing."""
    body = []
    for phase, bins in data.probes.items():
        for name, each in bins.items():
            best, acknowledged = each["answers"][0], each["acknowledged"]
            limit = "" if acknowledged is None else f"{acknowledged:g}"
            figures = f"{each['chance']:.3f}", _value(best["reward"]), limit
            body.append([name, title(phase, PHASES), _code_cell(best["name"]), *figures])
    rule = (
        "The tasks of a phase are drawn before it, and answers that solve nothing are scored by their verifier: "
        "constants, the question itself, frequent answers. The best of them, beside what chance earns; without an "
        f"acknowledged reward, tasks on which it earns more than {MARGIN:g} above chance are refused:"
    )
    head = ["tasks", "phase", "best answer", "chance", "reward", "acknowledged"]
    return [rule, "", *table(head, body, labels=2)] if body else []


def conversation(answer: ExampleAnswer | None) -> str:
    """A line of code with the request of an answer as a conversation. A text in JSON is one in Python as well."""
    text = json.dumps(answer.request if answer else "your request", ensure_ascii=False)
    return f'chat = [{{"role": "user", "content": {text}}}]'


def request(answer: ExampleAnswer | None) -> list[str]:
    """The line of code with the request of an answer, in the form in which the model got it."""
    if answer and answer.in_conversation:
        return [conversation(answer)]
    text = json.dumps(answer.request if answer else "The", ensure_ascii=False)
    return [f'inputs = tokenizer({text}, return_tensors="pt")']


def output(answer: ExampleAnswer | None) -> list[str]:
    """What a reader gets who draws an answer again, as code; none without an answer."""
    if answer is None:
        return []
    text = answer.text if len(answer.text) <= OUTPUT else f"{answer.text[:OUTPUT]}…"
    return ["````text", *(escaped(line).replace("````", "` ` ` `") for line in text.splitlines()), "````"]


def overlaps(report: ContaminationReport | None) -> list[str]:
    """Items by their overlap with the training data; report: on contamination, None without one."""
    if report is None:
        return []
    body = [
        [split, *(count(counts[verdict]) for verdict in ("clean", "overlap", "contaminated"))]
        for split, counts in report["items"].items()
    ]
    return table(["items", "clean", "overlap", "contaminated"], body)


BENCHMARKS = {"evaluate": "in plain text", "solve": "in conversation", "fresh-solve": "on new problems"}
"""{start of a node: what it measures}"""


def clean(report: ContaminationReport | None, names: Mapping[str, str]) -> list[str]:
    """The scores that differ between all items and those that share no words with the training data. names: titles of
    models."""
    if report is None:
        return []
    body, same = [], 0
    for role, kinds in report["scores"].items():
        for kind, row in kinds.items():
            full, subset = row["full"], row["clean"]
            if full is None:
                continue
            if subset and subset["n"] == full["n"]:
                same += 1
                continue
            cells = [_value(subset), str(subset["n"])] if subset else ["no item is clean", "0"]
            start, _, model = role.rpartition("-solve-") if "-solve-" in role else role.partition("-")
            start = f"{start}-solve" if "-solve-" in role else start
            measure = f"{kind}, {BENCHMARKS.get(start, start)}"
            body.append([measure, names.get(model) or title(model), _value(full), str(full["n"]), *cells])
    sentence = f"For {count(same)} of {count(same + len(body))} scores every item is clean, so nothing changes."
    if not body:
        return [sentence]
    head = ["measure", "model after", "all items", "n", "clean items", "n"]
    return [f"{sentence} For the others:", "", *table(head, body, labels=2)]


def detector(report: ContaminationReport | None) -> list[str]:
    """One sentence: the recall of the contamination detector on planted items."""
    if report is None:
        return []
    recall, false_positives = report["detector"]["recall"], report["detector"]["false_positives"]
    return [
        f"Of {count(recall['planted'])} items planted into a copy of the corpus the detector found "
        f"{count(recall['found'])}; of {count(false_positives['absent'])} that are not there, "
        f"{count(false_positives['found'])}."
    ]


def _value(row: Figure) -> str:
    return with_error(row, 3)


def _code_cell(text: str) -> str:
    """A text as code in one table cell: without line breaks, bars, backticks, markup and terminal controls."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{escaped(line[:CHARACTERS])}`" if line else "(nothing)"
