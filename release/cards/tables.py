"""Markdown tables of the cards, and their parts. Every number of a card is formatted here, from facts.

Tables about documents are in `document_tables`, those about conversation in `chat_tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core.text import escaped
from pipeline.core.yaml_text import read_trusted
from release.facts import run_facts
from release.facts.data_facts import DataFacts
from release.facts.forecast import FOLDER, NAMES
from release.facts.model_facts import ModelFacts
from release.facts.run_facts import Changes, Checkpoint, Intervention, Trained
from release.facts.score_facts import HarnessFacts
from release.facts.variant_facts import VariantFacts
from release.layout import MERGE, UNMERGED, numbered, trained_by, when
from stages.confidence import Figure, half_width
from stages.evaluation.benchmark_changes import is_shown, pooled
from stages.evaluation.harness import CUT_OFF
from stages.evaluation.scores import ModelScores, Proportion
from stages.train.rehearsal import within

MOST_CHANGES = 30
"""Changed settings that a card lists."""
MOST_LICENSES = 8
"""Licenses that a source's row lists."""
WORDS: dict[str, Any] = read_trusted(Path(__file__).parent / "titles.yaml")
TITLES: dict[str, str] = WORDS["models"]
"""Titles of exported models, after the phase that made them."""
PUBLISHED = "published base"
"""The title of a base that no phase of the release made."""
PHASES: dict[str, str] = WORDS["phases"]
"""Titles of training phases."""
OPTIMIZERS: dict[str, dict[str, str]] = WORDS["optimizers"]
"""Words on each kind of optimizer of this project."""
IN_PROCESS = "transformers in the stage's process, in fp32"
"""The program that computes scores without an engine."""
MOST_DEAD = 10
"""Dead experts that a card names."""


def count(value: int) -> str:
    return f"{value:,}"


