"""The content of `site/index.html`, from the facts of a release and `page.html.jinja`."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from pipeline.core.text import escaped
from release import schema
from release.assembly import costs
from release.assembly.checkpoint_facts import Checkpoint, read_checkpoints
from release.assembly.data_facts import DataFacts, read_data_facts
from release.assembly.model_facts import ModelFacts, read_model_facts
from release.assembly.published_tables import read_json
from release.assembly.size_facts import Trained, read_sizes
from release.cards import card_tables, caveats, composition, tables
from release.layout import GATES, MODEL, REFERENCES, STANDARDS, order_of, when
from release.repositories import model_folders
from release.schema import ReleaseInfo
from release.web_page import charts, curves, lineage, markdown_html, removals
from release.web_page.markdown_html import file_link
from release.web_page.outputs import ITEMS_PER_PART, Written
from release.web_page.script_parts import embedded
from stages.evaluation.scores import VERDICTS, pass_at_1

FOLDER = Path(__file__).parent
STARTS = 40
"""Starts of training that the page lists, the last ones."""
SCRIPT, STYLE, TEMPLATE = "page.js", "page.css", "page.html.jinja"


@dataclass(frozen=True)
class PageFacts:
    """What the page shows beside its parts. models: by folder, the final one first. logs, phase_curves: by phase, in
    the order of training. sizes: the model after pre-training, and its smaller ones if there are any."""

    folder: Path
    release: ReleaseInfo
    data: DataFacts
    models: Mapping[str, ModelFacts]
    checkpoints: list[Checkpoint]
    logs: Mapping[str, Path]
    phase_curves: Mapping[str, curves.PhaseCurves]
    products: Mapping[str, lineage.Product]
    outputs: list[Written]
    contamination: tuple[list[str], int]
    file_parts: int
    sizes: list[Trained]

    @property
    def final(self) -> ModelFacts:
        return self.models[MODEL]

    @property
    def phases(self) -> list[str]:
        """All phases, in the order of training."""
        names = {*self.logs, *(row.phase for row in self.checkpoints)}
        return sorted(names | set(self.data.order), key=when)

    def segments(self) -> list[tuple[str, int, int]]:
        """(phase, step, step) of checkpoints of a phase that follow each other."""
        pairs = itertools.pairwise(self.checkpoints)
        return [(after.phase, before.step, after.step) for before, after in pairs if before.phase == after.phase]


def read_facts(folder: Path, outputs: list[Written], contamination: tuple[list[str], int], files: int) -> PageFacts:
    release = schema.read_release(folder)
    logs = {path.parent.name: path for path in (folder / "evidence/training").glob("*/training.jsonl")}
    logs = {phase: logs[phase] for phase in sorted(logs, key=when)}
    return PageFacts(
        folder=folder,
        release=release,
        data=read_data_facts(folder / "dataset"),
        models={name: read_model_facts(folder / name) for name in model_folders(folder)},
        checkpoints=read_checkpoints(folder / "checkpoints"),
        logs=logs,
        phase_curves={phase: curves.read_curves(log) for phase, log in logs.items()},
        products=lineage.read_products(folder, release),
        outputs=outputs,
        contamination=contamination,
        file_parts=files,
        sizes=read_sizes(folder),
    )


def render(facts: PageFacts) -> str:
    """The page. It is allowed to run its own script and to load scripts beside it, and nothing else."""
    import jinja2  # which `verify` needs for this alone

    script, style = sources()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "file": file_link, "count": tables.count, "short": charts.short, "shown": escaped,
        "breakable": _breakable,
    }  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        release=facts.release,
        folder=facts.folder,
        policy=policy(script, style),
        script=Markup(script),
        style=Markup(style),
        data=Markup(embedded(_embedded_data(facts))),
        tiles=_tiles(facts),
        glance=_glance(facts),
        caveats=_caveats(facts),
        measured=_measured(facts),
        sources=_sources(facts),
        composition=[charts.bars(title, rows, "tokens") for title, rows in composition.amounts(facts.data).items()],
        seen=markdown_html.blocks(
            tables.order(facts.data),
            {tables.title(phase, tables.PHASES): f"dataset/order/{phase}/meta.json" for phase in facts.data.order},
        ),
        data_tables=_sections(card_tables.DATA_TABLES, facts.data, DATA_SHOWN),
        removals=removals.read_removals(facts.folder / "dataset"),
        removal_table=_removal_table,
        by_reference=REFERENCES if facts.data.by_reference else "",
        phases=_phases(facts),
        axes=_axes(facts),
        sizes=_sizes(facts),
        contaminated=_sections(card_tables.MODEL_TABLES, facts.final, CONTAMINATION_SHOWN),
        graph=lineage.drawing(facts.products),
        gates=read_json(facts.folder / GATES),
        starts=_starts(facts),
        cost=_cost(facts),
        energy=read_json(facts.folder / STANDARDS / "energy.json"),
    )


def _breakable(name: str) -> Markup:
    """A name that a narrow window breaks after a slash or an underscore only."""
    return Markup("<wbr>").join(re.split("(?<=[/_])", escaped(name, 80)))


def sources() -> tuple[str, str]:
    """The script and the style sheet of a page."""
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in (SCRIPT, STYLE))
    return script, style


def policy(script: str, style: str) -> str:
    """The content security policy of a page with this script and style sheet."""
    return (
        f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_hash(style)}; "
        f"script-src {_hash(script)} 'self'"
    )


def has_own_script(text: str) -> bool:
    """Returns True if a page begins with the policy of this atom, and has its script and style sheet and no others."""
    script, style = sources()
    template = (FOLDER / TEMPLATE).read_text(encoding="utf-8")
    before = template.partition("{{ policy }}")[0]
    head = f'{before}{escape(policy(script, style))}">'
    own = [f"<script>{script}</script>", f"<style>{style}</style>", '<script type="application/json" id="data">']
    lower, known = text.lower(), script.lower()
    return (
        text.startswith(head)
        and all(text.count(part) == 1 for part in own)
        and lower.count("<script") == known.count("<script") + 2
        and lower.count("http-equiv") == known.count("http-equiv") + 1
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded_data(facts: PageFacts) -> dict[str, Any]:
    """What the script of the page reads."""
    trained = [(model.name(), list(model.training)[-1], name) for name, model in facts.models.items() if model.training]
    phases, items = facts.contamination
    return {
        "repository": facts.release.repository,
        "tag": facts.release.tag,
        "phases": facts.phases,
        "checkpoints": [[row.phase, row.step, order_of(row.phase)] for row in facts.checkpoints],
        "models": sorted(trained, key=lambda row: when(row[0])),
        "outputs": [vars(row) for row in facts.outputs],
        "contamination": {"phases": phases, "items": items, "perPart": ITEMS_PER_PART},
        "fileParts": facts.file_parts,
    }


def _tiles(facts: PageFacts) -> list[tuple[str, str, Markup]]:
    """(figure, its meaning, a link to its file) for the head of the page."""
    data, final = facts.data, facts.final
    documents = sum(row.documents_in for row in data.sources.values())
    kept = sum(row.kept for row in data.sources.values())
    tokens = sum(f.tokens for order in data.order.values() for part in order.parts for f in part.by_source.values())
    active = f", {charts.short(final.parameters.active)} active for a token" if final.has_experts else ""
    tiles = [
        (charts.short(final.parameters.total), f"parameters{active}", file_link(f"{MODEL}/config.json", "config.json")),
        (charts.short(tokens), "tokens predicted in training", file_link("dataset/order/", "order")),
        (
            f"{charts.short(kept)} of {charts.short(documents)}", "documents kept of those read",
            file_link("dataset/summary.json", "summary.json"),
        ),
    ]  # fmt: skip
    first, last = next(iter(data.evaluation)), final.name()
    for name, title in (("bits_per_byte_all", "bits per byte of held-out text"), ("accuracy_all", "exact match")):
        values = [f"{data.evaluation[model][name]['value']:.3f}" for model in (first, last)]  # type: ignore[literal-required]
        link = file_link(f"dataset/evaluation/{last}/scores.json", "scores.json")
        tiles.append((" → ".join(values), f"{title}, from {first} to {last}", link))
    rates = pass_at_1(data.chat.get("test", {}))
    if last in rates:
        link = file_link(f"dataset/evaluation/test/{last}/scores.json", "scores.json")
        tiles.append((f"{rates[last]['value']:.3f}", "pass@1 in conversation: drawn answers that are right", link))
    if (report := final.contamination) is not None:
        splits = [verdicts for split, verdicts in report["items"].items() if split != "validation"]
        totals = [f"{sum(verdicts[name] for verdicts in splits):,} {name}" for name in VERDICTS]
        link = file_link("dataset/evaluation/contamination/report.json", "report.json")
        tiles.append((", ".join(totals), "test items, compared with the training data", link))
    gates = read_json(facts.folder / GATES)
    outcomes = Counter(gate["ok"] for gate in gates.values())
    skipped = f", {outcomes[None]} not judged" if outcomes[None] else ""
    figure = f"{outcomes[True]} of {len(gates)}"
    tiles.append((figure, f"gates passed{skipped}", file_link(GATES, "gates.json")))
    return tiles


def _glance(facts: PageFacts) -> Markup:
    """One row for each model, one column for each overall score; each value links to its file."""
    data = facts.data
    rates = {name: pass_at_1(data.chat.get(name, {})) for name in ("test", "fresh")}
    wins = data.chat.get("preferences", {})
    head = ["model", "bits per byte, held-out text (less is better)", "exact match"]
    head += [title for name, title in (("test", "pass@1, test"), ("fresh", "pass@1, new problems")) if rates[name]]
    head += ["wins against the model before"] if wins else []
    rows: list[list[str]] = []
    titles = tables.titles(data.evaluation)
    for model, scores in data.evaluation.items():
        path = f"dataset/evaluation/{model}/scores.json"
        row: list[str] = [titles[model], _value(scores["bits_per_byte_all"], path, 4)]
        row.append(_value(scores["accuracy_all"], path, 3, share=True))
        for name in ("test", "fresh"):
            if rates[name]:
                known = rates[name].get(model)
                path = f"dataset/evaluation/{name}/{model}/scores.json"
                row.append(_value(known, path, 3, share=True) if known else "not measured")
        if wins:
            path = f"dataset/evaluation/preferences/{model}/scores.json"
            row.append(_value(wins[model]["win_rate"], path, 3, share=True) if model in wins else "not measured")
        rows.append(row)
    return markdown_html.table([head, *rows])


def _value(figure: Any, path: str, digits: int, share: bool = False) -> Markup:
    """A value with its standard error or its interval, linked to its file; a share has a bar with 95 %."""
    value, se = figure["value"], figure["se"]
    low, high = figure.get("low", value - 1.96 * se), figure.get("high", value + 1.96 * se)
    link = Markup('<a class="file value" href="../{}" data-path="{}">{} ± {}</a>').format(
        path, path, f"{value:.{digits}f}", f"{se:.{digits}f}"
    )
    return link + charts.interval_bar(value, low, high) if share else link


def _caveats(facts: PageFacts) -> Markup:
    sentences = [
        *caveats.caveat_sentences(facts.final),
        *caveats.data_of_regressions(facts.final.scores, facts.data.order),
    ]
    return markdown_html.blocks(sentences)


MODEL_SHOWN = {
    "evaluation": "Every measure, every model", "chat_test": "In conversation, on the test problems",
    "chat_fresh": "In conversation, on problems that are newer than the weights",
    "preferences": "Which answers the preference reward prefers", "reward_parts": "Parts of the preference reward",
    "passkeys": "Keys found in texts of each length",
    "positions": "Bits per token by position",
    "prediction": "Prediction and result", "given_away": "Memorization: the training data that it repeats",
    "harness": "Task sets of lm-evaluation-harness", "samples": "What was measured", "architecture": "Architecture",
    "context": "Context", "parity": "The export against the trainer", "start": "Where training began",
}  # fmt: skip
"""{table of the cards: its title on the page}"""
DATA_SHOWN = {
    "document_licenses": "Licenses of the documents", "licenses": "Evidence for each license",
    "by_reference": "Texts by reference", "attribution": "Attribution", "synthetic": "Synthetic text",
    "languages": "Languages", "lengths": "Lengths", "quality_scores": "Quality scores", "packing": "Packed rows",
    "long_documents": "Long documents", "opt_outs": "Opt-outs", "filter_agreement": "Agreement of the filters",
}  # fmt: skip
CONTAMINATION_SHOWN = {
    "contamination": "Items by their overlap with the training data",
    "clean_scores": "Scores on all items and on those that share nothing with it", "detector": "The detector",
}  # fmt: skip


IN_PLAIN_TEXT = ("evaluation", "passkeys", "positions")
"""Tables of MODEL_SHOWN whose columns are from `dataset/evaluation/<model>/scores.json`."""


def _measured(facts: PageFacts) -> list[tuple[str, Markup]]:
    titles = tables.titles(facts.data.evaluation)
    scores = {title: f"dataset/evaluation/{model}/scores.json" for model, title in titles.items()}
    return _sections(card_tables.MODEL_TABLES, facts.final, MODEL_SHOWN, dict.fromkeys(IN_PLAIN_TEXT, scores))


def _sections(
    registered: Any, facts: Any, titles: Mapping[str, str], links: Mapping[str, Mapping[str, str]] | None = None
) -> list[tuple[str, Markup]]:
    """(title, content) of the tables that are not empty, in the order of `titles`. links: by table."""
    lines, links = card_tables.lines_by_table(registered, facts), links or {}
    return [
        (title, markdown_html.blocks(lines[name], links.get(name))) for name, title in titles.items() if lines.get(name)
    ]


def _sources(facts: PageFacts) -> Markup:
    links = {name: f"dataset/sources/{name}.json" for name in facts.data.sources}
    return markdown_html.blocks(tables.sources(facts.data), links)


def _removal_table(removal: removals.Removal) -> Markup:
    """The samples of a rule; a duplicate names the document that stayed, which a click searches."""
    rows: list[list[str]] = [["document", "source", "bytes", "measured", "threshold", "because of"]]
    for row in removal.samples:
        reason = Markup("")
        if row["duplicate_of"]:
            reason = Markup('<button class="link" type="button" data-query="{}">{}</button>').format(
                row["duplicate_of"], escaped(row["duplicate_of"], 120)
            )
        elif row["match"]:
            reason = Markup("{}").format(escaped(row["match"], 120))
        numbers = ["" if row[name] is None else tables.number(row[name]) for name in ("bytes", "value", "threshold")]
        name = Markup('<bdi dir="auto">{}</bdi>').format(escaped(row["id"], 120))
        rows.append([name, Markup("{}").format(escaped(row["source"], 80)), *numbers, reason])
    return markdown_html.table(rows)


def _phases(facts: PageFacts) -> list[dict[str, Any]]:
    """Of each phase: its charts, the load of its experts at the end, and the path of its log."""
    rows = []
    for phase, drawn in facts.phase_curves.items():
        experts = curves.expert_table(drawn)
        table = None
        if experts is not None:
            step, layers = experts
            width = max(len(loads) for _, loads in layers)
            head = ["layer", *(f"expert {n}" for n in range(width))]
            table = step, markdown_html.table([head, *([str(n), *(f"{x:.2f}" for x in row)] for n, row in layers)])
        path = facts.logs[phase].relative_to(facts.folder).as_posix()
        rows.append({"name": phase, "charts": curves.phase_charts(drawn), "experts": table, "path": path})
    return rows


def _axes(facts: PageFacts) -> list[Markup]:
    drawn = [
        curves.text_axis(facts.phase_curves),
        curves.sizes_axis(facts.phase_curves, [size.name for size in facts.sizes]),
        curves.reinforcement_axis(facts.phase_curves),
        curves.inference_axis(facts.folder / "dataset/evaluation/test"),
        curves.ladder_axis(facts.models.values()),
    ]
    return [each for each in drawn if each]


def _sizes(facts: PageFacts) -> Markup:
    """The recipe's model after pre-training and its smaller ones, each with a link to its weights."""
    head = ["model", "settings that differ", "parameters", "active", "tokens", "held-out loss", "weights"]
    rows: list[list[str]] = [head]
    for size in facts.sizes:
        settings = ", ".join(f"{name} = {value}" for name, value in sorted(size.settings.items()))
        figures = [tables.count(number) for number in (size.total, size.active, size.tokens)]
        cells = [size.name, escaped(settings, 400), *figures, f"{size.loss:.4f}"]
        rows.append([*cells, file_link(f"{size.checkpoint}/", f"step {size.steps}")])
    return markdown_html.table(rows) if facts.sizes else Markup()


def _starts(facts: PageFacts) -> Markup:
    """Every recorded start of training, and how many steps it repeated with equal results."""
    rows: list[list[str]] = [["phase", "start", "went on from step", "steps repeated", "that differed", "statement"]]
    for node, product in facts.products.items():
        for start in product.starts if not product.checkpoint else ():
            replayed = start.get("replayed")
            lines, deviating = (replayed.get("lines") or 0, replayed.get("deviating") or 0) if replayed else (0, 0)
            step = start.get("restored_step")
            cells = [
                str(start["start"]), "its beginning" if step is None else tables.count(step),
                tables.count(lines), tables.count(deviating),
            ]  # fmt: skip
            rows.append([node, *cells, file_link(product.statement, "statement")])
    if len(rows) < 2:
        return Markup()
    left_out = len(rows) - 1 - STARTS
    note = f"{tables.count(left_out)} starts before these are in the statements" if left_out > 0 else ""
    return markdown_html.table([rows[0], *rows[1:][-STARTS:]]) + markdown_html.blocks(filter(None, [note]))


def _cost(facts: PageFacts) -> Markup:
    return markdown_html.blocks(tables.cost(costs.usage_by_stage(facts.folder)))
