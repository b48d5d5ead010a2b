"""The content of `site/index.html`, from the facts of a release and `page.html.jinja`.

The page is one file without scripts. It shows tables and pictures of the cards, and bounded samples of the rest with
links to the files, so its size does not depend on the number of documents.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.core.text import escaped, short
from pipeline.core.yaml_text import read_trusted
from release import scratch
from release.cards import card_tables, caveats, plots, tables
from release.facts.data_facts import DataFacts
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import read_json
from release.facts.run_facts import Checkpoint, Costs, Trained, cost_rows
from release.layout import GATES, MODEL, PAGE, REFERENCES, SITE, STANDARDS, when
from release.opened_release import Release
from release.schema import ReleaseInfo
from release.web_page import markdown_html, samples
from release.web_page.markdown_html import file_link
from stages.evaluation.scores import VERDICTS

FOLDER = Path(__file__).parent
TEMPLATE = "page.html.jinja"
ARTIFACTS = 200
"""Artifacts that the page lists, the first ones by name."""
TRAINING = "evidence/training"
TITLES: dict[str, dict[str, str]] = read_trusted(FOLDER / "titles.yaml")
"""Titles of tables of the cards and captions of plots, in the order of the page."""
IN_PLAIN_TEXT = ("evaluation", "passkeys", "context_gain", "text_items")
"""Tables of the model whose columns are from `dataset/evaluation/<model>/scores.json`."""
NO_REPLAYS = Markup(
    '<p id="replays">None is in this copy, which was sealed before anybody replayed it. The Space of the page on the '
    "Hub has those that came later.</p>"
)
"""The words of a release on replays by others; its Space has a table in this place."""


@dataclass(frozen=True)
class PageFacts:
    """The facts that the page shows.

    Attributes:
        folder: The release.
        release: Its own statement.
        data: The facts of its data.
        models: The facts of its models by folder, the final one first.
        checkpoints: Its checkpoints.
        products: Its artifacts, by node.
        documents: Some kept documents.
        answers: Some items of each set of the evaluation, with the answers of all models.
        sizes: The model after pre-training, and its smaller ones if there are any.
        costs: The cost of each stage.
    """

    folder: Path
    release: ReleaseInfo
    data: DataFacts
    models: Mapping[str, ModelFacts]
    checkpoints: list[Checkpoint]
    products: Mapping[str, samples.Product]
    documents: list[samples.Document]
    answers: list[samples.Sample]
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
        """Returns (phase, step, step) of checkpoints of a phase that follow each other."""
        pairs = itertools.pairwise(self.checkpoints)
        return [(after.phase, before.step, after.step) for before, after in pairs if before.phase == after.phase]


def read_facts(release: Release) -> PageFacts:
    """Reads the facts that the page of a release shows."""
    return PageFacts(
        folder=release.root,
        release=release.info,
        data=release.data,
        models=release.models,
        checkpoints=release.checkpoints,
        products=samples.read_products(release),
        documents=samples.read_documents(release.root, release.data),
        answers=samples.read_samples(release.root),
        sizes=release.sizes,
        costs=release.costs,
    )


def render(facts: PageFacts) -> str:
    """Returns the page, which may load nothing and runs nothing."""
    import jinja2  # which `verify` needs for this alone

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        # A misspelled name in the template ends the build instead of leaving a gap.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"file": file_link, "count": tables.count, "short": short, "shown": escaped}
    environment.globals |= {"lines": _lines, "breakable": _breakable}
    return environment.get_template(TEMPLATE).render(
        facts=facts,
        release=facts.release,
        folder=facts.folder,
        # What it is, and whether it is any good.
        tiles=_tiles(facts),
        caveats=markdown_html.blocks(caveats.caveat_sentences(facts.final)),
        measured=_measured(facts),
        # Data, removals and documents.
        sources=_sources(facts),
        seen=markdown_html.blocks(
            tables.order(facts.data),
            {tables.title(phase, tables.PHASES): f"dataset/order/{phase}/meta.json" for phase in facts.data.order},
        ),
        data_tables=_sections(card_tables.DATA_TABLES, facts.data, TITLES["data"]),
        removals=samples.read_removals(facts.folder / "dataset"),
        removal_table=_removal_table,
        by_reference=REFERENCES if facts.data.by_reference else "",
        # Training.
        pictures=_pictures(facts),
        sizes=_sizes(facts),
        # Contamination and outputs.
        contaminated=_sections(card_tables.MODEL_TABLES, facts.final, TITLES["contamination"]),
        verdicts={"right": "✓ right", "partly": "◐ in part", "wrong": "✗ wrong"},
        # Lineage, verification and costs.
        artifacts=_artifacts(facts),
        gates=read_json(facts.folder / GATES),
        replays=NO_REPLAYS,
        cost=_cost(facts),
        energy=read_json(facts.folder / STANDARDS / "energy.json"),
    )


def runs_nothing(text: str) -> bool:
    """Returns True if a page begins as those of this atom do, whose policy allows no script, and has none."""
    # The head has the policy that forbids scripts; a second one could not loosen it, but a changed one could.
    head = (FOLDER / TEMPLATE).read_text(encoding="utf-8").partition("<title>")[0]
    lower = text.lower()
    # In lower case, since HTML does not tell the cases of a tag apart.
    return text.startswith(head) and "<script" not in lower and lower.count("<meta") == head.count("<meta")


def _breakable(name: str) -> Markup:
    """Returns a name that a narrow window breaks after a slash or an underscore only."""
    return Markup("<wbr>").join(re.split("(?<=[/_])", escaped(name, 80)))


def _lines(text: str, longest: int = 2_000) -> str:
    """Returns a text in its own lines, cut, with unprintable characters escaped."""
    cut = text if len(text) <= longest else f"{text[:longest]}…"
    return "\n".join(map(escaped, cut.splitlines()))


def _picture(folder: Path, path: str, caption: str) -> Markup:
    """Returns a picture of the release in the page itself, with a link to its file; nothing without the file."""
    if not (folder / path).is_file():
        return Markup()
    # Embedded, because the page's policy loads nothing.
    data = base64.b64encode((folder / path).read_bytes()).decode()
    return Markup(
        '<figure><img src="data:image/png;base64,{}" alt="{}"><figcaption>{}. {}</figcaption></figure>'
    ).format(data, caption, caption, file_link(path))


def _pictures(facts: PageFacts) -> list[Markup]:
    """Returns the plots of the final model, and those of training of the models that other phases made."""
    shown = [_picture(facts.folder, f"{MODEL}/{name}", caption) for name, caption in TITLES["plots"].items()]
    for name, model in facts.models.items():
        # The final model's plot shows the phases that led to it; branches need their own.
        if not model.training.keys() <= facts.final.training.keys():
            shown.append(_picture(facts.folder, f"{name}/{plots.LOSS}", f"The same of {model.name()}"))
    return [picture for picture in shown if picture]


def _tiles(facts: PageFacts) -> list[tuple[str, str, Markup]]:
    """Returns (figure, its meaning, a link to its file) for the head of the page."""
    data, final = facts.data, facts.final
    documents = sum(row.documents_in for row in data.sources.values())
    kept = sum(row.kept for row in data.sources.values())
    tokens = sum(f.tokens for order in data.order.values() for part in order.parts for f in part.by_source.values())
    active = f", {short(final.parameters.active)} active for a token" if final.has_experts else ""
    shares, link = f"{short(kept)} of {short(documents)}", file_link("dataset/summary.json", "summary.json")
    tiles = [
        (short(final.parameters.total), f"parameters{active}", file_link(f"{MODEL}/config.json", "config.json")),
        (short(tokens), "tokens predicted in training", file_link("dataset/order/", "order")),
        (shares, "documents kept of those read", link),
    ]
    if (report := final.contamination) is not None:
        # Items for validation are no test.
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


def _measured(facts: PageFacts) -> list[tuple[str, Markup]]:
    titles = tables.titles(facts.data.evaluation)
    # Columns of these tables link to the file with the scores of their model.
    scores = {title: f"dataset/evaluation/{model}/scores.json" for model, title in titles.items()}
    sections = _sections(card_tables.MODEL_TABLES, facts.final, TITLES["model"], dict.fromkeys(IN_PLAIN_TEXT, scores))
    for model in facts.models.values():
        if model is not facts.final:
            # Only a prediction is about another model than the final one.
            title = {"prediction": f"Prediction and result of {model.name()}"}
            sections += _sections(card_tables.MODEL_TABLES, model, title)
    return sections


def _sections(
    registered: Any, facts: Any, titles: Mapping[str, str], links: Mapping[str, Mapping[str, str]] | None = None
) -> list[tuple[str, Markup]]:
    """Returns (title, content) of the tables that are not empty, in the order of `titles`. `links` are by table."""
    lines, links = card_tables.lines_by_table(registered, facts), links or {}
    return [
        (title, markdown_html.blocks(lines[name], links.get(name))) for name, title in titles.items() if lines.get(name)
    ]


def _sources(facts: PageFacts) -> Markup:
    links = {name: f"dataset/sources/{name}.json" for name in facts.data.sources}
    return markdown_html.blocks(tables.sources(facts.data), links)


def _removal_table(removal: samples.Removal) -> Markup:
    """Returns the samples of a rule; a duplicate names the document that stayed."""
    rows: list[list[str]] = [["document", "source", "bytes", "measured", "threshold", "because of"]]
    for row in removal.samples:
        numbers = ["" if row[name] is None else tables.number(row[name]) for name in ("bytes", "value", "threshold")]
        reason = row["duplicate_of"] or row["match"] or ""
        rows.append([_foreign(row["id"]), _foreign(row["source"]), *numbers, _foreign(reason)])
    return markdown_html.table(rows)


def _foreign(text: str) -> Markup:
    """Returns a text of a document as one cell, which is no Markdown and keeps its direction to itself."""
    return Markup('<bdi dir="auto">{}</bdi>').format(escaped(text, 120))


def _artifacts(facts: PageFacts) -> Markup:
    """Returns the artifacts with those that they were made from; the first ones, if there are many."""
    products = [product for product in facts.products.values() if not product.checkpoint]
    rows: list[list[str]] = [["artifact", "stage", "made from", "seconds", "failed attempts", "statement"]]
    for product in products[:ARTIFACTS]:
        manifest = file_link(f"{samples.MANIFESTS}/{product.node}.json", product.node)
        inputs = ", ".join(dict.fromkeys(sorted(product.inputs.values())))
        statement = file_link(product.statement, "statement") if product.statement else "none"
        figures = [f"{product.seconds:,.1f}", tables.count(product.failed)]
        rows.append([manifest, product.stage, escaped(inputs, 400), *figures, statement])
    left_out = len(products) - ARTIFACTS
    notes = [f"{tables.count(left_out)} others have statements as well."] if left_out > 0 else []
    return markdown_html.table(rows) + markdown_html.blocks(notes)


def _sizes(facts: PageFacts) -> Markup:
    """Returns the recipe's model after pre-training and its smaller ones, each with a link to its weights."""
    head = ["model", "settings that differ", "parameters", "active", "tokens", "held-out loss", "bits per byte"]
    rows: list[list[str]] = [[*head, "weights"]]
    for size in facts.sizes:
        settings = ", ".join(f"{name} = {value}" for name, value in sorted(size.settings.items()))
        figures = [tables.count(number) for number in (size.total, size.active, size.tokens)]
        bits = tables.with_error(size.bits, 3) if size.bits else "not measured"
        cells = [size.name, escaped(settings, 400), *figures, f"{size.loss:.4f}", bits]
        rows.append([*cells, file_link(f"{size.checkpoint}/", f"step {size.steps}")])
    return markdown_html.table(rows) if facts.sizes else Markup()