def table(head: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    """Returns the lines of a Markdown table, from the names of its columns and the cells of each row."""
    # Without spaces around ±, a browser breaks no figure over two lines.
    head, rows = list(head), [[str(cell).replace("|", "\\|").replace(" ± ", "±") for cell in row] for row in body]
    return [_line(head), "|" + "|".join(["---"] * len(head)) + "|", *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def explained_table(sentence: str, head: Iterable[str], body: list[list[str]]) -> list[str]:
    """Returns the lines of a sentence and a table below it; none for a table without rows."""
    return [sentence, "", *table(head, body)] if body else []


def with_error(row: Figure, digits: int) -> str:
    return f"{row['value']:.{digits}f} ± {row['se']:.{digits}f}"


def with_interval(row: Proportion) -> str:
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"


def title(name: str, names: Mapping[str, str] = TITLES) -> str:
    """Returns the title of an exported model, or with PHASES that of a training phase or of its merged checkpoints."""
    kind, number = numbered(name.removeprefix(UNMERGED).removeprefix(MERGE))
    words = f"{names.get(kind, kind)} {number or ''}".strip()
    if name.startswith(UNMERGED):
        return f"{words} (not merged)"
    return f"{words} (merged)" if name.startswith(MERGE) else words


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
    # At most three columns: the base model, the one before this, and this one, which is the last.
    shown = [name for name in names if name in {"base", *names[-2:]}]
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
    names, columns = titles(scores), [model for model in scores if "passkey" in scores[model]]
    lengths = sorted({length for model in columns for length in scores[model]["passkey"]}, key=int)
    body = []
    for length in lengths:
        cells = [scores[model]["passkey"].get(length) for model in columns]
        body.append([count(int(length)), *(with_error(cell, 3) if cell else "not measured" for cell in cells)])
    return table(["tokens of the text", *(names[model] for model in columns)], body) if body else []


def twins(sizes: Sequence[Trained]) -> list[str]:
    """Returns the base model and its dense twins with their bits per byte; none without twins."""
    body: list[list[str]] = []
    for size in sizes:
        if size.bits and size.difference:
            change, half = size.difference["value"], half_width(size.difference)
            less = f"{change:+.3f} ({change - half:+.3f} to {change + half:+.3f})" if body else ""
            figures = [count(number) for number in (size.total, size.active, size.tokens)]
            body.append([f"`{size.name}`", *figures, with_error(size.bits, 3), less])
    sentence = (
        "A dense twin (`size-…`) is trained on the rows of the base model (`pretrain`) in their order, with as many "
        "FLOPs for a token. Bits per byte are of the same held-out documents; differences have 95 % intervals:"
    )
    head = ["model", "parameters", "active", "tokens", "bits per byte", "less the base model"]
    return explained_table(sentence, head, body if len(body) > 1 else [])


def context_gain(scores: dict[str, ModelScores]) -> list[str]:
    """Returns bits per byte of the same bytes with a short and with a long context, for each model."""
    measured = {name: scores[name]["context"] for name in scores if "context" in scores[name]}
    if not measured:
        return []
    names, last = titles(scores), list(measured.values())[-1]
    body = []
    for name, row in measured.items():
        figures = [row["short"], row["long"], row["gain"]]
        body.append([names[name], count(row["gain"]["documents"]), *(with_error(figure, 4) for figure in figures)])
    sentence = (
        "Bits per byte of every source are of documents that are cut to a model's own context, so a model with a "
        "longer one scores further bytes. Here all models score the same bytes twice: after at most "
        f"{count(last['short_tokens'] - 1)} tokens, and after all before them in documents of {count(last['tokens'])} "
        "tokens. The gain is the difference, with the standard error of differences within documents, as if those of "
        "one work were independent; a negative one is a loss, of a model that was not trained on so long a context."
    )
    return explained_table(sentence, ["model after", "documents", "short", "long", "gain"], body)


def text_items(scores: dict[str, ModelScores]) -> list[str]:
    """Returns right answers to items of held-out text: of a guess, of the n-gram model, and of each model, by kind."""
    names = titles(scores)
    measured = {name: scores[name]["text_items"] for name in scores if "text_items" in scores[name]}
    body = []
    for kind in measured[list(measured)[-1]] if measured else ():
        parts = {name: kinds[kind] for name, kinds in measured.items() if kind in kinds}
        (first, *_) = parts.values()
        items = count(first["accuracy"]["n"])
        blind = "a guess" if first["chance"] else "no answer"
        body.append([kind, items, blind, f"{first['chance']:.3f}"])
        body.append([kind, items, "byte n-grams", with_interval(first["baseline"])])
        body += [[kind, items, names[name], with_interval(part["accuracy"])] for name, part in parts.items()]
    sentence = (
        "Items that are made of held-out documents, one of each document and kind. *words*, *lines*, *options*: which "
        "of four texts of a document goes on after its beginning. *retrieval*: which of four keys was stated so many "
        "bytes before. The answer is the text of which the beginning saves most bits per byte. *completion*: the rest "
        "of a line of Python, with which the text must parse. The n-grams have five bytes, and are counted in the "
        "training split."
    )
    return explained_table(sentence, ["kind", "items", "answered by", "right, with 95 % interval"], body)


def engines(model: ModelFacts) -> list[str]:
    """Returns one sentence on what computed the scores."""
    rows: list[Mapping[str, Any]] = [*model.scores.values()]
    rows += [row for by_model in model.chat.values() for row in by_model.values()]
    rows += model.harness.task_sets.values() if model.harness else []
    names = dict.fromkeys(str(row.get("engine", "")) for row in rows)
    parts = [f"vLLM ({name}), in the data type of the exported weights" if name else IN_PROCESS for name in names]
    return [f"Computed by {'; by '.join(parts)}."]


def chat_format(model: ModelFacts) -> list[str]:
    """Returns a request in the chat template, as code; none if it is not known."""
    # The rendered request is one of the goldens, which not every model can answer.
    text = model.rendered_chat.replace("What is 2+2?", "REQUEST")
    return ["````text", *map(escaped, text.splitlines()), "````"] if text else []


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
    return table(["phase", "steps", "source", "rows that hold it", "tokens predicted", "different documents"], body)


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


def optimizers(settings_by_phase: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the optimizer of each phase with its settings, below what its kind does; none without phases."""
    if not settings_by_phase:
        return []
    kinds = [str(settings.get("kind", "adam")) for settings in settings_by_phase.values()]
    sentences = " ".join(OPTIMIZERS.get(kind, {}).get("sentence", "") for kind in dict.fromkeys(kinds)).strip()
    body = [
        # A kind of an extension has no title but its name in the recipe.
        [title(phase, PHASES), OPTIMIZERS.get(kind, {}).get("title", f"`{escaped(kind)}`"), _optimizer_text(settings)]
        for (phase, settings), kind in zip(settings_by_phase.items(), kinds, strict=True)
    ]
    return [*([sentences, ""] if sentences else []), *table(["phase", "optimizer", "settings"], body)]


def _optimizer_text(settings: Mapping[str, Any]) -> str:
    """Returns the settings of an optimizer: those of all kinds in words, further ones by their names."""
    words = {
        "lr": "peak learning rate",
        "final_lr": "final learning rate",
        "schedule": "schedule",
        "decay_steps": "steps of the final decay",
        "warmup_steps": "warm-up steps",
        "weight_decay": "weight decay",
        "beta1": "β₁",
        "beta2": "β₂",
        "clip": "largest gradient norm",
    }
    stated = {"schedule": "cosine", **settings}
    names = [*words, *sorted(stated.keys() - words.keys() - {"kind"})]
    return ", ".join(
        f"{words.get(name, escaped(name))} {escaped(str(stated[name]))}"
        for name in names
        if stated.get(name) is not None
    )


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


def rehearsals(rows: Iterable[run_facts.Rehearsal]) -> list[str]:
    """Returns what the rehearsals of phases found; none without any."""
    body = []
    for row in rows:
        measured, moved, speeds = row.measured, "not stated", ["not stated", "not stated"]
        if measured is not None:
            moved = f"{count(measured['moved_ranks'])}; {count(measured['nodes'])}"
            speed, planned = f"{measured['tokens_per_s']:,.0f}", measured["planned_tokens_per_s"]
            speeds = [speed + " (slow)" * measured["slow"], f"{planned:,.0f}" if planned else "no plan"]
        equal = "bit for bit" if row.compared["exact"] else within(exact=False).strip()
        body.append([title(row.phase, PHASES), count(row.compared["ranks"]), moved, equal, *speeds])
    sentence = (
        "Before each of these phases its first steps were rehearsed: a step after a restart from a work checkpoint was "
        "compared with the one before it, on every rank (`evidence/rehearsals/`), and ten further steps were timed:"
    )
    head = ["phase", "ranks", "ranks that moved; nodes", "the step is equal", "tokens a second", "planned"]
    return explained_table(sentence, head, body)


def cost(costs: run_facts.Costs) -> list[str]:
    """Returns one sentence on the cost of the whole release."""
    total = run_facts.total_cost(costs)
    return [
        f"{total['attempts']:.0f} attempts, of which {total['failed']:.0f} failed: {total['core_hours']:.3g} core "
        f"hours, {total['gpu_hours']:.3g} GPU hours, about {total['energy_wh']:.3g} Wh."
    ]


def prediction(model: ModelFacts) -> list[str]:
    """Returns what was predicted before training, and what was measured; none for a model without a prediction."""
    if model.prediction is None:
        return []
    sealed = model.prediction
    # Points are sorted by their compute.
    smallest, largest = sealed.points[0], sealed.points[-1]
    body = []
    for row in model.outcomes:
        forecast, within = row.forecast, "yes" if row.within else "no"
        band = f"{forecast.low:.4f} to {forecast.high:.4f}"
        body.append([NAMES[forecast.figure], f"{forecast.value:.4f}", band, f"{row.measured:.4f}", within])
    return [
        f"Sealed before pre-training, from {count(len(sealed.points))} runs of {smallest.flops:.3g} to "
        f"{largest.flops:.3g} training FLOPs; this model has {sealed.target.flops:.3g}. Nine of ten such runs "
        f"should fall into a band. The evidence repository has the prediction and its statement in `{FOLDER}/`.",
        "",
        *table(["figure", "predicted", "band of 90 %", "measured", "in the band"], body),
    ]


def task_sets(facts: HarnessFacts | None) -> list[str]:
    """Returns the scores of task sets of lm-evaluation-harness; none if the recipe has no task sets."""
    if facts is None:
        return []
    body = []
    for task_set, tasks in facts.scores.items():
        stated = facts.task_sets[task_set]
        shown: Mapping[str, Mapping[str, Any]] = tasks
        if stated.get("pooled"):
            shown = {f"all {len(stated['tasks'])}": dict(pooled(tasks))}
        body += [
            [task_set, task, *metric_and_form(metric), _shots(stated), count(figure["n"]), with_error(figure, 3)]
            for task, metrics in shown.items()
            for metric, figure in metrics.items()
            if metric.startswith(CUT_OFF) or is_shown(",".join(metric.split(",")[:2]), stated)
        ]
    licenses = []
    for name, stated in facts.task_sets.items():
        revision = f"; revision {stated['revision']}" if stated["revision"] else ""
        licenses.append(f"{name}: {stated['license']} ({stated['license_evidence']}{revision})")
    return [
        "Means over items, ± standard error. Decontamination searched the training data for these items. Examples are "
        "those shown before each question. In conversation, the question goes through the model's chat template, and "
        f"what stands after the thinking is scored; `{CUT_OFF}` is the share of answers that were cut off in their "
        "thinking, which are wrong.",
        "",
        *table(["set", "task", "metric", "asked", "examples", "items", "score"], body),
        "",
        f"Licenses of the data: {'; '.join(licenses)}.",
    ]


def metric_and_form(metric: str) -> tuple[str, str]:
    """Returns the name of a metric of `scores.json` of the stage harness for people, and how the model was asked."""
    name, kind, *form = metric.split(",")
    return name if kind == "none" else f"{name}, {kind}", "in conversation" if form else "as plain text"


def _shots(stated: Mapping[str, Any]) -> str:
    shots = stated.get("shots")
    return "the task's" if shots is None else str(shots)


def benchmark_changes(model: ModelFacts) -> list[str]:
    """Returns how this model and those before it differ on task sets; none if one model was measured."""
    # A card compares with earlier models alone.
    latest = when(model.name())
    rows = [row for row in model.harness.changes if when(row["after"]) <= latest] if model.harness else []
    body = [
        [
            f"{title(row['before'])} → {title(row['after'])}",
            f"{row['set']}: {row['task']}" if row["task"] else row["set"],
            *metric_and_form(row["metric"]),
            f"{row['change']['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})",
            row["verdict"],
        ]
        for row in rows
    ]
    sentence = (
        "Differences on the same items, with their 95 % interval. Inside the noise there is no clear change. Of twenty "
        "changes without any effect, one is expected to look like one."
    )
    return explained_table(sentence, ["models", "set", "metric", "asked", "change", "verdict"], body)


def variant_loss(facts: VariantFacts) -> list[str]:
    """Returns the loss of a variant, measured on the same documents and problems as the original."""
    loss = facts.loss
    divergence, greedy, bits, accuracy = loss["divergence"], loss["greedy"], loss["bits_per_byte"], loss["accuracy"]
    positions = f"{divergence['same_likeliest']:.4f} of {count(divergence['positions'])} positions"
    body = [
        ["bytes of the weights", count(loss["bytes"]["original"]), count(loss["bytes"]["variant"])],
        ["bits per byte", with_error(bits["original"], 4), with_error(bits["variant"], 4)],
        ["exact match", with_error(accuracy["original"], 3), with_error(accuracy["variant"], 3)],
        ["divergence, mean in nats", "", f"{divergence['value']:.2e} ± {divergence['se']:.1e}"],
        ["divergence, largest in nats", "", f"{divergence['max']:.2e}"],
        ["same likeliest token", "", positions],
        ["same greedy answer", "", f"{greedy['equal']} of {greedy['n']} problems"],
    ]
    return [*table(["measure", "original", "variant"], body), "", f"Measured by {loss['measured_by']}."]


# What answers are, by the name of their share in a log.
FILTERED = ("tasks", "never", "always", "kept")
ENDS = {"truncated": "cut off by the length limit", "looping": "cut off in a loop"}


def variants(by_suffix: Mapping[str, VariantFacts]) -> list[str]:
    """Returns the variants of a model, by the end of their repository's name; nothing without any."""
    body = []
    for name, facts in by_suffix.items():
        loss = facts.loss
        figures = [f"{loss['divergence']['value']:.2e}", with_error(loss["accuracy"]["variant"], 3)]
        equal = f"{loss['greedy']['equal']} of {loss['greedy']['n']}"
        body.append([f"`…{name}`", loss["title"], count(loss["bytes"]["variant"]), *figures, equal])
    sentence = (
        "Each is a repository of its own, whose name is this one's with the ending; its card says how it was measured."
    )
    head = ["repository", "weights", "bytes", "mean divergence in nats", "exact match", "same greedy answers"]
    return explained_table(sentence, head, body)


def variant_serving(facts: VariantFacts) -> list[str]:
    return [facts.variant.serving]


def verdict(model: ModelFacts) -> list[str]:
    """Returns the last measurement of the experts in a sentence, and a warning if some of them are dead."""
    if not model.has_experts:
        return []
    # Not every phase has measured its experts.
    measured = [(phase, log.experts) for phase, log in model.training.items() if log.experts]
    if not measured:
        return ["Where the routers sent the tokens was not measured."] if model.training else []
    phase, last = measured[-1]
    total, dead = sum(len(row) for row in last["share"]), len(last["dead"])
    place = f"At step {count(last['step'])} of {title(phase, PHASES)}, the last one measured"
    busiest = max(share * len(row) for row in last["share"] for share in row)
    load = f"the busiest expert of a layer got {busiest:.2f} times a fair share of its tokens"
    if not dead:
        return [f"{place}, none of the {count(total)} experts was dead, and {load}."]
    # A dead expert gets hardly any token: its weights take memory and do next to nothing.
    names = ", ".join(f"layer {layer}, expert {expert}" for layer, expert in last["dead"][:MOST_DEAD])
    others = f" and {count(dead - MOST_DEAD)} others" if dead > MOST_DEAD else ""
    return [
        f"**Alarm: {count(dead)} of {count(total)} experts {'is' if dead == 1 else 'are'} dead.** {place}, hardly any "
        f"token was sent to {names}{others}; {load}."
    ]


def termination(model: ModelFacts) -> list[str]:
    """Returns how the answers of each phase ended that learns from them, and a warning if a share rose too high."""
    body, alarms = [], []
    for phase, log in model.training.items():
        for name, row in log.termination.items():
            highest = f"{row['highest']:.1%} (step {count(row['step'])})"
            body.append([title(phase, PHASES), ENDS[name], f"{row['first']:.1%}", f"{row['last']:.1%}", highest])
            if row["above"] and row["limit"] is not None:
                alarms.append(
                    f"- **Alarm: more than {row['limit']:.1%} of the answers were {ENDS[name]} in "
                    f"{count(row['above'])} of the steps of {title(phase, PHASES)}.**"
                )
    if not body:
        return []
    sentence = (
        "Shares of the answers that training drew, as means over the first and the last quarter of the steps. An "
        "answer loops if it is cut off while it ends with three copies of the same tokens, two of them or more "
        "(Holtzman et al., 2020)."
    )
    lines = explained_table(sentence, ["phase", "answers", "first", "last", "highest"], body)
    return [*lines, "", *alarms] if alarms else lines


def task_filter(model: ModelFacts) -> list[str]:
    """Returns the tasks that each phase left out because the policy before it solved them always or never."""
    body = []
    for phase, log in model.training.items():
        totals = {name: sum(row[name] for row in log.filtered.values()) for name in FILTERED}
        rows = {**log.filtered, "all": totals} if log.filtered else {}
        for name, row in rows.items():
            numbers = [count(row[column]) for column in FILTERED]
            body.append([title(phase, PHASES), f"`{name}`" if name != "all" else name, *numbers])
    if not body:
        return []
    sentence = (
        "The policy before the phase answered each task several times. One that it solves never or always has no "
        "answer that is better than another; the phase uses the tasks that were kept. The rates are in "
        "`pass_rates.json` of the dataset repository."
    )
    return explained_table(sentence, ["phase", "tasks", "number", "never solved", "always solved", "kept"], body)


def merges(model: ModelFacts) -> list[str]:
    """Returns one sentence for each phase whose checkpoints were averaged: the steps, and the bits per byte of both."""
    lines = []
    bits = {name: with_error(scores["bits_per_byte_all"], 3) for name, scores in model.scores.items()}
    for name, last in bits.items():
        merge = model.merges.get(trained_by(name))
        if merge is None or not name.startswith(UNMERGED):
            continue
        steps = [count(step) for step in merge["steps"]]
        lines.append(
            f"- The weights after {title(trained_by(name), PHASES)} are the average of its checkpoints at steps "
            f"{', '.join(steps[:-1])} and {steps[-1]}: {bits[name.removeprefix(UNMERGED)]} bits per byte of held-out "
            f"text, and {last} of the last checkpoint alone."
        )
    return lines


def merge_effects(effects: Mapping[str, Figure]) -> list[str]:
    """Returns the change of bits per byte by averaging, one line for each phase; nothing without any."""
    if not effects:
        return []
    lines = [f"- {title(phase, PHASES)}: {row['value']:+.4f} ± {row['se']:.4f}" for phase, row in effects.items()]
    sentence = (
        "Bits per byte of held-out text of the average, less those of the last checkpoint on the same documents; less "
        "is better. ± one standard error of this difference."
    )
    return [sentence, "", *lines]


def spikes(model: ModelFacts) -> list[str]:
    """Returns a line for each spike, one for the steps that the recipe excludes, and one for phases without either."""
    lines, without = [], []
    for phase, log in model.training.items():
        name = title(phase, PHASES)
        for spike in log.spikes:
            documents = len(spike["documents"])
            batch_size = f"{count(documents)} document{'s' if documents != 1 else ''}"
            lines.append(
                f"- {name}, step {count(spike['step'])}: {spike['reason']}; action {spike['action']}: "
                f"{_skipped_steps(spike['excluded'])}; the batch that spiked held {batch_size}."
            )
        if log.excluded:
            lines.append(f"- {name}: {_skipped_steps(log.excluded)}, because the recipe says so.")
        if not log.spikes and not log.excluded:
            without.append(f"{name} ({count(log.first)} to {count(log.last)})")
    if without:
        lines.append(f"- No step was skipped in: {', '.join(without)}.")
    return lines


def _skipped_steps(numbers: list[int]) -> str:
    """Returns words on the skipped steps: `steps 3 to 5, 9 moved no weight`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][-1] + 1:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    steps = ", ".join(" to ".join(map(count, span)) for span in spans)
    return f"step{'s' if len(numbers) > 1 else ''} {steps} moved no weight"


def start(model: ModelFacts) -> list[str]:
    """Returns the published model that training began with; none without one."""
    if model.base is None:
        return []
    first = "Training" if model.on_published else "Pre-training"
    sentence = f"{first} began with the weights and the tokenizer of a published model, with a fresh optimizer:"
    if model.is_copy:
        sentence = "These are the weights and the tokenizer of a published model:"
    base = {name: escaped(model.base[name]) for name in ("repo", "license", "digest")}
    return [
        sentence,
        "",
        f"- model: `{base['repo']}`",
        f"- license of its weights: {base['license']}",
        f"- digest of its `SHA256SUMS`: `{base['digest']}`",
    ]
