"""The card's tables about chat models: answers to problems, preferences, examples, and overlaps with training data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.core.text import escaped
from release.cards import caveats
from release.cards.tables import count, explained_table, table, title, with_error, with_interval
from release.facts.score_facts import ExampleAnswer
from stages.confidence import Figure, Mean, wilson
from stages.evaluation.scores import AnswerScores, ComparisonScores, ContaminationReport, Proportion

CHARACTERS, OUTPUT = 160, 600
"""Characters of a text in a list of examples, and of the answer below the first one of a card."""


def answers(scores: Mapping[str, AnswerScores]) -> list[str]:
    """Returns one row for each model and kind of problem."""
    body, most_drawn = [], "k"
    for name, model_scores in scores.items():
        parts = {**model_scores["problems"], "all problems": model_scores["problems_all"]}
        for kind, part in parts.items():
            if part is None:
                continue
            drawn, max_k = part["samples"], max(part["at"], key=int)
            figures = [
                part["greedy"]["accuracy"],
                drawn["accuracy"],
                part["at"][max_k]["pass"],
            ]
            cells = [title(name), str(drawn["accuracy"]["n"]), *map(_value, figures), f"{drawn['tokens']:.1f}"]
            body.append([kind, *cells, f"{drawn['truncated']:.1%}", f"{drawn['reasoning']:.1%}"])
        for kind, row in model_scores["judged"].items():
            cells = ["", _value(row["reward"]), "", f"{row['tokens']:.1f}", f"{row['truncated']:.1%}", ""]
            body.append([f"{kind} (preference reward)", title(name), str(row["reward"]["n"]), *cells])
        if model_scores["problems_all"]:
            max_k = max(model_scores["problems_all"]["at"], key=int)
            most_drawn = max_k if most_drawn == "k" else max(most_drawn, max_k, key=int)
    if not body:
        return []

    # Models of one kind stand together, in the order in which the kinds come up.
    kinds = list(dict.fromkeys(row[0] for row in body))
    body.sort(key=lambda row: kinds.index(row[0]))
    head = ["kind", "model after", "items", "greedy", "pass@1", f"pass@{most_drawn}"]
    return table([*head, "tokens", "cut off", "with reasoning"], body)


def sharpening(scores: Mapping[str, AnswerScores]) -> list[str]:
    """Returns pass@k of the models before and after reinforcement learning, and the change, by kind and k."""
    measured: dict[tuple[str, str], dict[str, Proportion]] = {}
    for name, model_scores in scores.items():
        for kind, part in {**model_scores["problems"], "all problems": model_scores["problems_all"]}.items():
            subset = part.get("at_subset", {}) if part else {}
            for k, several in sorted(subset.items(), key=lambda row: int(row[0])):  # JSON sorts 16 before 2
                measured.setdefault((kind, k), {})[name] = _with_bounds(several["pass"])
    names = list(next(iter(measured.values()), ()))
    body = []
    for (kind, k), models in measured.items():
        row = [kind, k, str(models[names[0]]["n"]), *(with_interval(models[name]) for name in names)]
        body.append([*row, with_interval(_difference(models[names[0]], models[names[-1]]))])
    sentence = (
        "The same problems, answered k times at temperature 1: the chance that one of k answers is right, with 95 % "
        "intervals over problems. Training that only sharpens raises it for k = 1, and not for a large k: the right "
        "answers were there. Training by which a model learns to solve further problems raises it for every k."
    )
    heads = (f"after {title(name)}" for name in names)
    return explained_table(sentence, ["kind", "k", "problems", *heads, "change"], body)


def _with_bounds(mean: Mean) -> Proportion:
    """Returns a mean of values from 0 to 1 with Wilson's interval, whose variance is the largest of such values."""
    low, high = wilson(mean["value"] * mean["n"], mean["n"])
    return {**mean, "low": low, "high": high}


def _difference(old: Proportion, new: Proportion) -> Proportion:
    """Returns the change with Newcombe's interval (1998, method 10).

    It is that of independent shares, and wide for answers to the same problems.
    """
    value = new["value"] - old["value"]
    low = value - math.hypot(new["value"] - new["low"], old["high"] - old["value"])
    high = value + math.hypot(new["high"] - new["value"], old["value"] - old["low"])
    return {"value": value, "se": math.hypot(old["se"], new["se"]), "n": new["n"], "low": low, "high": high}


def wins(preferences: Mapping[str, ComparisonScores]) -> list[str]:
    """Returns one column for each comparison.

    Below the win rate stand the task's own success, the reward, and the parts of it that rose or fell, before → after.
    """
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


ORDERED_BY = {"humans": "humans", "AI": "a model (AI)", "rules": "rules (rule preferences)"}
"""Words for those who ordered the answers of pairs."""


def reward_model(measured: Mapping[str, Any] | None) -> list[str]:
    """Returns the accuracy of the reward model by domain, beside that of a rule about length; none without one."""
    if measured is None:
        return []

    def row(name: str, part: Mapping[str, Any]) -> list[str]:
        longer = part["longer_is_better"]
        shares = [(part["accuracy"], part["interval"]), (longer["value"], longer["interval"])]
        cells = (f"{value:.3f} ({low:.3f} to {high:.3f})" for value, (low, high) in shares)
        return [name, count(part["pairs"]), count(part["questions"]), *cells]

    accuracy, domains = measured["heldout_accuracy"], measured["domains"]
    together = {
        "pairs": measured["heldout_pairs"],
        "questions": measured["heldout_questions"],
        "accuracy": accuracy["last"],
        "interval": accuracy["interval"],
        "longer_is_better": measured["longer_is_better"],
    }
    body = [row(escaped(domain), part) for domain, part in domains.items()] if len(domains) > 1 else []
    ordered = ", ".join(f"{count(n)} by {ORDERED_BY[who]}" for who, n in measured["preferred_by"].items())
    sentence = (
        f"Held-out pairs of answers, of prompts that no pair of training has, ordered {ordered}. Share that the reward "
        "model orders correctly, and share in which the longer answer is the better one, which a rule about length "
        f"would get right; 95 % intervals over prompts. In {measured['prefers_longer']:.3f} of the pairs the reward "
        "model scores the longer answer higher."
    )
    heads = ["domain", "pairs", "prompts", "ordered correctly", "longer is better"]
    return explained_table(sentence, heads, [*body, row("all", together)])