def _cost(facts: PageFacts) -> Markup:
    """Returns the cost of each stage."""
    head = ["stage", "attempts", "of these failed", "core hours", "GPU hours", "energy, Wh"]
    return markdown_html.table([head, *cost_rows(facts.costs)])


def write(release: Release, out: Path) -> None:
    """Writes the folder `site` of a release; `out` may exist."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(render(read_facts(release)), encoding="utf-8")


def problems(release: Release) -> list[str]:
    """Returns the files of the published page that are not what the release gives."""
    with scratch.folder() as folder:
        write(release, folder / SITE)
        return list(differences(release.root / SITE, folder / SITE))


def foreign_scripts(release: Release) -> list[str]:
    """Returns a sentence about a page that could run something: no page of this atom has a script."""
    if runs_nothing((release.root / PAGE).read_text("utf-8", "replace")):
        return []
    return [f"{PAGE} has a script, or another policy about scripts than the page of this atom"]


def differences(published: Path, expected: Path) -> Iterator[str]:
    """Yields a sentence about each file below two folders that differs."""
    files, expected_files = (
        {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for folder in (published, expected)
    )
    for path in sorted(files.keys() | expected_files.keys()):
        if path not in files:
            yield f"{SITE}/{path} is missing"
        elif path not in expected_files:
            yield f"{SITE}/{path} is no part of the page"
        elif files[path].read_bytes() != expected_files[path].read_bytes():
            yield f"{SITE}/{path} is not what the release gives"
