"""Markdown tables of the cards. Every number of a card is formatted here, from facts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.core.text import escaped
from release.facts import run_facts
from release.facts.data_facts import DataFacts, OrderPart
from release.facts.forecast import FOLDER as PREDICTION
from release.facts.model_facts import ModelFacts
from release.facts.run_facts import Changes, Checkpoint, Intervention
from release.facts.score_facts import ChatScores, HarnessFacts
from release.layout import RUNTIMES, numbered
from stages.confidence import Figure
from stages.evaluation.scores import ModelScores, Proportion

MOST_CHANGES = 30
"""Changed settings that a card lists."""
MOST_LICENSES = 8
"""Licenses that a source's row lists."""
WORDS: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "titles.yaml").read_text("utf-8"))
TITLES: dict[str, str] = WORDS["models"]
"""Titles of exported models, after the phase that made them."""
PUBLISHED = "published base"
"""The title of a base that no phase of the release made."""
PHASES: dict[str, str] = WORDS["phases"]
"""Titles of training phases."""
IN_PROCESS = "transformers in the stage's process, in fp32"
"""The program that computes scores without an engine."""
CONVERSATION_TITLES = {"system": "system messages", "tools": "tools", "reasoning": "reasoning"}
CHAT_TITLES = {"test": "answers in conversation", "fresh": "answers to new items", "preferences": "preferences"}
COLUMN_PIXELS, PADDING_PIXELS = 750, 27
"""The width of a card on the Hub, with a margin, and that of a cell's padding and border."""
WIDE_PIXELS, NARROW_PIXELS, NARROW = 10.3, 5.2, " .,:;()|il'"
"""Widths of characters there at 16 px, in DejaVu Sans, the widest of the usual fonts."""


def count(value: int) -> str:
    return f"{value:,}"


def table(head: Iterable[str], body: Iterable[Iterable[str]], labels: int = 1) -> list[str]:
    """Returns the lines of a Markdown table.

    No table is wider than the Hub's column: columns that do not fit are in further tables below it, each with the
    labels again.

    Args:
        head: The names of the columns.
        body: The cells of each row.
        labels: The number of first columns, which name a row.
    """
    # Without spaces around ±, a browser breaks no figure over two lines.
    head, rows = list(head), [[str(cell).replace("|", "\\|").replace(" ± ", "±") for cell in row] for row in body]
    widths = [_pixels([name, *(row[n] for row in rows)]) for n, name in enumerate(head)]
    lines: list[str] = []
    for columns in _columns_that_fit(widths, labels):
        if lines:
            lines.append("")
        rule = "|" + "|".join(["---"] * len(columns)) + "|"
        lines += [_line([head[n] for n in columns]), rule]
        lines += [_line([row[n] for n in columns]) for row in rows]
    return lines


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def explained_table(sentence: str, head: Iterable[str], body: list[list[str]], labels: int = 1) -> list[str]:
    """Returns the lines of a sentence and a table below it; none for a table without rows."""
    return [sentence, "", *table(head, body, labels)] if body else []


def _columns_that_fit(pixels: Sequence[float], labels: int) -> list[list[int]]:
    """Returns the numbers of the columns of each table."""
    limit, first, columns = COLUMN_PIXELS - sum(pixels[:labels]), list(range(labels)), range(labels, len(pixels))
    # As few tables as fit.
    parts: list[list[int]] = [[]]
    for column in columns:
        # A column that is too wide alone still gets a table.
        if parts[-1] and sum(pixels[n] for n in [*parts[-1], column]) > limit:
            parts.append([])
        parts[-1].append(column)

    # Equally many columns in each look better, if they fit as well.
    size = math.ceil(len(columns) / len(parts)) or 1
    even = [list(columns[n : n + size]) for n in range(0, len(columns), size)]
    if all(sum(pixels[n] for n in part) <= limit for part in even):
        parts = even or parts
    return [first + part for part in parts]


def _pixels(column: Sequence[str]) -> float:
    """Returns the least width of a column, which is that of its longest word."""
    widths = [0.0]
    for word in (word for cell in column for word in cell.split()):
        widths.append(sum(NARROW_PIXELS if character in NARROW else WIDE_PIXELS for character in word))
    return max(widths) + PADDING_PIXELS


def with_error(row: Figure, digits: int) -> str:
    return f"{row['value']:.{digits}f} ± {row['se']:.{digits}f}"


