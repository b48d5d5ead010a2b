"""Markdown tables of the cards. Every number of a card is formatted here, from facts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from release.assembly import costs
from release.assembly.checkpoint_facts import Checkpoint, Intervention
from release.assembly.data_facts import DataFacts, OrderPart
from release.assembly.model_facts import ModelFacts
from release.assembly.score_facts import ChatScores, HarnessFacts
from release.layout import RUNTIMES, numbered
from release.prediction.forecast import FOLDER as PREDICTION
from stages.evaluation.scores import Figure, ModelScores

MOST_LICENSES = 8
"""Licenses that a source's row lists."""
TITLES = {"init": "random weights", "base": "pre-training (base)", "mid": "mid-training", "long": "long context"}

IN_PROCESS = "transformers in the stage's process, in fp32"
CONVERSATION_TITLES = {"system": "system messages", "tools": "tools", "reasoning": "reasoning"}
CHAT_TITLES = {"test": "answers in conversation", "fresh": "answers to new items", "preferences": "preferences"}


def count(value: int) -> str:
    return f"{value:,}"


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * len(head)) + "|"]
    return lines + ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in body]


def with_error(row: Figure, digits: int) -> str:
    return f"{row['value']:.{digits}f} ± {row['se']:.{digits}f}"


def titles(models: Iterable[str]) -> dict[str, str]:
    """The column titles of the models, in the order of training."""
    parts = {model: numbered(model) for model in models}
    return {model: f"{TITLES.get(kind, kind)} {number or ''}".strip() for model, (kind, number) in parts.items()}


def evaluation(scores: dict[str, ModelScores]) -> list[str]:
    """One row for each measure, one column for each model: value ± standard error."""
    phases, last_scores = list(scores), scores[list(scores)[-1]]
    body = [
        [f"bits per byte, {source}", *(with_error(scores[p]["bits_per_byte"][source], 4) for p in phases)]
        for source in last_scores["bits_per_byte"]
    ]
    body += [
        [f"exact match, {task}", *(with_error(scores[p]["accuracy"][task], 3) for p in phases)]
        for task in last_scores["accuracy"]
    ]
    body.append(["bits per byte, all", *(with_error(scores[p]["bits_per_byte_all"], 4) for p in phases)])
    body.append(["exact match, all", *(with_error(scores[p]["accuracy_all"], 3) for p in phases)])
    return table(["measure", *titles(phases).values()], body)


def passkeys(scores: dict[str, ModelScores]) -> list[str]:
    """Keys retrieved from texts of each length, one column for each model that was evaluated on them."""
    return _by_model(scores, "passkey", "tokens of the text", 3)


def positions(scores: dict[str, ModelScores]) -> list[str]:
    """Bits per token of long documents by the token's position, one column for each model."""
    return _by_model(scores, "loss_by_position", "position of the token", 4)


def passkeys_by_depth(scores: dict[str, ModelScores]) -> list[str]:
    """Keys that the last model retrieved, by length of the text and depth of the key in it (0: at its start)."""
    scores_by_length = scores[list(scores)[-1]].get("passkey_by_depth", {})
    depths = sorted({depth for row in scores_by_length.values() for depth in row}, key=float)
    body = [
        [count(int(length)), *(with_error(row[depth], 3) if depth in row else "" for depth in depths)]
        for length, row in sorted(scores_by_length.items(), key=lambda pair: int(pair[0]))
    ]
    return table(["tokens of the text", *(f"depth {depth}" for depth in depths)], body) if body else []


def _by_model(
    scores: dict[str, ModelScores], kind: Literal["passkey", "loss_by_position"], head: str, digits: int
) -> list[str]:
    """One row for each name of a kind of scores, in order of its first number; empty if no model has that kind."""
    names, columns = titles(scores), [model for model in scores if kind in scores[model]]
    keys = sorted({key for model in columns for key in scores[model][kind]}, key=lambda key: int(key.split("-")[0]))
    body = []
    for key in keys:
        cells = [scores[model][kind].get(key) for model in columns]
        label = " to ".join(count(int(number)) for number in key.split("-"))
        body.append([label, *(with_error(cell, digits) if cell else "not measured" for cell in cells)])
    return table([head, *(names[model] for model in columns)], body) if body else []


