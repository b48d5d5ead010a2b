"""The figures of one release as a page and a drawing: did each phase do its work, and for what?

    python bench/run_page.py runs/releases/atom-mini-0.2.0 docs/atom-mini.md

Writes the tables below the line MARK of the page, whatever stands above it stays, and the three scaling axes into a
PNG beside it. Everything is read from the files of the release, so anybody who has it gets the same page. Intervals are
95 %, over documents or problems: both models answer the same ones, so a difference is taken for each of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from release import schema
from release.cards import tables
from release.cards.plots import COLORS, png
from release.facts import run_facts, training
from release.layout import when
from release.opened_release import Release
from stages.confidence import Z95, Ratio, clustered, half_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARK = "<!-- Written by bench/run_page.py from the files of the release: -->"
TEXT_PHASES = ("init", "base", "mid", "long")
"""Models, or starts of their names, whose phases train on text alone."""


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def text_losses(evaluation: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{model: {document: its row}} of each model that was measured on held-out documents, in the order of training."""
    paths = {path.parent.name: path for path in evaluation.glob("*/documents.parquet")}
    names = sorted(paths, key=lambda name: (name != "init", when(name)))
    return {name: {row["id"]: row for row in rows_of(paths[name])} for name in names}


def change_of_loss(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], source: str | None
) -> dict[str, float]:
    """Bits per byte before and after on the same documents, and the difference with its interval. Each model's ratio is
    of the bytes that it scored: a longer context scores more of a long document. The interval is over works."""
    ids = [name for name, row in before.items() if source is None or row["source"] == source]
    values, errors = [], dict.fromkeys((before[name]["work"] for name in ids), 0.0)
    for sign, rows in ((-1, before), (1, after)):
        size = sum(rows[name]["bytes"] for name in ids)
        value = sum(rows[name]["nll_bits"] for name in ids) / size
        values.append(value)
        for name in ids:
            errors[before[name]["work"]] += sign * (rows[name]["nll_bits"] - value * rows[name]["bytes"]) / size
    error = math.sqrt(len(errors) / (len(errors) - 1) * sum(error * error for error in errors.values()))
    change: Ratio = {"value": values[1] - values[0], "se": error, "documents": len(ids), "works": len(errors)}
    return {"before": values[0], "after": values[1], "change": change["value"], "half": half_width(change)}


def rewards_of(path: Path) -> dict[str, dict[str, float]]:
    """{kind: {problem: mean reward of its drawn answers}}; the greedy answer, sample -1, is left out."""
    answers: dict[str, dict[str, list[float]]] = {}
    for row in rows_of(path):
        if row["sample"] >= 0:
            answers.setdefault(row["kind"], {}).setdefault(row["id"], []).append(row["reward"])
    return {
        kind: {item: sum(rewards) / len(rewards) for item, rewards in items.items()} for kind, items in answers.items()
    }


