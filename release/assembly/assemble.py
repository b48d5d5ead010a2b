"""Fills a release folder: copies of the files of a run's artifacts, and the files that follow from them.

`release.published_files` says what may be written and where it comes from; STEPS write it, each what the later ones
read. With the manifests and statements beside them, every byte leads back to a statement.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import source_code
from pipeline.core.errors import AtomError
from pipeline.core.parts import part_number
from pipeline.core.source_code import PACKAGES
from pipeline.core.store import Artifact
from release import layout, merkle, references
from release.cards import croissant, plots, render, results
from release.checks import loading
from release.checks.check import BuildContext, LoadReport
from release.checks.tool_files import OWN_VERIFIER
from release.facts import model_facts, run_facts, runtimes
from release.facts.forecast import FILE, FOLDER
from release.facts.forecast import MODEL as MODEL_PREDICTED
from release.facts.message_tables import write_messages
from release.facts.model_facts import rendered_chat
from release.facts.published_tables import to_json
from release.facts.run_facts import index_rows
from release.layout import (
    ATTRIBUTION,
    CANARY,
    CODE_README,
    GOLDENS,
    IMPORT,
    MODEL,
    ORIGINS,
    RECIPE,
    REFERENCES,
    RELEASE,
    ROOTS,
    RUNTIMES,
    SECOND_VERIFIER,
    STATEMENTS,
    WITHOUT_ORDER,
    folders_of,
    models_of,
    phases_of,
)
from release.opened_release import Release
from release.published_files import (
    CODE_FILES,
    code_license_text,
    earlier_placements,
    license_text,
    made,
    origin_of_copy,
    placements,
)
from release.references import Reference
from release.schema import CARDS, FORMAT, NodeArtifact, ReleaseInfo, stated_by_recipe
from release.standards import attestations, bundle, standard_facts
from release.standards.standard_facts import read_facts
from release.tracing.receipts import receipt_path, write_receipts
from stages.data.acquire.licenses.expressions import asks_for_attribution
from stages.data.curate.secret_patterns import find_secret
from stages.evaluation.settings import EvaluationSection
from stages.formats.table import CREDITS, NOTICES, row_writer, stream_batches, stream_rows, table_writer

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class BuildInput:
    """All inputs of a release. The engine fills it; the build does not depend on graphs or recipe schemas.

    Attributes:
        name: Name of the release.
        version: Version of the release.
        recipe: The resolved recipe as JSON, with its sections `evaluation` and `release`.
        recipe_files: {path below code/as-run: content} of the recipe as run.
        artifacts: By node.
        statements: In-toto statement files, including those of failed attempts.
        metrics: metrics.jsonl by node.
        environment: Versions of the build.
        code_root: The folder with the packages.
        commit: Commit of the checkout, if it is one.
        dirty: Whether that checkout has uncommitted changes.
        stale: Nodes made by code that has changed since.
        earlier: By key, artifacts of earlier runs that training resumed from, and their inputs.
        machine_paths: Folders of this machine that no published file may name.
        references: Sources whose texts are by reference, by name.
        previous: Folder of an earlier release, with which cards compare.
        prediction: The artifact that was sealed before training, and its statement.
    """

    name: str
    version: str
    recipe: dict[str, Any]
    recipe_files: dict[str, bytes]
    artifacts: dict[str, Artifact]
    statements: list[Path]
    metrics: dict[str, Path]
    environment: dict[str, Any]
    code_root: Path
    commit: str | None = None
    dirty: bool = False
    stale: list[str] = field(default_factory=list)
    earlier: dict[str, Artifact] = field(default_factory=dict)
    machine_paths: list[Path] = field(default_factory=list)
    references: Mapping[str, Reference] = field(default_factory=dict)
    previous: Path | None = None
    prediction: tuple[Artifact, Path] | None = None


class Draft:
    """A release folder that is being built.

    Attributes:
        folder: The folder.
        source: The inputs.
        progress: Is told each step.
        release: The folder as a release; a property of it may be read once the files that it reads are there.
        origins: {path: origin}, the content of origins.json.
        load_reports: {model folder: what plain transformers makes of it}
    """

    def __init__(self, folder: Path, source: BuildInput, progress: Callable[[str], None] = lambda text: None) -> None:
        self.folder = folder
        self.source = source
        self.progress = progress
        self.release = Release(folder)
        self.origins: dict[str, dict[str, str]] = {}
        self.load_reports: dict[str, LoadReport] = {}

    def copy_of_artifact(self, node: str, artifact: Artifact, file: str, target: str) -> None:
        """Copies a file of an artifact; a table of documents by reference without its texts."""
        # The license or the size of a source by reference does not allow to publish its texts.
        origin = origin_of_copy(node, artifact, file, target, self.source.references)
        path = self._free(target)
        if "generated" in origin:
            references.write_without_text(artifact / file, path)
        else:
            shutil.copyfile(artifact / file, path)
        self.origins[target] = origin

    def copy(self, source: Path, target: str, **details: str) -> None:
        """Copies a file that is not part of an artifact: code, statements, metrics."""
        shutil.copyfile(source, self._free(target))
        self.state(target, **details)

    def write(self, target: str, data: bytes, **details: str) -> None:
        """Writes a file. details: for the words of its origin."""
        self._free(target).write_bytes(data)
        self.state(target, **details)

    def json(self, target: str, value: Any, sort_keys: bool = True) -> None:
        """Writes a JSON file."""
        self.write(target, to_json(value, sort_keys))

    def state(self, target: str, **details: str) -> None:
        """States the origin of a file that is in the folder. Raises AtomError for a path of no published file."""
        entry = made(target)
        if entry is None:
            raise AtomError(f"{target} is no file of a release; give it a name as others have")
        self.origins[target] = {"generated": entry.origin.format(**details)}

    def _free(self, target: str) -> Path:
        """Returns the place of a new file, in a folder that exists."""
        if target in self.origins:
            raise AtomError(f"two files of the release want to be {target}; rename one of them")
        path = self.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def require_nodes(artifacts: Mapping[str, Artifact]) -> None:
    """Raises AtomError with the missing nodes that a release requires."""
    trained_here = () if IMPORT in artifacts else ("pretrain", "midtrain", "export-init", "export-mid")
    phases = phases_of({*artifacts, *trained_here})
    models = models_of({*artifacts, *trained_here, "export-base"})
    ordered = [phase for phase in phases if phase not in WITHOUT_ORDER]
    required_nodes = ["items", "dedup", "tokenizer", "tokenize", *(f"order-{phase}" for phase in ordered), *phases]
    required_nodes += [f"{kind}-{model}" for kind in ("export", "evaluate") for model in models]
    if missing := [node for node in required_nodes if node not in artifacts]:
        raise AtomError(f"the release needs the artifact of {missing[0]}, which is not sealed; finish the run first")


def assemble(folder: Path, source: BuildInput, progress: Callable[[str], None]) -> BuildContext:
    """Writes everything except the results of the gates, the page and the checksums."""
    draft = Draft(folder, source, progress)
    # The facts of the release are read as soon as a step needs them, and then kept.
    for step in STEPS:
        step(draft)
    evaluation = EvaluationSection.model_validate(source.recipe["evaluation"]).model_dump()
    return BuildContext(draft.release, evaluation, source.machine_paths, draft.load_reports)


def place_artifacts(draft: Draft) -> None:
    """Places the manifests of all artifacts, and copies of their published files."""
    artifacts, earlier = draft.source.artifacts, draft.source.earlier
    for name, artifact in sorted({**artifacts, **earlier}.items()):
        draft.copy(artifact.path / "manifest.json", f"evidence/manifests/{name}.json", key=artifact.key)
    for node, file, target in placements(artifacts):
        draft.copy_of_artifact(node, artifacts[node], file, target)
    for key, file, target in earlier_placements(earlier):
        draft.copy_of_artifact(key, earlier[key], file, target)


def _place_code(draft: Draft) -> None:
    """Places the source files of the packages of atom and the files that build them."""
    root = draft.source.code_root
    for name in PACKAGES:
        if not (root / name).is_dir():
            raise AtomError(f"the package {name} is not in {root}; the release must hold the code that made it")
        for path in source_code.sources(root, name):
            draft.copy(path, f"code/{path.relative_to(root).as_posix()}")
    for path in [root / name for name in CODE_FILES] + sorted(root.glob("constraints*.txt")):
        if path.is_file():
            draft.copy(path, f"code/{path.name}")
    text = code_license_text(root)
    if text is not None and "code/LICENSE" not in draft.origins:
        draft.write("code/LICENSE", text)
        draft.origins["code/LICENSE"] = {"generated": "license text of the installed distribution"}
    for name, content in sorted(draft.source.recipe_files.items()):
        draft.write(f"code/as-run/{name}", content)


def _place_prediction(draft: Draft) -> None:
    """Places a prediction with its manifest and statement in the evidence, and a copy beside the predicted model."""
    if draft.source.prediction is None:
        return
    artifact, statement = draft.source.prediction
    draft.copy(artifact / FILE, f"{FOLDER}/{FILE}", key=artifact.key)
    draft.copy(artifact.path / "manifest.json", f"{FOLDER}/manifest.json", key=artifact.key)
    draft.copy(statement, f"{FOLDER}/statement.json")
    folder = folders_of(models_of(draft.source.artifacts))[MODEL_PREDICTED]
    draft.copy(artifact / FILE, f"{folder}/{FILE}", key=artifact.key)


def _place_evidence(draft: Draft) -> None:
    """Places what the run recorded, and describes the release."""
    source = draft.source
    for path in sorted(source.statements):
        draft.copy(path, f"{STATEMENTS}/{path.name}")
    for node, path in sorted(source.metrics.items()):
        draft.copy(path, f"evidence/metrics/{node}.jsonl")
    draft.json("evidence/environment.json", source.environment)
    draft.json(RECIPE, source.recipe)
    draft.copy(OWN_VERIFIER, SECOND_VERIFIER)
    draft.json(RELEASE, describe(source).to_json())
    # The facts are read from release.json in the folder, so it is written before.
    draft.write(CODE_README, render.code_readme(draft.release.info).encode())


def describe(source: BuildInput) -> ReleaseInfo:
    """Returns the content of evidence/release.json: what the release is, and what was not clean when it was built."""
    return ReleaseInfo(
        format=FORMAT,
        card_schema=CARDS,
        **stated_by_recipe(source.recipe),
        commit=source.commit,
        dirty=source.dirty,
        stale=tuple(sorted(source.stale)),
        nodes={node: NodeArtifact(a.key, a.digest) for node, a in sorted(source.artifacts.items())},
    )


def _write_data_tables(draft: Draft) -> None:
    """Writes the tables of the dataset that follow from the kept documents."""
    source, dataset = draft.source, draft.release.dataset
    if source.references:
        stated: dict[str, Any] = {
            "sources": {name: each.model_dump(mode="json") for name, each in source.references.items()}
        }
        if reasons := source.recipe["release"].get("publish_generated"):
            stated["generated"] = reasons
        draft.json(f"dataset/{REFERENCES}", stated)
    prefix = "acquire-"
    acquired = {node.removeprefix(prefix): a.path for node, a in source.artifacts.items() if node.startswith(prefix)}
    for tables in (write_attribution(dataset, acquired), write_messages(dataset)):
        for table in tables:
            draft.state(table.relative_to(draft.folder).as_posix())


def _write_receipts(draft: Draft) -> None:
    """Writes the receipts of opt-outs."""
    release = draft.release
    for request, receipt in write_receipts(release.dataset, release.info, release.data.opt_outs):
        draft.json(receipt_path(request), receipt)


def _write_changes(draft: Draft) -> None:
    """Writes what changed since the release that --previous names."""
    if draft.source.previous is not None:
        compared = run_facts.compare_with_previous(
            draft.source.previous, draft.source.recipe, draft.release.models[MODEL]
        )
        draft.json(run_facts.CHANGES_FILE, compared)


def _write_models(draft: Draft) -> None:
    """Writes the scores, plots and goldens of each model."""
    release, models = draft.release, draft.release.models
    data_id = render.data_id(release.info)
    # A process of its own loads the models while the plots are drawn: both take long.
    with ThreadPoolExecutor(1) as pool:
        reports = pool.submit(loading.load_models, release.model_folders)
        for name, model in models.items():
            if model.is_chat:
                repo = f"{release.info.repository}{name.removeprefix(MODEL)}"
                config = model_facts.serve_config(draft.folder / name, repo, release.info.version)
                draft.write(f"{name}/{model_facts.SERVE_FILE}", config.encode())
            measured = results.text(model, data_id, release.info.version)
            draft.write(f"{name}/{results.results_path(data_id)}", measured.encode())
            for plot_name, draw in plots.model_plots(draft.folder / name, model).items():
                draft.write(f"{name}/{plot_name}", draw())
        draft.load_reports = dict(zip(models, reports.result(), strict=True))
    for name, report in draft.load_reports.items():
        draft.json(f"{name}/{GOLDENS}", report.goldens, sort_keys=False)  # a template renders fields in their order
        models[name].rendered_chat = rendered_chat(report.goldens)  # the facts were read before there were goldens


def _write_runtimes(draft: Draft) -> None:
    """Writes what other programs make of the fixed inputs."""
    if all(report.goldens for report in draft.load_reports.values()):  # else the gate on loading says why
        draft.json(RUNTIMES, runtimes.compare_all(draft.folder, draft.progress))


def _describe_data(draft: Draft) -> None:
    """Writes the description and the Merkle roots of the tables, which are complete now."""
    release = draft.release
    draft.json(f"dataset/{CANARY}", release.canary)
    draft.json(f"dataset/{ROOTS}", merkle.roots(release.dataset))
    draft.json(f"dataset/{croissant.NAME}", croissant.describe_dataset(release.info, release.dataset, release.data))
    for target, statement in attestations.evaluations(release).items():
        draft.json(target, statement)
    draft.json("checkpoints/index.json", index_rows(release.checkpoints))


def _write_cards(draft: Draft) -> None:
    """Writes the card and the license of each repository."""
    for place, card in render.render_all(draft.release):
        draft.write(place, card.encode())
    for repository in draft.release.repositories:
        spdx = draft.release.license_of(repository.folder)
        text = license_text(spdx, draft.release.info.license.code, draft.source.code_root)
        draft.write(f"{repository.folder}/LICENSE".lstrip("/"), text)


def _write_standards(draft: Draft) -> None:
    """Writes the bundle of standards, which describes the other files."""
    packages = standard_facts.describe_packages(standard_facts.package_versions(draft.release), draft.source.code_root)
    draft.json(bundle.RECORDED, packages)
    facts = read_facts(draft.release)
    readers = {row.get("reader") for row in facts.declared.values()}
    if readers & set(bundle.STDLIB) and (text := bundle.python_license()) is not None:
        draft.write(f"dataset/{bundle.PYTHON_LICENSE}", text)
    for path, make in bundle.DOCUMENTS.items():
        draft.write(path, make(facts))


def _write_origins(draft: Draft) -> None:
    # Stated before the file is written, so that it lists itself.
    draft.state(ORIGINS)
    (draft.folder / ORIGINS).write_bytes(to_json(draft.origins))


STEPS: tuple[Callable[[Draft], None], ...] = (
    place_artifacts,
    _place_code,
    _place_prediction,
    _place_evidence,
    _write_data_tables,
    _write_receipts,
    _write_changes,
    _write_models,
    _write_runtimes,
    _describe_data,
    _write_cards,
    _write_standards,
    _write_origins,
)
"""In their order: each reads what the earlier ones wrote."""


COLUMNS = {name: "string" for name in ("id", "source", "license", "title", "author", "origin")}


def write_attribution(dataset: Path, acquired: Mapping[str, Path]) -> Iterator[Path]:
    """Writes the tables for each part of a source with such documents, and yields their paths.

    Memory holds some thousand rows, the names of a part's packages, and the digests of all notices.

    Args:
        dataset: The dataset folder.
        acquired: The artifact of acquire of each source.

    Raises:
        AtomError: The credits in an artifact are not those of the documents.
    """
    written = set[str]()
    for source, files in layout.kept_files(dataset).items():
        # A source without such licenses has no table at all.
        if not any(_asking(batch) for path in files for batch in stream_batches(path, ["license"])):
            continue
        for path in files:
            table, packages = dataset / ATTRIBUTION / path.relative_to(dataset / "kept"), set[str]()
            with table_writer(table, COLUMNS) as write:
                for rows in _attributed(path, _stream(acquired.get(source), "credits", path, CREDITS)):
                    # The id of a document of a package is source/package/file.
                    packages.update(id.partition("/")[2].partition("/")[0] for id in rows["id"].to_pylist())
                    write(rows)
            yield table
            if (notices := _stream(acquired.get(source), "notices", path, NOTICES)) is not None:
                table = dataset / layout.NOTICES / source / path.name
                with row_writer(table, NOTICES) as write_row:
                    for row in notices:
                        if row["package"] in packages:
                            # Thousands of packages share a few texts of licenses: each is written once.
                            write_row({**row, "text": "" if row["sha256"] in written else row["text"]})
                            written.add(row["sha256"])
                yield table


def _asking(batch: pa.RecordBatch) -> list[str]:
    """Returns the licenses of documents that ask for attribution."""
    return [license for license in batch["license"].unique().to_pylist() if asks_for_attribution(license)]


def _attributed(path: Path, credits: Iterator[Any] | None) -> Iterator[pa.Table]:
    """Yields the rows of a table of kept documents whose licenses ask for attribution.

    `credits` are those of the documents of the part, in their order.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in stream_batches(path, ["id", "source", "license", "origin"]):
        asking = pa.array(_asking(batch), batch["license"].type)
        rows = pa.Table.from_batches([batch.filter(pc.is_in(batch["license"], value_set=asking))])
        stated = [_credit(credits, id, path) if credits else {} for id in rows["id"].to_pylist()]
        for name in ("title", "author"):
            # An author's field may hold a key by mistake, and no release may publish one.
            values = [None if find_secret(credit.get(name)) else credit.get(name) for credit in stated]
            rows = rows.append_column(name, pa.array(values, pa.string()))
        yield rows


def _stream(acquired: Path | None, name: str, path: Path, columns: Mapping[str, str]) -> Iterator[Any] | None:
    """Returns the rows of a table of acquire that belong to one part of a table of kept documents.

    None if the source has no such table.
    """
    if acquired is None or part_number(path) is None:
        return None
    table = acquired / name / path.name
    return stream_rows(table, list(columns)) if table.exists() else None


def _credit(credits: Iterator[Any], id: str, path: Path) -> Any:
    credit = next((row for row in credits if row["id"] == id), None)
    if credit is None:
        raise AtomError(f"no credits of document {id} are among those of {path.name}; run acquire of its source again")
    return credit