def samples(scores: dict[str, ModelScores]) -> list[str]:
    """The sample sizes of the evaluation: documents, bytes and problems."""
    last_scores = scores[list(scores)[-1]]
    body = [[name, count(r["documents"]), count(r["bytes"]), ""] for name, r in last_scores["bits_per_byte"].items()]
    body += [[name, "", "", count(r["n"])] for name, r in last_scores["accuracy"].items()]
    return table(["source or task", "held-out documents", "bytes scored", "problems"], body)


def engines(
    scores: Mapping[str, ModelScores], chat: Mapping[str, ChatScores], memorization: Mapping[str, Any] | None = None,
    harness: HarnessFacts | None = None,
) -> list[str]:  # fmt: skip
    """One sentence: what computed the scores."""
    kinds: dict[str, Iterable[Mapping[str, Any]]] = {"evaluation on documents and problems": scores.values()}
    kinds |= {CHAT_TITLES[benchmark]: by_model.values() for benchmark, by_model in chat.items()}
    kinds |= {"what it gives away": [memorization]} if memorization else {}
    kinds |= {"task sets": harness.task_sets.values()} if harness else {}
    by_engine: dict[str, list[str]] = {}
    for kind, rows in kinds.items():
        for engine in dict.fromkeys(str(row.get("engine", "")) for row in rows):
            by_engine.setdefault(engine, []).append(kind)
    parts = []
    for engine, names in by_engine.items():
        title = f"vLLM ({engine}), in the data type of the exported weights" if engine else IN_PROCESS
        parts.append(title if len(by_engine) == 1 else f"{title}: {', '.join(names)}")
    return [f"Computed by {'; by '.join(parts)}."]


def architecture(model: ModelFacts) -> list[str]:
    body = [["parameters, total", count(model.parameters.total)]]
    body += [["parameters, active for one token", count(model.parameters.active)]]
    body += [[key.replace("_", " "), count(value)] for key, value in model.config.items()]
    return table(["what", "value"], body)


def context(model: ModelFacts) -> list[str]:
    """The context length and the position encoding, from config.json."""
    rope = dict(model.rope)
    body = [["context length, tokens", count(model.config["max_position_embeddings"])]]
    body += [["base of the rotary embedding", f"{rope.pop('rope_theta'):,.10g}"]]
    kind = rope.pop("rope_type", "default")
    body += [["scaling of the rotary embedding", "none" if kind == "default" else kind]]
    body += [[f"{kind}: {key.replace('_', ' ')}", number(value)] for key, value in sorted(rope.items())]
    return table(["what", "value"], body)


def parity(model: ModelFacts) -> list[str]:
    body = [
        [key.replace("_", " "), number(value)]
        for key, value in sorted(model.parity.items())
        if not isinstance(value, dict)
    ]
    return table(["export parity", "value"], body)


def number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return count(value) if isinstance(value, int) else f"{value:.3g}"


def sources(data: DataFacts) -> list[str]:
    body = []
    for name, row in data.sources.items():
        split = row.by_split
        tokens = sum(row.tokens.values())
        counts = [
            row.documents_in,
            row.kept,
            split.get("train", 0),
            split.get("heldout", 0),
            row.bytes_kept,
            tokens,
        ]
        body.append([name, few(row.licenses), *map(count, counts)])
    return table(["source", "license", "documents in", "kept", "train", "held out", "bytes kept", "tokens"], body)


def few(licenses: list[str]) -> str:
    """The first licenses, and the number of the others."""
    shown, others = licenses[:MOST_LICENSES], licenses[MOST_LICENSES:]
    return ", ".join([*shown, f"{len(others)} others"] if others else shown)


def license_evidence(data: DataFacts) -> list[str]:
    body = [[name, few(row.licenses), row.origin, row.license_evidence] for name, row in data.sources.items()]
    return table(["source", "license", "origin", "evidence of the license"], body)


def funnel(data: DataFacts) -> list[str]:
    """Removed documents, one row for each rule, one column for each source; the last rows balance."""
    names = list(data.sources)
    rules = sorted({rule for row in data.sources.values() for rule in row.removed})

    def line(label: str, numbers: list[int]) -> list[str]:
        return [label, *map(count, numbers), count(sum(numbers))]

    body = [line("in", [data.sources[n].documents_in for n in names])]
    body += [line(f"removed: {rule}", [data.sources[n].removed.get(rule, 0) for n in names]) for rule in rules]
    body.append(line("kept", [data.sources[n].kept for n in names]))
    return table(["documents", *names, "all"], body)