def change_of_reward(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Mean before and after over the same problems, and the difference with its interval."""
    change = clustered([after[item] - before[item] for item in sorted(before)])
    values = [sum(scores[item] for item in before) / len(before) for scores in (before, after)]
    return {"before": values[0], "after": values[1], "change": change["value"], "half": half_width(change)}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(tables.table(head, rows))


def of_card(card: str, title: str, beginning: str = "", new_title: str = "") -> str:
    """The tables and sentences of the model's card under a heading; `beginning`: those from this sentence on."""
    section = re.split(r"^#+ ", card.partition(f"# {title}\n")[2], maxsplit=1, flags=re.M)[0]
    text = re.sub(r"\n?</?details>\n|<summary>.*</summary>\n", "", section)
    text = beginning + text.partition(beginning)[2] if beginning else text
    if not text.strip() or beginning not in section:
        return ""
    lines = [line if line.startswith("|") else _wrapped(line) for line in text.strip().splitlines()]
    return "\n".join([f"## {new_title or title}\n", *lines])


def _wrapped(line: str) -> str:
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def cells(change: dict[str, float], better: int) -> list[str]:
    """before, after, the difference with its interval, and whether that is beyond 0. better: the sign of a gain."""
    low, high = change["change"] - change["half"], change["change"] + change["half"]
    verdict = "no clear change" if low <= 0 <= high else "better" if (low > 0) == (better > 0) else "worse"
    values = [f"{change[name]:.4f}" for name in ("before", "after")]
    return [*values, f"{change['change']:+.4f} ({low:+.4f} to {high:+.4f})", verdict]


def loss_tables(losses: dict[str, dict[str, dict[str, Any]]]) -> str:
    text = [name for name in losses if name.startswith(TEXT_PHASES)]
    sources = sorted({row["source"] for row in losses[text[0]].values()})
    head = ["phase", "before", "after", "change, 95 % interval", ""]
    pairs = list(itertools.pairwise(text))
    overall = [[name, *cells(change_of_loss(losses[earlier], losses[name], None), -1)] for earlier, name in pairs]
    by_source = [
        [name, source, *cells(change_of_loss(losses[earlier], losses[name], source), -1)]
        for earlier, name in pairs
        for source in sources
    ]
    last = text[-1]
    later = [name for name in losses if name not in text]
    kept = [[name, *cells(change_of_loss(losses[last], losses[name], None), -1)] for name in later]
    return "\n\n".join(
        [
            "## Bits per byte of held-out documents",
            f"Of {len(losses[text[0]])} documents that no phase saw, before and after each phase on text.\n"
            "A model with a longer context scores more of a long document:",
            table(head, overall),
            "By source:",
            table(["phase", "source", *head[1:]], by_source),
            f"After each later phase, against {last}:",
            table(head, kept),
        ]
    )


def reward_tables(evaluation: Path) -> str:
    parts = [
        "## Rewards of answers",
        "Mean of drawn answers by kind, before and after a phase; for problems this is pass@1:",
    ]
    for name, title in (("test", "Held-out problems"), ("fresh", "Problems drawn from the digest of the weights")):
        models = {p.parent.name: rewards_of(p) for p in (evaluation / name).glob("*/answers.parquet")}
        order = sorted(models, key=when)
        rows = []
        for earlier, later in itertools.pairwise(order):
            for kind in sorted(models[earlier].keys() & models[later].keys()):
                before, after = models[earlier][kind], models[later][kind]
                if before.keys() == after.keys():
                    rows.append([later, kind, str(len(before)), *cells(change_of_reward(before, after), 1)])
                else:  # each model has its fresh problems: two samples
                    rows.append([later, kind, str(len(after)), *cells(unpaired(before, after), 1)])
        parts += [f"{title}:", table(["phase", "kind", "problems", "before", "after", "change", ""], rows)]
    return "\n\n".join(parts)


def unpaired(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """The difference of two means over different problems, with its interval."""
    first, second = (clustered(list(scores.values())) for scores in (before, after))
    half = Z95 * (first["se"] ** 2 + second["se"] ** 2) ** 0.5
    values = {"before": first["value"], "after": second["value"]}
    return {**values, "change": second["value"] - first["value"], "half": half}


def preference_table(evaluation: Path) -> str:
    rows = []
    paths = {path.parent.name: path for path in evaluation.glob("preferences/*/scores.json")}
    for name in sorted(paths, key=when):
        scores = json.loads(paths[name].read_text())
        rate = scores["win_rate"]
        rows.append(
            [name, scores["before"], str(rate["n"]), f"{rate['value']:.3f} ({rate['low']:.3f} to {rate['high']:.3f})"]
        )
    if not rows:
        return ""
    about = "Wins on held-out requests by the preference reward, ties as half, with the 95 % interval:"
    return "\n\n".join(["## Preferences", about, table(["model", "against", "requests", "win rate"], rows)])


def cost_table(release: Path) -> str:
    by_stage = Release(release).costs
    ranked = sorted(by_stage.items(), key=lambda item: -item[1]["core_hours"])
    rows = [[name, f"{row['attempts']:.0f}", f"{60 * row['core_hours']:.1f}"] for name, row in ranked]
    total = run_facts.total_cost(by_stage)
    rows.append(["all", f"{total['attempts']:.0f}", f"{60 * total['core_hours']:.1f}"])
    return "\n\n".join(["## What it took", table(["stage", "attempts", "processor minutes"], rows)])


def draw(release: Path) -> bytes:
    """The three scaling axes: text that was trained on, answers that were learned from, answers to one problem. Raises
    AtomError without matplotlib."""
    logs = {phase: training.read(path) for phase, path in training.logs(release / "model").items()}

    def paint(text: Axes, reinforcement: Axes, inference: Axes) -> None:
        _text(text, {phase: lines for phase, lines in logs.items() if any("heldout_loss" in line for line in lines)})
        _reinforcement(reinforcement, logs)
        _inference(inference, release / "dataset/evaluation/test")
        for axis in (text, reinforcement, inference):
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=6, frameon=False)

    return png((13.0, 4.5), lambda figure: paint(*figure.subplots(1, 3)))


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def _text(axis: Axes, logs: dict[str, list[Any]]) -> None:
    """Held-out loss of each phase against the tokens trained on so far; each phase measures its own mix."""
    start = 0
    for number, (phase, lines) in enumerate(logs.items()):
        points, tokens = [], 0
        for line in lines:
            tokens = line.get("tokens", tokens)  # so far in this phase
            if "heldout_loss" in line:
                points.append((start + tokens, line["heldout_loss"]))
        start += tokens
        color = COLORS[number % len(COLORS)]
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=2, linewidth=1, label=phase)
    _label(axis, "More text", "tokens trained on, all phases", "held-out loss of the phase's mix, nats per token")


