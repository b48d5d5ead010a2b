"""The content of `site/index.html`, from the facts of a release and `page.html.jinja`.

The page is one file without scripts. It shows tables and pictures of the cards, and bounded samples of the rest with
links to the files, so its size does not depend on the number of documents.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.core.text import escaped, short
from release.cards import card_tables, caveats, plots, tables
from release.facts.data_facts import DataFacts
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import read_json
from release.facts.run_facts import Checkpoint, Costs, Trained
from release.layout import GATES, MODEL, REFERENCES, STANDARDS, when
from release.opened_release import Release
from release.schema import ReleaseInfo
from release.web_page import lineage, markdown_html, samples
from release.web_page.markdown_html import file_link
from stages.evaluation.scores import VERDICTS

FOLDER = Path(__file__).parent
TEMPLATE = "page.html.jinja"
STARTS, ARTIFACTS = 40, 200
"""Starts of training that the page lists, the last ones, and artifacts, the first ones by name."""
TRAINING = "evidence/training"
PICTURES = {
    plots.LOSS: "Loss of each step of the phases that read text, and mean reward of the others",
    plots.EXPERTS: "Tokens of each expert, and balance and entropy of the routers",
    plots.PROGRESS: "Bits per byte and right answers after each phase",
    plots.INFERENCE: "Right answers by the tokens generated for a problem",
    plots.REINFORCEMENT: "Validation by the tokens generated in reinforcement learning",
}
"""{plot of the final model: what it shows}"""
NO_REPLAYS = Markup(
    '<p id="replays">None is in this copy, which was sealed before anybody replayed it. The Space of the page on the '
    "Hub has those that came later.</p>"
)
"""What a release says of replays by others; its Space has a table in this place."""


@dataclass(frozen=True)
class PageFacts:
    """What the page shows.

    Attributes:
        folder: The release.
        release: Its own statement.
        data: The facts of its data.
        models: The facts of its models by folder, the final one first.
        checkpoints: Its checkpoints.
        products: Its artifacts, by node.
        documents: Some kept documents.
        answers: Some items of each set of the evaluation, with the answers of all models.
        contamination: The items that share the most with the training data.
        sizes: The model after pre-training, and its smaller ones if there are any.
        costs: The cost of each stage.
    """

    folder: Path
    release: ReleaseInfo
    data: DataFacts
    models: Mapping[str, ModelFacts]
    checkpoints: list[Checkpoint]
    products: Mapping[str, lineage.Product]
    documents: list[samples.Document]
    answers: list[samples.Sample]
    contamination: samples.Contamination | None
    sizes: list[Trained]
    costs: Costs

    @property
    def final(self) -> ModelFacts:
        return self.models[MODEL]

    @property
    def phases(self) -> list[str]:
        """The phases with a log, in the order of training."""
        logs = (self.folder / TRAINING).glob("*/training.jsonl")
        return sorted((path.parent.name for path in logs), key=when)

    def segments(self) -> list[tuple[str, int, int]]:
        """(phase, step, step) of checkpoints of a phase that follow each other."""
        pairs = itertools.pairwise(self.checkpoints)
        return [(after.phase, before.step, after.step) for before, after in pairs if before.phase == after.phase]


def read_facts(release: Release) -> PageFacts:
    """Reads what the page of a release shows."""
    return PageFacts(
        folder=release.root,
        release=release.info,
        data=release.data,
        models=release.models,
        checkpoints=release.checkpoints,
        products=lineage.read_products(release),
        documents=samples.read_documents(release.root, release.data),
        answers=samples.read_samples(release.root),
        contamination=samples.read_contamination(release.root),
        sizes=release.sizes,
        costs=release.costs,
    )


def render(facts: PageFacts) -> str:
    """Returns the page, which may load nothing and runs nothing."""
    import jinja2  # which `verify` needs for this alone

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "file": file_link, "count": tables.count, "short": short, "shown": escaped, "lines": _lines,
        "breakable": _breakable,
    }  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        release=facts.release,
        folder=facts.folder,
        tiles=_tiles(facts),
        caveats=_caveats(facts),
        measured=_measured(facts),
        sources=_sources(facts),
        composition=_picture(facts.folder, f"dataset/{plots.COMPOSITION}", "Kept tokens by source and by license"),
        seen=markdown_html.blocks(
            tables.order(facts.data),
            {tables.title(phase, tables.PHASES): f"dataset/order/{phase}/meta.json" for phase in facts.data.order},
        ),
        data_tables=_sections(card_tables.DATA_TABLES, facts.data, DATA_SHOWN),
        removals=samples.read_removals(facts.folder / "dataset"),
        removal_table=_removal_table,
        by_reference=REFERENCES if facts.data.by_reference else "",
        pictures=_pictures(facts),
        sizes=_sizes(facts),
        contaminated=_sections(card_tables.MODEL_TABLES, facts.final, CONTAMINATION_SHOWN),
        worst=_worst(facts),
        verdicts={"right": "✓ right", "partly": "◐ in part", "wrong": "✗ wrong"},
        graph=lineage.drawing(facts.products),
        artifacts=_artifacts(facts),
        gates=read_json(facts.folder / GATES),
        replays=NO_REPLAYS,
        starts=_starts(facts),
        cost=_cost(facts),
        energy=read_json(facts.folder / STANDARDS / "energy.json"),
    )


def runs_nothing(text: str) -> bool:
    """Returns True if a page begins as those of this atom do, whose policy allows no script, and has none."""
    head = (FOLDER / TEMPLATE).read_text(encoding="utf-8").partition("<title>")[0]
    lower = text.lower()
    return text.startswith(head) and "<script" not in lower and lower.count("<meta") == head.count("<meta")


def _breakable(name: str) -> Markup:
    """A name that a narrow window breaks after a slash or an underscore only."""
    return Markup("<wbr>").join(re.split("(?<=[/_])", escaped(name, 80)))


def _lines(text: str, longest: int = 2_000) -> str:
    """A text in its own lines, cut, with unprintable characters escaped."""
    cut = text if len(text) <= longest else f"{text[:longest]}…"
    return "\n".join(map(escaped, cut.splitlines()))


def _picture(folder: Path, path: str, caption: str) -> Markup:
    """A picture of the release in the page itself, with a link to its file; nothing without the file."""
    if not (folder / path).is_file():
        return Markup()
    data = base64.b64encode((folder / path).read_bytes()).decode()
    return Markup(
        '<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}. {}</figcaption></figure>'
    ).format(data, caption, caption, file_link(path))


def _pictures(facts: PageFacts) -> list[Markup]:
    """The plots of the final model, and those of training of the models that other phases made."""
    shown = [_picture(facts.folder, f"{MODEL}/{name}", caption) for name, caption in PICTURES.items()]
    for name, model in facts.models.items():
        if not model.training.keys() <= facts.final.training.keys():
            shown.append(_picture(facts.folder, f"{name}/{plots.LOSS}", f"The same of {model.name()}"))
    return [picture for picture in shown if picture]


def _tiles(facts: PageFacts) -> list[tuple[str, str, Markup]]:
    """(figure, its meaning, a link to its file) for the head of the page."""
    data, final = facts.data, facts.final
    documents = sum(row.documents_in for row in data.sources.values())
    kept = sum(row.kept for row in data.sources.values())
    tokens = sum(f.tokens for order in data.order.values() for part in order.parts for f in part.by_source.values())
    active = f", {short(final.parameters.active)} active for a token" if final.has_experts else ""
    tiles = [
        (short(final.parameters.total), f"parameters{active}", file_link(f"{MODEL}/config.json", "config.json")),
        (short(tokens), "tokens predicted in training", file_link("dataset/order/", "order")),
        (
            f"{short(kept)} of {short(documents)}", "documents kept of those read",
            file_link("dataset/summary.json", "summary.json"),
        ),
    ]  # fmt: skip
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


def _caveats(facts: PageFacts) -> Markup:
    sentences = [
        *caveats.caveat_sentences(facts.final),
        *caveats.data_of_regressions(facts.final.scores, facts.data.order),
    ]
    return markdown_html.blocks(sentences)


MODEL_SHOWN = {
    "headline": "This model, the one before it, and the base model",
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
    sections = _sections(card_tables.MODEL_TABLES, facts.final, MODEL_SHOWN, dict.fromkeys(IN_PLAIN_TEXT, scores))
    for model in facts.models.values():
        if model is not facts.final:
            title = {"prediction": f"Prediction and result of {model.name()}"}
            sections += _sections(card_tables.MODEL_TABLES, model, title)
    return sections


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


def _removal_table(removal: samples.Removal) -> Markup:
    """The samples of a rule; a duplicate names the document that stayed."""
    rows: list[list[str]] = [["document", "source", "bytes", "measured", "threshold", "because of"]]
    for row in removal.samples:
        numbers = ["" if row[name] is None else tables.number(row[name]) for name in ("bytes", "value", "threshold")]
        reason = row["duplicate_of"] or row["match"] or ""
        rows.append([_foreign(row["id"]), _foreign(row["source"]), *numbers, _foreign(reason)])
    return markdown_html.table(rows)


def _foreign(text: str) -> Markup:
    """A text of a document as one cell, which is no Markdown and keeps its direction to itself."""
    return Markup('<bdi dir="auto">{}</bdi>').format(escaped(text, 120))


def _worst(facts: PageFacts) -> Markup:
    """The items that share the most with the training data."""
    if (found := facts.contamination) is None:
        return Markup()
    head = ["item", "kind", "split", "words", *found.phases, "longest run, words", "overlap"]
    return markdown_html.table([head, *([_foreign(id), _foreign(kind), *cells] for id, kind, *cells in found.rows)])


def _artifacts(facts: PageFacts) -> Markup:
    """The artifacts with what they were made from; the first ones, if there are many."""
    products = [product for product in facts.products.values() if not product.checkpoint]
    rows: list[list[str]] = [["artifact", "stage", "made from", "seconds", "failed attempts", "statement"]]
    for product in products[:ARTIFACTS]:
        manifest = file_link(f"{lineage.MANIFESTS}/{product.node}.json", product.node)
        inputs = ", ".join(dict.fromkeys(sorted(product.inputs.values())))
        statement = file_link(product.statement, "statement") if product.statement else "none"
        figures = [f"{product.seconds:,.1f}", tables.count(product.failed)]
        rows.append([manifest, product.stage, escaped(inputs, 400), *figures, statement])
    left_out = len(products) - ARTIFACTS
    note = f"{tables.count(left_out)} others have statements as well." if left_out > 0 else ""
    return markdown_html.table(rows) + markdown_html.blocks(filter(None, [note]))


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
    return markdown_html.blocks(tables.cost(facts.costs))