def order(data: DataFacts) -> list[str]:
    """The data of each training phase, from the order index."""
    body = []
    for phase, row in data.order.items():
        for part in row.parts:
            first, last = part.first_step, part.last_step
            label = phase if len(row.parts) == 1 else f"{phase}, steps {count(first)} to {count(last)}"
            for name, figures in part.by_source.items():
                cells = [count(number) for number in (figures.rows, figures.tokens, figures.documents)]
                body.append([label, count(last - first + 1), name, *cells])
    return table(["phase", "steps", "source", "rows that hold it", "tokens predicted", "different documents"], body)


def conversations(data: DataFacts, phases: Iterable[str]) -> list[str]:
    """What the kept conversations of the sources that the phases read have, and what none has; empty without any."""
    read = {source for phase in phases for source in data.sources_read(phase)}
    rows = [(name, row, row.conversations) for name, row in data.sources.items() if name in read and row.conversations]
    if not rows:
        return []
    body = [
        [name, count(row.kept), *(count(features[name]) for name in CONVERSATION_TITLES)]
        for name, row, features in rows
    ]
    absent = [title for name, title in CONVERSATION_TITLES.items() if not any(row[name] for _, _, row in rows)]
    sentence = f"No kept conversation has: {', '.join(absent)}. " if absent else ""
    heads = (f"with {title}" for title in CONVERSATION_TITLES.values())
    lines = table(["source", "conversations kept", *heads], body)
    return [*lines, "", f"{sentence}`enable_thinking=False` opens an empty think block, which no phase trained."]


def further_evidence(release: Path) -> list[str]:
    """Rows of the evidence card for what only some releases have."""
    rows = {
        RUNTIMES: "what other programs make of the final model and its variants: tokens and log-probabilities",
        f"{PREDICTION}/": "what smaller runs said of this one, sealed before it began",
    }
    return [f"| `{path}` | {text} |" for path, text in rows.items() if (release / path).exists()]


def packing(data: DataFacts) -> list[str]:
    """The fill of the rows of packed phases; empty if no phase is packed."""
    body = []
    for phase, part in _packed(data):
        if (packing := part.packing) is not None:
            sizes = [count(number) for number in (packing.rows, packing.sequence_length, packing.tokens)]
            body.append([phase, *sizes, f"{100 * packing.fill:.2f} %"])
    return table(["phase", "rows", "tokens of a row", "tokens predicted", "filled"], body) if body else []


def long_documents(data: DataFacts) -> list[str]:
    """The requested and the missing share of long documents; empty if no phase up-weights them."""
    keys = ("over", "chunks", "available_tokens", "wanted_tokens", "missing_tokens")
    body = [
        [phase, source, *(count(row[key]) for key in keys)]
        for phase, part in _packed(data)
        for source, row in part.long.items()
    ]
    head = ["phase", "source", "long is more than, tokens", "long chunks", "tokens in them", "tokens asked for"]
    return table([*head, "missing, made up by shorter ones"], body) if body else []


def _packed(data: DataFacts) -> Iterator[tuple[str, OrderPart]]:
    for phase, row in data.order.items():
        for part in row.parts:
            if part.packing is not None:
                label = f", steps {count(part.first_step)} to {count(part.last_step)}"
                yield phase + (label if len(row.parts) > 1 else ""), part


def interventions(rows: list[Intervention]) -> list[str]:
    """One line for each resumption of a phase from a checkpoint of an earlier run."""
    lines = []
    for row in rows:
        changes = ", ".join(
            f"`{name}` {_setting_text(before)} → {_setting_text(after)}" for name, before, after in row.changes
        )
        settings = f"with other settings: {changes}" if changes else "with the same settings"
        lines.append(
            f"- {row.phase}: steps {count(row.first)} to {count(row.step)} by `{row.by}`; "
            f"from step {count(row.step + 1)} on {settings}."
        )
    return lines


def _setting_text(value: Any) -> str:
    """A setting in the form of a recipe; an unset one is the default, or a source that is not read."""
    return "not set" if value is None else str(value)


def checkpoints(rows: list[Checkpoint]) -> list[str]:
    return table(["branch", "phase", "step"], [[row.branch, row.phase, count(row.step)] for row in rows])


def cost(run_costs: costs.Costs) -> list[str]:
    """The cost of the whole release, by stage."""
    head = ["stage", "attempts", "failed", "core hours", "GPU hours", "energy, Wh"]
    return table(head, costs.rows(run_costs))