def with_interval(row: Proportion) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def title(name: str, names: Mapping[str, str] = TITLES) -> str:
    """Returns the title of an exported model, or with PHASES that of a training phase."""
    kind, number = numbered(name)
    return f"{names.get(kind, kind)} {number or ''}".strip()


def titles(models: Iterable[str]) -> dict[str, str]:
    """Returns the titles of all models of a release, in the order of training."""
    names = {model: title(model) for model in models}
    # Without an untrained model, no phase of this release made the base.
    if "base" in names and "init" not in names:
        names["base"] = PUBLISHED
    return names


def summary(model: ModelFacts) -> list[str]:
    """Returns one sentence on the model: its kind, size, context and phases."""
    size, kind = model.parameters, "mixture-of-experts language model" if model.has_experts else "language model"
    active = f", {count(size.active)} of them active for one token" if size.active != size.total else ""
    context = count(model.config["max_position_embeddings"])
    return [
        f"A {kind} of {count(size.total)} parameters{active}, with a context of {context} tokens and a vocabulary of "
        f"{count(model.config['vocab_size'])}. Architecture: `{model.architecture}`, stored as `{model.dtype}` "
        "safetensors."
    ]


def headline(model: ModelFacts) -> list[str]:
    """Returns the figures of this model beside those of the model before it and of the base model."""
    names = list(model.scores)
    # At most three columns: the base model, the one before this, and this one.
    shown = list(dict.fromkeys([*[name for name in names if name == "base"], *names[-2:]]))
    test = model.chat.get("test", {})
    last = model.scores[names[-1]]
    body = [
        [f"{task}: right, in plain text", *(with_error(model.scores[name]["accuracy"][task], 3) for name in shown)]
        for task in last["accuracy"]
    ]
    for kind in test[names[-1]]["problems"] if names[-1] in test else ():
        drawn = [test[name]["problems"][kind]["samples"]["accuracy"] if name in test else None for name in shown]
        cells = [with_error(row, 3) if row else "not measured" for row in drawn]
        body.append([f"{kind}: right, in conversation", *cells])
    bits = [with_error(model.scores[name]["bits_per_byte_all"], 3) for name in shown]
    body.append(["bits per byte of held-out text", *bits])
    columns = [titles(names)[name] for name in shown[:-1]]
    heads = (name if name == PUBLISHED else f"after {name}" for name in columns)
    return table(["measure", *heads, "this model"], body)


def evaluation(scores: dict[str, ModelScores]) -> list[str]:
    """Returns one row for each measure, one column for each model: value ± standard error."""
    phases, last_scores = list(scores), scores[list(scores)[-1]]
    body = [
        [f"bits per byte, {source}", *(with_error(scores[p]["bits_per_byte"][source], 3) for p in phases)]
        for source in last_scores["bits_per_byte"]
    ]
    body += [
        [f"exact match, {task}", *(with_error(scores[p]["accuracy"][task], 3) for p in phases)]
        for task in last_scores["accuracy"]
    ]
    body.append(["bits per byte, all", *(with_error(scores[p]["bits_per_byte_all"], 3) for p in phases)])
    body.append(["exact match, all", *(with_error(scores[p]["accuracy_all"], 3) for p in phases)])
    return table(["measure", *titles(phases).values()], body)


def passkeys(scores: dict[str, ModelScores]) -> list[str]:
    """Returns keys retrieved from texts of each length, one column for each model that was evaluated on them."""
    return _by_model(scores, "passkey", "tokens of the text")


def positions(scores: dict[str, ModelScores]) -> list[str]:
    """Returns bits per token of long documents by the token's position, one column for each model."""
    return _by_model(scores, "loss_by_position", "position of the token")


def passkeys_by_depth(scores: dict[str, ModelScores]) -> list[str]:
    """Returns the keys that the last model retrieved, by length of the text and depth of the key in it.

    Depth 0 is the start of the text.
    """
    scores_by_length = scores[list(scores)[-1]].get("passkey_by_depth", {})
    depths = sorted({depth for row in scores_by_length.values() for depth in row}, key=float)
    body = [
        [count(int(length)), *(with_error(row[depth], 3) if depth in row else "" for depth in depths)]
        for length, row in sorted(scores_by_length.items(), key=lambda pair: int(pair[0]))
    ]
    return table(["tokens of the text", *(f"depth {depth}" for depth in depths)], body) if body else []