def pairs(sources: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns one row for each source of pairs that others ordered."""
    body = []
    for name, source in sources.items():
        left = "; ".join(f"{escaped(reason)} {count(n)}" for reason, n in source["left_out"].items())
        licenses = ", ".join(f"{license} {count(n)}" for license, n in source["licenses"].items())
        counts = count(source["pairs"] - source["heldout"]), count(source["heldout"])
        body.append([escaped(name), ORDERED_BY[source["preferred_by"]], licenses, *counts, left or "none"])
    sentence = (
        "Pairs of answers that others ordered, in `rl/preferences/preferences.parquet` with license and origin of "
        "each; the reasons why rows were left out:"
    )
    return explained_table(sentence, ["source", "ordered by", "license", "to learn from", "held out", "left out"], body)


def _change(name: str, old: Mapping[str, Mean], new: Mapping[str, Mean]) -> str:
    return f"{_value(old[name])} → {_value(new[name])}" if name in old and name in new else "not measured"


def _changes(names: Iterable[str], old: Mapping[str, Mean], new: Mapping[str, Mean]) -> str:
    return "; ".join(f"{name} {_change(name, old, new)}" for name in names) or "none"


def _outcomes(row: ComparisonScores) -> str:
    return f"{count(row['win_rate']['n'])}: {count(row['wins'])}, {count(row['ties'])}, {count(row['losses'])}"


def examples(answers: Iterable[ExampleAnswer]) -> list[str]:
    """Returns one item for each answer: the request, and the answer with its reasoning; none without answers."""
    items = []
    for answer in answers:
        verdict = "right" if answer.right else "wrong"
        items.append(f"- {answer.kind}, {verdict}: {_code_cell(answer.request)} → {_code_cell(answer.text)}")
    rule = (
        "The first problems of each kind by their ids, with right answers and wrong ones; reasoning included, cut off "
        f"at {count(CHARACTERS)} characters. Nobody chose them:"
    )
    return [rule, "", *items] if items else []


def conversation(answer: ExampleAnswer | None) -> str:
    """Returns a line of code with the request of an answer as a conversation."""
    # A text in JSON is one in Python as well.
    text = json.dumps(answer.request if answer else "your request", ensure_ascii=False)
    return f'chat = [{{"role": "user", "content": {text}}}]'


def request(answer: ExampleAnswer | None) -> list[str]:
    """Returns the line of code with the request of an answer, in the form in which the model got it."""
    if answer and answer.in_conversation:
        return [conversation(answer)]
    text = json.dumps(answer.request if answer else "The", ensure_ascii=False)
    return [f'inputs = tokenizer({text}, return_tensors="pt")']


def output(answer: ExampleAnswer | None) -> list[str]:
    """Returns the text that a reader gets who draws an answer again, as code; none without an answer."""
    if answer is None:
        return []
    text = answer.text if len(answer.text) <= OUTPUT else f"{answer.text[:OUTPUT]}…"
    # Four backticks in the text would end the block.
    return ["````text", *(escaped(line).replace("````", "` ` ` `") for line in text.splitlines()), "````"]


def overlaps(report: ContaminationReport | None) -> list[str]:
    """Returns the items by their overlap with the training data; none without a report."""
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
    """Returns the scores that differ between all items and those that share no words with the training data.

    Args:
        report: The report on contamination, if there is one.
        names: The titles of models.
    """
    if report is None:
        return []
    body, same = [], 0
    for role, kinds in report["scores"].items():
        # `fresh-solve-sft` is made of a kind of node with a hyphen, and a model.
        kind_of_node, _, model = role.partition("-")
        if "-solve-" in role:
            before, _, model = role.rpartition("-solve-")
            kind_of_node = f"{before}-solve"
        for kind, row in kinds.items():
            full, subset = row["full"], row["clean"]
            if full is None:
                continue
            if subset and subset["n"] == full["n"]:
                same += 1
                continue
            cells = [_value(subset), str(subset["n"])] if subset else ["no item is clean", "0"]
            measure = f"{kind}, {BENCHMARKS.get(kind_of_node, kind_of_node)}"
            body.append([measure, names.get(model) or title(model), _value(full), str(full["n"]), *cells])
    sentence = f"For {count(same)} of {count(same + len(body))} scores every item is clean, so nothing changes."
    head = ["measure", "model after", "all items", "n", "clean items", "n"]
    return explained_table(f"{sentence} For the others:", head, body) or [sentence]


def _value(row: Figure) -> str:
    return with_error(row, 3)


def _code_cell(text: str) -> str:
    """Returns a text as code in one table cell."""
    # Line breaks, bars and backticks would end the cell or the code; the rest is markup or controls a terminal.
    line = " ".join(text.split()).replace("`", "'").replace("|", "/")
    return f"`{escaped(line[:CHARACTERS])}`" if line else "(nothing)"