def _reinforcement(axis: Axes, logs: dict[str, list[Any]]) -> None:
    curves = {
        (phase, kind): [(x["generated"], x["validation"][kind]) for x in lines if kind in x.get("validation", {})]
        for phase, lines in logs.items()
        for kind in sorted({kind for x in lines if "generated" in x for kind in x.get("validation", {})})
    }
    for number, ((phase, kind), points) in enumerate(curves.items()):
        style = "-" if phase == "rlvr" else "--"
        color = COLORS[number % len(COLORS)]
        x, y = zip(*points, strict=True)
        axis.plot(x, y, style, color=color, marker="o", markersize=2, linewidth=1, label=f"{phase}, {kind}")
    _label(axis, "More reinforcement learning", "tokens generated in the phase", "validation, greedy answers")


def _inference(axis: Axes, evaluation: Path) -> None:
    scores = {path.parent.name: json.loads(path.read_text()) for path in evaluation.glob("*/scores.json")}
    for color, name in zip(COLORS * 2, sorted(scores, key=when), strict=False):
        at = scores[name]["problems_all"]["at"]
        points = [(at[k]["tokens"], at[k]["pass"]["value"], half_width(at[k]["pass"])) for k in sorted(at, key=int)]
        x, y, half = zip(*points, strict=True)
        axis.errorbar(
            x, y, half, color=color, marker="o", markersize=2, linewidth=1, elinewidth=0.6, label=f"{name}, pass@k"
        )
    axis.set_xscale("log")
    _label(axis, "More answers", "tokens generated for a problem", "share of problems right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="folder of a release")
    parser.add_argument("page", type=Path, help="Markdown file; the drawing gets the same name with .png")
    options = parser.parse_args()
    release, page = options.release, options.page
    facts = json.loads((release / "evidence/release.json").read_text())
    device = json.loads((release / "evidence/environment.json").read_text()).get("device", {}).get("model")
    evaluation = release / "dataset/evaluation"
    losses = text_losses(evaluation)
    drawing = page.with_suffix(".png")
    drawing.write_bytes(draw(release))
    head = page.read_text().partition(MARK)[0].rstrip() if page.exists() else f"# {facts['name']}"
    commit = facts["commit"] and f"commit `{facts['commit'][:12]}`"
    about = (
        f"Release {facts['name']} {facts['version']}, made by {commit or 'code outside a repository'} on "
        f"{device or 'a device without a name'}.\nAll figures are of this one run."
    )
    axes = f"## Three axes\n\n![Held-out loss, validation accuracy and pass@k against tokens]({drawing.name})"
    card = (release / "model" / schema.CARD).read_text()
    parts = [
        head, MARK, about, of_card(card, "Read this first"),
        of_card(card, "Every figure", "Bits per byte beside those", "Beside simple models"),
        loss_tables(losses), reward_tables(evaluation), of_card(card, "Learning or sharpening"),
        of_card(card, "Items of held-out text"), of_card(card, "Gain from context"), axes,
        preference_table(evaluation),
    ]  # fmt: skip
    page.write_text("\n\n".join(filter(None, [*parts, cost_table(release)])) + "\n")


if __name__ == "__main__":
    main()