def _by_model(scores: dict[str, ModelScores], kind: Literal["passkey", "loss_by_position"], head: str) -> list[str]:
    """Returns one row for each key of a kind of scores, by its first number; none if no model has that kind."""
    names, columns = titles(scores), [model for model in scores if kind in scores[model]]
    keys = sorted({key for model in columns for key in scores[model][kind]}, key=lambda key: int(key.split("-")[0]))
    body = []
    for key in keys:
        cells = [scores[model][kind].get(key) for model in columns]
        label = " to ".join(count(int(number)) for number in key.split("-"))
        body.append([label, *(with_error(cell, 3) if cell else "not measured" for cell in cells)])
    return table([head, *(names[model] for model in columns)], body) if body else []


def samples(scores: dict[str, ModelScores]) -> list[str]:
    """Returns the sample sizes of the evaluation: documents, bytes and problems."""
    last_scores = scores[list(scores)[-1]]
    body = [[name, count(r["documents"]), count(r["bytes"]), ""] for name, r in last_scores["bits_per_byte"].items()]
    body += [[name, "", "", count(r["n"])] for name, r in last_scores["accuracy"].items()]
    return table(["source or task", "held-out documents", "bytes scored", "problems"], body)


def engines(
    scores: Mapping[str, ModelScores],
    chat: Mapping[str, ChatScores],
    harness: HarnessFacts | None = None,
) -> list[str]:
    """Returns one sentence on what computed the scores."""
    kinds: dict[str, Iterable[Mapping[str, Any]]] = {"evaluation on documents and problems": scores.values()}
    kinds |= {CHAT_TITLES[benchmark]: by_model.values() for benchmark, by_model in chat.items()}
    if harness:
        kinds["task sets"] = harness.task_sets.values()
    by_engine: dict[str, list[str]] = {}
    for kind, rows in kinds.items():
        for engine in dict.fromkeys(str(row.get("engine", "")) for row in rows):
            by_engine.setdefault(engine, []).append(kind)
    parts = []
    for engine, names in by_engine.items():
        title = f"vLLM ({engine}), in the data type of the exported weights" if engine else IN_PROCESS
        # With one engine for everything, the names of the evaluations say nothing.
        parts.append(title if len(by_engine) == 1 else f"{title}: {', '.join(names)}")
    return [f"Computed by {'; by '.join(parts)}."]


def architecture(model: ModelFacts) -> list[str]:
    sizes = {"parameters, total": model.parameters.total, "parameters, active for one token": model.parameters.active}
    sizes |= {key.replace("_", " "): value for key, value in model.config.items()}
    return table(["what", "value"], [[name, count(value)] for name, value in sizes.items()])


def tokenizer(model: ModelFacts) -> list[str]:
    """Returns the size of the vocabulary, and the tokens that stand for no text."""
    special = ", ".join(f"`{escaped(token)}`" for token in model.special_tokens)
    return [f"{count(model.config['vocab_size'])} ids in the vocabulary. Tokens that stand for no text: {special}."]


def chat_format(model: ModelFacts) -> list[str]:
    """Returns a request in the chat template, as code; none if it is not known."""
    # The rendered request is one of the goldens, which not every model can answer.
    text = model.rendered_chat.replace("What is 2+2?", "REQUEST")
    return ["````text", *map(escaped, text.splitlines()), "````"] if text else []


def context(model: ModelFacts) -> list[str]:
    """Returns the context length and the position encoding, from config.json."""
    # Known settings first; the further ones depend on the kind of scaling.
    rope = dict(model.rope)
    body = [["context length, tokens", count(model.config["max_position_embeddings"])]]
    body.append(["RoPE base (`rope_theta`)", f"{rope.pop('rope_theta'):,.10g}"])
    kind = rope.pop("rope_type", "default")
    body.append(["RoPE scaling", "none" if kind == "default" else kind])
    body += [[f"{kind}: {key.replace('_', ' ')}", number(value)] for key, value in sorted(rope.items())]
    return table(["what", "value"], body)


def parity(model: ModelFacts) -> list[str]:
    figures = {key: value for key, value in sorted(model.parity.items()) if not isinstance(value, dict)}
    body = [[key.replace("_", " "), number(value)] for key, value in figures.items()]
    return table(["export parity", "value"], body)


