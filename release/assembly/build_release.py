"""`atom build`: from a run's artifacts to a release folder that has passed its gates.

No clock, host or path enters it except those in the statements and metrics, so a second build from the same run has the
same bytes. The folder is written beside its place and renamed after every gate has passed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact

if TYPE_CHECKING:
    from release.checks.check import BuildContext
    from release.checks.load_report import LoadReport
    from release.facts.assemble import Assembly
    from release.opened_release import Release
    from release.references import Reference
    from release.schema import ReleaseInfo
    from stages.data.curation.deny_list import DenyList

CARD_ORIGIN = "card from the published files"
OUTCOMES = {True: "passed", False: "FAILED", None: "not judged"}
"""The words for the result of a gate."""


@dataclass(frozen=True)
class BuildInput:
    """All inputs of a release. The engine fills it; this module does not depend on graphs or recipe schemas.

    recipe: the resolved recipe as JSON, with its sections `evaluation` and `release`. artifacts: by node name.
    earlier: by key, artifacts of earlier runs that training resumed from, and their inputs.
    statements: in-toto statement files, including those of failed attempts. metrics: metrics.jsonl by node.
    environment: versions. code_roots: folders with the packages. stale: nodes made by code that has changed since.
    machine_paths: folders of this machine that no published file may name. deny_list: of the data recipe. previous: the
    folder of an earlier release, in which receipts of opt-outs look for the documents. references: sources whose texts
    are by reference, by name. prediction: the artifact that was sealed before training, and its statement.
    """

    name: str
    version: str
    recipe: dict[str, Any]
    recipe_files: dict[str, bytes]
    artifacts: dict[str, Artifact]
    statements: list[Path]
    metrics: dict[str, Path]
    environment: dict[str, Any]
    code_roots: list[Path]
    commit: str | None = None
    dirty: bool = False
    stale: list[str] = field(default_factory=list)
    earlier: dict[str, Artifact] = field(default_factory=dict)
    machine_paths: list[Path] = field(default_factory=list)
    deny_list: DenyList | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    previous: Path | None = None
    prediction: tuple[Artifact, Path] | None = None


def build(source: BuildInput, home: Path, progress: Callable[[str], None] = lambda text: None) -> Path:
    """Writes `<home>/releases/<name>-<version>/` and returns it; an earlier one of that name is replaced. The index of
    its texts is written to `<home>/trace`.

    Raises AtomError if a part is missing, CheckFailed with the first failed gate; then the refused folder is kept as
    `<name>-<version>.refused` for inspection, and the earlier release is unchanged.
    """
    from release.cards import plots
    from release.checks import gates
    from release.facts import assemble
    from release.layout import SITE
    from release.web_page import site_files

    plots.require()
    assemble.require_nodes(source.artifacts)
    target = home / "releases" / f"{source.name}-{source.version}"
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    refused = target.with_name(f"{target.name}.refused")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        progress("copying artifacts, code and statements")
        context = _assemble(draft, source, progress)
        progress("checking the gates")
        results = gates.run_all(context)
        gates.write(context.release, results)
        failed = [gate for gate in results if gate.ok is False]
        if not failed:
            progress("writing the page")
            site_files.write(context.release, draft / SITE)
        write_checksums(draft)
        for gate in results:
            progress(f"gate {gate.name}: {OUTCOMES[gate.ok]}, {gate.detail}")
        shutil.rmtree(refused, ignore_errors=True)
        if failed:
            os.rename(draft, refused)
            remainder = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise CheckFailed(
                f"release {target.name} is refused by the gate {failed[0].name}: {failed[0].detail}{remainder}"
            )
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _index(target, home / "trace", progress)
    return target


def _index(release: Path, cache: Path, progress: Callable[[str], None]) -> None:
    """Builds the index for `atom trace --text`, outside of the release. The release is complete without it, so a
    missing index is reported and is no error."""
    from release import tracing

    try:
        if tracing.build_index(release, cache, progress) is None:
            progress("no index of texts: SQLite here has no FTS5 with trigrams; `atom trace --text` reads every text")
    except AtomError as error:
        progress(f"no index of texts: {error}")


def describe(source: BuildInput) -> ReleaseInfo:
    """evidence/release.json: what the release is, and what was not clean when it was built."""
    from release.schema import CARDS, FORMAT, NodeArtifact, ReleaseInfo, stated_by_recipe

    return ReleaseInfo(
        format=FORMAT,
        card_schema=CARDS,
        **stated_by_recipe(source.recipe),
        commit=source.commit,
        dirty=source.dirty,
        stale=tuple(sorted(source.stale)),
        nodes={node: NodeArtifact(a.key, a.digest) for node, a in sorted(source.artifacts.items())},
    )


def _assemble(folder: Path, source: BuildInput, progress: Callable[[str], None]) -> BuildContext:
    """Writes everything except the result of the gates and the checksums; returns the context of the gates."""
    from release import independent_verifier, merkle
    from release.assembly.attribution import write_attribution
    from release.cards import croissant, plots, render
    from release.checks.check import BuildContext
    from release.facts import assemble, changes, runtimes
    from release.facts.checkpoint_facts import index_rows
    from release.facts.message_tables import write_messages
    from release.layout import (
        CANARY,
        CODE_README,
        FILTER_AGREEMENT,
        MODEL,
        ORIGINS,
        RECIPE,
        REFERENCES,
        RELEASE,
        ROOTS,
        RUNTIMES,
        SECOND_VERIFIER,
    )
    from release.opened_release import Release
    from release.standards import attestations
    from release.tracing.receipts import receipt_path, write_receipts
    from stages.data.curation.agreement import read_figures

    opened = Release(folder)
    assembly = assemble.Assembly(folder, source.references)
    assemble.place_artifacts(assembly, source.artifacts, source.earlier)
    assemble.place_code(assembly, source.code_roots)
    for name, content in sorted(source.recipe_files.items()):
        assembly.write(f"code/as-run/{name}", content, "recipe file as run")
    if source.prediction is not None:
        assemble.place_prediction(assembly, *source.prediction, source.artifacts)
    for path in sorted(source.statements):
        assembly.include(path, f"evidence/statements/{path.name}", "statement of the ledger")
    for node, path in sorted(source.metrics.items()):
        assembly.include(path, f"evidence/metrics/{node}.jsonl", "timed metrics of the run")
    assembly.json("evidence/environment.json", source.environment, "environment of the build")
    assembly.json(RECIPE, source.recipe, "resolved recipe")
    assembly.include(Path(independent_verifier.__file__), SECOND_VERIFIER, "a second verifier, from docs/formats.md")
    release = describe(source)
    assembly.json(RELEASE, release.to_json(), "release.assembly.build_release")
    assembly.write(CODE_README, render.code_readme(release).encode(), "README of the code")

    if source.references:
        stated: dict[str, Any] = {
            "sources": {name: each.model_dump(mode="json") for name, each in source.references.items()}
        }
        if reasons := source.recipe["release"].get("publish_generated"):
            stated["generated"] = reasons
        assembly.json(f"dataset/{REFERENCES}", stated, "settings of the sources by reference")
    assembly.json(f"dataset/{FILTER_AGREEMENT}", read_figures(), "stages.data.curation.agreement")
    prefix = "acquire-"
    acquired = {node.removeprefix(prefix): a.path for node, a in source.artifacts.items() if node.startswith(prefix)}
    for table in write_attribution(folder / "dataset", acquired):
        assembly.register(table, "release.assembly.attribution")
    for table in write_messages(folder / "dataset"):
        assembly.register(table, "release.facts.message_tables")
    release, data = opened.info, opened.data
    receipts = write_receipts(folder / "dataset", release, data.opt_outs, source.previous, source.deny_list, progress)
    for request, receipt in receipts:
        assembly.json(receipt_path(request), receipt, "release.tracing.receipts")
    models = opened.models
    if source.previous is not None:
        changes_since = changes.compare(source.previous, source.recipe, models[MODEL])
        assembly.json(changes.FILE, changes_since, "comparison with the release that --previous names")
    licenses = release.license
    load_reports = _write_models(assembly, opened)
    if all(report.goldens for report in load_reports.values()):  # else the gate on loading says why
        runs = runtimes.compare_all(folder, progress)
        assembly.json(RUNTIMES, runs, "what other programs make of the fixed inputs")
    assembly.json(f"dataset/{CANARY}", opened.canary, "made from the digest of the evaluation items")
    assembly.json(f"dataset/{ROOTS}", merkle.roots(folder / "dataset"), "Merkle roots of the tables")
    description = croissant.describe_dataset(release, folder / "dataset", data)
    assembly.json(f"dataset/{croissant.NAME}", description, "description of the tables")
    for name, draw in plots.data_plots(data).items():
        assembly.write(f"dataset/{name}", draw(), "plot of the tables of kept documents")
    for target, statement in attestations.evaluations(opened).items():
        assembly.json(target, statement, "in-toto statement of what was measured")
    assembly.json("checkpoints/index.json", index_rows(opened.checkpoints), "states of the checkpoints")
    for place, card in render.render_all(opened):
        assembly.write(place, card.encode(), CARD_ORIGIN)
    for repository in opened.repositories:
        spdx = assemble.license_of(repository.folder, licenses, models)
        text = assemble.license_text(spdx, licenses.code, source.code_roots)
        assembly.write(f"{repository.folder}/LICENSE".lstrip("/"), text, "license")
    _write_standards(assembly, source, opened)
    assembly.origins[ORIGINS] = {"generated": "release.assembly.build_release"}
    (folder / ORIGINS).write_bytes(assemble.to_json(assembly.origins))
    evaluation = _evaluation(source.recipe)
    return BuildContext(opened, evaluation, source.machine_paths, load_reports)


def _write_models(assembly: Assembly, opened: Release) -> dict[str, LoadReport]:
    """Writes the scores, plots and goldens of each model. Returns what plain transformers makes of each: a
    process of its own loads them while the plots are drawn."""
    from release.cards import plots, render, results
    from release.checks.load_report import load_models
    from release.facts import serving
    from release.facts.model_facts import rendered_chat
    from release.layout import GOLDENS, MODEL

    folder, release, models = opened.root, opened.info, opened.models
    data_id = render.data_id(release)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_models, [folder / name for name in models])
        for name, model in models.items():
            if model.is_chat:
                repo = f"{release.repository}{name.removeprefix(MODEL)}"
                config = serving.serve_config(folder / name, repo, release.version)
                assembly.write(f"{name}/{serving.NAME}", config.encode(), "options of vLLM for this model")
            measured = results.text(model, data_id, release.version)
            assembly.write(
                f"{name}/{results.results_path(data_id)}", measured.encode(), "scores in evaluation/ for the Hub"
            )
            for plot_name, draw in plots.model_plots(folder / name, model).items():
                logs_alone = plot_name in (plots.LOSS, plots.EXPERTS)
                origin = (
                    "the logs in training/" if logs_alone else "the scores in evaluation/ and the logs in training/"
                )
                assembly.write(f"{name}/{plot_name}", draw(), f"plot of {origin}")
        reports = dict(zip(models, loading.result(), strict=True))
    for name, report in reports.items():  # a template renders the fields of a tool in their order
        origin = "what plain transformers makes of fixed inputs"
        assembly.json(f"{name}/{GOLDENS}", report.goldens, origin, sort_keys=False)
        models[name].rendered_chat = rendered_chat(report.goldens)  # the card shows it
    return reports


def _write_standards(assembly: Assembly, source: BuildInput, opened: Release) -> None:
    """Writes the bundle of standards, which describes the other files."""
    from release.standards import bundle, package_list
    from release.standards.standard_facts import read_facts

    packages = package_list.describe(package_list.versions(opened), source.code_roots)
    assembly.json(bundle.RECORDED, packages, "packages of the statements, with licenses and hashes")
    facts = read_facts(opened)
    readers = {row.get("reader") for row in facts.declared.values()}
    if readers & set(bundle.STDLIB) and (text := bundle.python_license()) is not None:
        assembly.write(f"dataset/{bundle.PYTHON_LICENSE}", text, "license of the interpreter's standard library")
    for path, make in bundle.DOCUMENTS.items():
        assembly.write(path, make(facts), "release.standards.bundle")


def _evaluation(recipe: dict[str, Any]) -> dict[str, Any]:
    from stages.evaluation.settings import EvaluationSection

    return EvaluationSection.model_validate(recipe["evaluation"]).model_dump()


def write_checksums(folder: Path) -> None:
    """Writes the file of each repository first, then the one over the whole release, then the root's, which covers that
    one too."""
    from release.checksums import write_sums
    from release.layout import ALL_SUMS, SUMS
    from release.repositories import files_below, files_of, repositories

    repos = repositories(folder)
    for repository in repos:
        if repository.folder:
            write_sums(folder / repository.folder / SUMS, folder / repository.folder, files_of(folder, repository))
    write_sums(folder / ALL_SUMS, folder, [p for p in files_below(folder) if p not in (SUMS, ALL_SUMS)])
    root_repository = next(repository for repository in repos if repository.folder == "")
    write_sums(folder / SUMS, folder, files_of(folder, root_repository))


def rewrite_page(release: Path, progress: Callable[[str], None] = lambda text: None) -> bool:
    """Makes the page of a release folder again, with the checksums that cover it. Returns True if the page changed.

    Raises:
        AtomError: If the release is signed and the page would change, or if documents were taken back from it.
        CheckFailed: If a file of it is damaged.
    """
    from release import scratch
    from release.layout import RETRACTED, SIGNATURE, SITE, SUMS
    from release.opened_release import Release
    from release.web_page import site_files

    if (release / RETRACTED).exists():
        raise AtomError(
            f"{release} lacks documents that were taken back, so that its figures and files disagree; it has no page"
        )
    with scratch.folder() as folder:
        progress("reading the release")
        try:
            site_files.write(Release(release), folder / SITE)
        except (ValueError, KeyError, TypeError) as error:  # of a damaged file
            raise CheckFailed(
                f"{release} cannot be read ({type(error).__name__}); `atom verify {release}` names the damaged files"
            ) from error
        if not any(site_files.differences(release / SITE, folder / SITE)) and (release / SUMS).exists():
            return False
        if (release / SIGNATURE).exists():
            raise AtomError(
                f"{release} is signed, and another page would break the signature of its root; remove "
                f"{release / SIGNATURE}, run this again, then `atom sign`"
            )
        (release / SUMS).unlink(missing_ok=True)  # a call that is cut off leaves none, and the next one completes it
        shutil.rmtree(release / SITE, ignore_errors=True)
        shutil.copytree(folder / SITE, release / SITE)
    write_checksums(release)
    return True


def _replace(draft: Path, target: Path) -> None:
    """Moves the draft to the place of the target; an earlier release is removed only after the new one is complete."""
    previous = target.with_name(f".{target.name}.old.{os.getpid()}")
    try:
        if target.exists():
            os.rename(target, previous)
        os.rename(draft, target)
    except OSError as error:
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        raise AtomError(f"release {target} cannot be put in place: {error}") from None
    shutil.rmtree(previous, ignore_errors=True)