def number(value: Any) -> str:
    """Returns a value as text: whole numbers in full, others in three digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return count(value) if type(value) is int else str(value)


def sources(data: DataFacts) -> list[str]:
    """Returns documents and tokens of each source after curation."""
    body = []
    for name, row in data.sources.items():
        split, tokens = row.by_split, sum(row.tokens.values())
        counts = [row.documents_in, row.kept, split.get("heldout", 0), row.bytes_kept, tokens]
        body.append([name, *map(count, counts)])
    return table(["source", "documents read", "kept", "of these held out", "bytes as acquired", "tokens"], body)


def shares(data: DataFacts, phases: Iterable[str]) -> list[str]:
    """Returns the tokens that each phase of a model predicted, and the share of each source, the largest first."""
    body = []
    for phase in (phase for phase in data.order if phase in phases):
        row, tokens = data.order[phase], data.tokens_read(phase)
        total = sum(tokens.values())
        # Names break ties, so that equal facts give equal bytes.
        largest = sorted(tokens.items(), key=lambda pair: (-pair[1], pair[0]))
        mix = ", ".join(f"{name} {number / total:.1%}" for name, number in largest) if total else ""
        body.append([title(phase, PHASES), count(row.steps), count(total), mix])
    return table(["phase", "steps", "tokens predicted", "share of each source"], body)


def licenses_in_short(data: DataFacts) -> list[str]:
    """Returns one sentence: the licenses of the sources that the data come from."""
    by_license: dict[str, list[str]] = {}
    for name, row in data.sources.items():
        by_license.setdefault(few(row.licenses) or "no license", []).append(name)
    return [f"- {license}: {', '.join(names)}" for license, names in by_license.items()]


def few(licenses: list[str]) -> str:
    """Returns the first licenses, and the number of the others."""
    shown, others = licenses[:MOST_LICENSES], licenses[MOST_LICENSES:]
    return ", ".join([*shown, f"{len(others)} others"] if others else shown)


def license_evidence(data: DataFacts) -> list[str]:
    """Returns one line for each source: licenses, origin and evidence of the license."""
    return [
        f"- **{name}**: {few(row.licenses)}. Origin: {row.origin}. Evidence of the license: {row.license_evidence}."
        for name, row in data.sources.items()
    ]


def funnel(data: DataFacts) -> list[str]:
    """Returns removed documents, one row for each rule; the first row less the others is the last."""
    rules = sorted({rule for row in data.sources.values() for rule in row.removed})

    def line(label: str, numbers: Mapping[str, int]) -> list[str]:
        parts = [f"{name} {count(number)}" for name, number in numbers.items() if number]
        return [label, count(sum(numbers.values())), ", ".join(parts)]

    body = [line("in", {name: row.documents_in for name, row in data.sources.items()})]
    for rule in rules:
        body.append(line(f"removed: {rule}", {name: row.removed.get(rule, 0) for name, row in data.sources.items()}))
    body.append(line("kept", {name: row.kept for name, row in data.sources.items()}))
    return table(["documents", "all", "by source"], body)


def order(data: DataFacts) -> list[str]:
    """Returns the data of each training phase, from the order index."""
    body = []
    for phase, row in data.order.items():
        for part in row.parts:
            first, last = part.first_step, part.last_step
            name_of_phase = title(phase, PHASES)
            # A phase has several parts if its run went on with other data.
            label = name_of_phase if len(row.parts) == 1 else f"{name_of_phase}, steps {count(first)} to {count(last)}"
            for name, figures in part.by_source.items():
                cells = [count(number) for number in (figures.rows, figures.tokens, figures.documents)]
                body.append([label, count(last - first + 1), name, *cells])
    return table(
        ["phase", "steps", "source", "rows that hold it", "tokens predicted", "different documents"], body, labels=3
    )


def conversations(data: DataFacts, phases: Iterable[str]) -> list[str]:
    """Returns the features of the kept conversations that the phases read; nothing without any conversation."""
    read = {source for phase in phases for source in data.sources_read(phase)}
    body, absent = [], dict(CONVERSATION_TITLES)
    for source, row in data.sources.items():
        if source in read and row.conversations:
            counts = [row.conversations[feature] for feature in CONVERSATION_TITLES]
            body.append([source, count(row.kept), *map(count, counts)])
            absent = {feature: title for feature, title in absent.items() if not row.conversations[feature]}
    if not body:
        return []
    sentence = f"No kept conversation has: {', '.join(absent.values())}. " if absent else ""
    heads = (f"with {title}" for title in CONVERSATION_TITLES.values())
    lines = table(["source", "conversations kept", *heads], body)
    return [*lines, "", f"{sentence}`enable_thinking=False` opens an empty think block, which no phase trained."]


def further_evidence(release: Path) -> list[str]:
    """Returns rows of the evidence card for what only some releases have."""
    rows = {
        RUNTIMES: "what other programs make of the final model and its variants: tokens and log-probabilities",
        f"{PREDICTION}/": "what smaller runs said of this one, sealed before it began",
    }
    return [f"| `{path}` | {text} |" for path, text in rows.items() if (release / path).exists()]


def packing(data: DataFacts) -> list[str]:
    """Returns the fill of the rows of packed phases; empty if no phase is packed."""
    body = []
    for phase, part in _packed(data):
        if (packing := part.packing) is not None:
            sizes = [count(number) for number in (packing.rows, packing.sequence_length, packing.tokens)]
            body.append([phase, *sizes, f"{100 * packing.fill:.2f} %"])
    return table(["phase", "rows", "sequence length", "tokens predicted", "filled"], body) if body else []


def long_documents(data: DataFacts) -> list[str]:
    """Returns the requested and the missing share of long documents; empty if no phase up-weights them."""
    keys = ("over", "chunks", "available_tokens", "wanted_tokens", "missing_tokens")
    body = [
        [phase, source, *(count(row[key]) for key in keys)]
        for phase, part in _packed(data)
        for source, row in part.long.items()
    ]
    # The order fills the missing share with shorter documents, which the last column states.
    head = ["phase", "source", "long is more than, tokens", "long chunks", "tokens in them", "tokens asked for"]
    return table([*head, "missing, made up by shorter ones"], body) if body else []


def _packed(data: DataFacts) -> Iterator[tuple[str, OrderPart]]:
    for phase, row in data.order.items():
        for part in row.parts:
            if part.packing is not None:
                label = f", steps {count(part.first_step)} to {count(part.last_step)}"
                yield title(phase, PHASES) + (label if len(row.parts) > 1 else ""), part


def interventions(rows: list[Intervention]) -> list[str]:
    """Returns one line for each resumption of a phase from a checkpoint of an earlier run."""
    lines = []
    for row in rows:
        changes = ", ".join(
            f"`{name}` {_setting_text(before)} → {_setting_text(after)}" for name, before, after in row.changes
        )
        settings = f"with other settings: {changes}" if changes else "with the same settings"
        lines.append(
            f"- {title(row.phase, PHASES)}: steps {count(row.first)} to {count(row.step)} by `{row.by}`; "
            f"from step {count(row.step + 1)} on {settings}."
        )
    return lines


def changes(since: Changes | None) -> list[str]:
    """Returns the settings and the final model's figures that changed since the version before."""
    if since is None:
        return ["No earlier version was named when this release was built (`atom build --previous`)."]
    settings = [
        f"- `{escaped(name)}`: {escaped(_setting_text(before))} → {escaped(_setting_text(after))}"
        for name, before, after in since.settings[:MOST_CHANGES]
    ]
    if len(since.settings) > MOST_CHANGES:
        settings.append(f"- {count(len(since.settings) - MOST_CHANGES)} further settings")
    figures = [
        f"- {name}: {with_error(before, 3)} → {with_error(after, 3)}" for name, (before, after) in since.figures.items()
    ]
    lines = [f"Since version {escaped(since.version)}, settings of the recipe:", ""]
    lines += settings or ["- none"]
    return [*lines, "", "Figures of the final model:", "", *figures] if figures else lines


def _setting_text(value: Any) -> str:
    """Returns a setting in the form of a recipe."""
    # An unset one is the default, or a source that is not read.
    return "not set" if value is None else str(value)


def checkpoints(rows: list[Checkpoint]) -> list[str]:
    body = [[f"`{row.branch}`", title(row.phase, PHASES), count(row.step)] for row in rows]
    return table(["branch", "phase", "step"], body)


def cost(run_costs: run_facts.Costs) -> list[str]:
    """Returns the cost of the whole release, by part of the work."""
    part_of = {stage: part for part, stages in WORDS["stages"].items() for stage in stages}
    # The known parts in their order, then stages that are parts of their own.
    names = [*WORDS["stages"], *sorted(stage for stage in run_costs if stage not in part_of)]
    parts: run_facts.Costs = {}
    for name in names:
        # Several stages may be one part, and a run need not have all parts.
        rows = [row for stage, row in run_costs.items() if part_of.get(stage, stage) == name]
        if rows:
            parts[name] = {column: sum(row[column] for row in rows) for column in run_facts.COST_COLUMNS}
    head = ["part", "attempts", "of these failed", "core hours", "GPU hours", "energy, Wh"]
    return table(head, run_facts.cost_rows(parts))
