"""The checks that the builder and a stranger share: functions from published files to lists of problems.

They read nothing but the files of a release or of one pulled repository, and each sentence names the file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.core import provenance
from pipeline.core.errors import CheckFailed
from pipeline.core.provenance import BUILD_TYPE, PREDICATE, STATEMENT
from pipeline.core.store import Artifact, FileRow, digest_of, sha256_file
from release import schema
from release.assembly import attest, costs, metrics, training
from release.audit import merkle
from release.cards import croissant, plot, render, results, versions
from release.checks import formats
from release.layout import CANARY, GATES, GATES_STATED, ORIGINS, RELEASE, ROOTS
from release.repositories import files_below, model_folders, repositories

UNKNOWN_LICENSES = frozenset({"", "unknown", "noassertion", "none", "other"})
ARTIFACT_URI = "atom:artifact/"


class Absent(Exception):
    """What a check is about is not in a release of an older version."""


@dataclass
class Findings:
    """What came of a check with several parts.

    problems: sentences on what is bad. skipped: {part: a sentence why it was not compared}. detail: what was
    compared, if all holds. compared: whether any part was.
    """

    problems: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    detail: str = "holds"
    compared: bool = False

    def add(self, other: Findings, prefix: str = "") -> None:
        """Takes over what came of a part, whose sentences begin with the name of a file."""
        self.problems += [f"{prefix}{text}" for text in other.problems]
        self.compared = self.compared or other.compared
        self.skipped |= {part: reason for part, reason in other.skipped.items() if part not in self.skipped}

    def tables(self, card: str, table_lines: dict[str, list[str]], stated: schema.Stated) -> None:
        """The lines of tables, as far as a card of its version has them."""
        expected, skipped = versions.comparable(table_lines, stated.cards)
        self.skipped |= {f"table {name}": f"table {name}: {reason}" for name, reason in skipped.items()}
        self.compared = self.compared or bool(expected)
        self.problems += [f"README.md lacks the line {line!r}" for line in render.missing_lines(card, expected)]

    def part(self, name: str, stated: schema.Stated, problems: Callable[[], list[str]]) -> None:
        """A part that depends on the version of the cards."""
        if reason := versions.skipped(name, stated.cards):
            self.skipped[name] = f"{name.replace('_', ' ')}: {reason}"
        else:
            self.compared = True
            self.problems += problems()


def require_file(folder: Path, path: str, since_format: int = 2) -> Path:
    """Raises CheckFailed if a file is missing, Absent if the release is, or may be, of a format before
    `since_format`."""
    if not (folder / path).exists():
        release = next(filter(None, map(schema.of_release, (folder, folder.parent))), None)
        if release is not None and release.format >= since_format:
            raise CheckFailed(f"{path} is missing")
        raise Absent(f"{path} is not there: this release was made before there was one")
    return folder / path


def stated_versions(folder: Path, is_release: bool) -> Findings:
    """Everything in a release, or in a repository, states the same versions."""
    folders = (
        [""]
        if not is_release
        else [repository.folder for repository in repositories(folder) if repository.branch == "main"]
    )
    problems = list(schema.disagreements(folder, folders, files_below(folder)))
    stated = schema.stated(folder)
    return Findings(problems, detail=f"format {stated.format}, card schema {stated.cards}", compared=True)


def chat_templates(models: Iterable[Path]) -> list[str]:
    """Every chat template of a model renders a conversation."""
    problems = []
    for model in models:
        for name, template in formats.templates(model).items():
            try:
                formats.render(template)
            except MemoryError:
                raise
            except Exception as error:  # whatever a template does
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                problems.append(f"{model.name}/{name} renders no conversation: {message}")
    return problems


def licenses(dataset: Path) -> list[str]:
    """Every document has a license, removed ones too."""
    rows = metrics.stream(dataset / "dispositions.parquet", ["id", "license"])
    return [
        f"dispositions.parquet: document {row['id']} has no license"
        for row in rows
        if (row["license"] or "").lower() in UNKNOWN_LICENSES
    ]


def read_manifests(folder: Path) -> dict[str, dict[str, Any]]:
    """{node: manifest} of evidence/manifests."""
    return {path.stem: metrics.read_json(path) for path in sorted((folder / "evidence/manifests").glob("*.json"))}


def manifests(folder: Path) -> list[str]:
    """Each manifest's digest is the digest of its rows."""
    problems = []
    for node, manifest in read_manifests(folder).items():
        rows = [FileRow(row["path"], row["size"], row["sha256"]) for row in manifest["files"]]
        if digest_of(rows) != manifest["digest"]:
            problems.append(f"evidence/manifests/{node}.json: its digest is not that of its rows")
    return problems


def origins(folder: Path, digest: Callable[[Path], str] = sha256_file) -> list[str]:
    """Each file copied from an artifact is, byte for byte, the one that the artifact's manifest lists."""
    problems: list[str] = []
    manifest_digests: dict[tuple[str, str], str] = {}
    for node, manifest in read_manifests(folder).items():
        manifest_digests |= {(node, row["path"]): row["sha256"] for row in manifest["files"]}
    present = set(files_below(folder))
    for path, origin in sorted(metrics.read_json(folder / ORIGINS).items()):
        if path not in present:  # nor does ../ lead out of the release
            if (folder / path.split("/")[0]).exists():
                problems.append(f"{path} is missing (listed in {ORIGINS})")
        elif "artifact" in origin and manifest_digests.get((origin["artifact"], origin["file"])) != digest(
            folder / path
        ):
            problems.append(f"{path} is not {origin['file']} of the artifact {origin['artifact']}")
    return problems


def statements(folder: Path, digest: Callable[[Path], str] = sha256_file) -> list[str]:
    """Each artifact is the subject of a statement, each statement's materials are the artifacts of the release, and the
    summary that it repeats is that of its product."""
    manifests = read_manifests(folder)
    artifact_digests = {manifest["key"]: manifest["digest"] for manifest in manifests.values()}
    published_summaries = _summaries(folder, manifests)
    stated_artifacts: set[tuple[str, str]] = set()
    problems = []
    for path in sorted((folder / "evidence/statements").rglob("*.json")):
        body = metrics.read_json(path)
        name = path.relative_to(folder).as_posix()
        if path.stem != digest(path):
            problems.append(f"{name} is not named by its digest")
        build = body["predicate"]["buildDefinition"]
        types = {
            "_type": body.get("_type"),
            "predicateType": body.get("predicateType"),
            "buildType": build.get("buildType"),
        }
        kinds = {"_type": STATEMENT, "predicateType": PREDICATE, "buildType": BUILD_TYPE}
        problems += [
            f"{name}: its {field} is {types[field]}, not {kind}"
            for field, kind in kinds.items()
            if types[field] != kind
        ]
        subjects = {(subject["name"], subject["digest"]["sha256"]) for subject in body["subject"]}
        artifacts = subjects & set(artifact_digests.items())
        stated_artifacts |= artifacts
        for key, _ in artifacts:
            if (summary := provenance.summary(body)) and published_summaries.get(key, summary) != summary:
                problems.append(f"{name}: what it says is in {provenance.SUMMARY} of {key} is not what is there")
        for material in build["resolvedDependencies"] if artifacts else ():
            uri = material.get("uri", "")
            key = uri.removeprefix(ARTIFACT_URI)
            if uri.startswith(ARTIFACT_URI) and artifact_digests.get(key) != material["digest"]["sha256"]:
                problems.append(f"{name}: its material {key} is not an artifact of this release")
    problems += [
        f"evidence/statements: none is about {key} as it is here"
        for key in sorted(set(artifact_digests) - {k for k, _ in stated_artifacts})
    ]
    return problems


def _summaries(folder: Path, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """{key: the byproduct that a statement about it should have} of each artifact whose summary.json is published."""
    summaries, present = {}, set(files_below(folder))
    for path, origin in metrics.read_json(folder / ORIGINS).items():
        if origin.get("file") == provenance.SUMMARY and path in present:
            manifest = manifests[origin["artifact"]]
            product = Artifact(manifest["key"], "", (folder / path).parent, (_row(manifest, provenance.SUMMARY),))
            summaries[manifest["key"]] = next(provenance.summaries(product))
    return summaries


def _row(manifest: dict[str, Any], path: str) -> FileRow:
    return next(FileRow(row["path"], row["size"], row["sha256"]) for row in manifest["files"] if row["path"] == path)


def dispositions(dataset: Path) -> list[str]:
    """One fate for each document; in = kept + removed; the kept ones are exactly those of kept/*.parquet."""
    columns = ["id", "source", "disposition", "rule", "split", "license"]
    ids: set[str] = set()
    kept: dict[str, dict[str, tuple[Any, Any]]] = {}
    counts: Counter[str] = Counter()
    pairs: dict[tuple[Any, Any], tuple[Any, Any]] = {}  # each pair of split and license once, not once a document
    duplicate, problems = "", []
    for row in metrics.stream(dataset / "dispositions.parquet", columns):
        key, source = row["id"], row["source"]
        duplicate = duplicate or (key if key in ids else "")
        ids.add(key)
        counts[source] += 1
        kept_of_source = kept.setdefault(source, {})
        if row["disposition"] not in ("kept", "removed") or (row["disposition"] == "removed") != bool(row["rule"]):
            problems.append(f"dispositions.parquet: document {key} is neither kept nor removed by a rule")
        if row["disposition"] == "kept":
            pair = row["split"], row["license"]
            kept_of_source[key] = pairs.setdefault(pair, pair)
    if duplicate:
        problems.insert(0, f"dispositions.parquet: document {duplicate} has two fates")
    for source in sorted(kept):
        problems += _check_kept_documents(dataset, source, kept[source])
        declared = dataset / "sources" / f"{source}.json"
        if declared.exists() and metrics.read_json(declared).get("documents", counts[source]) != counts[source]:
            problems.append(
                f"dispositions.parquet: {counts[source]} documents of {source}, the source says another number"
            )
    return problems


def _check_kept_documents(dataset: Path, source: str, expected: dict[str, tuple[Any, Any]]) -> list[str]:
    """Whether kept/<source>.parquet holds the documents of `expected`, {id: (split, license)}, and no others."""
    path = dataset / "kept" / f"{source}.parquet"
    problems, extra, missing = [], set(), set(expected)
    for row in metrics.stream(path, ["id", "split", "license"]) if path.exists() else ():
        missing.discard(row["id"])
        if row["id"] not in expected:
            extra.add(row["id"])
        elif expected[row["id"]] != (row["split"], row["license"]):
            problems.append(
                f"kept/{source}.parquet: document {row['id']} has another split or license than its disposition"
            )
    if different := min(missing | extra, default=""):
        problems.insert(0, f"kept/{source}.parquet: document {different} is not kept in both tables")
    return problems


def scores(dataset: Path) -> list[str]:
    """Each scores.json is what its two tables give."""
    folders = [path.parent for path in sorted((dataset / "evaluation").glob("*/scores.json"))]
    return [
        f"evaluation/{folder.name}/scores.json is not what its tables give"
        for folder in folders
        if not _equals_measured(folder / "scores.json", metrics.scores_of(folder))
    ]


def _equals_measured(path: Path, measured: metrics.Facts) -> bool:
    """Whether a scores.json is what was measured. One of an older schema may lack the figures that came since."""
    newer_figures = {figure for figure, schema_ in versions.FIGURES.items() if schema_ > schema.stated(path).cards}
    return _equal(metrics.scores(path), json.loads(json.dumps(measured)), newer_figures)


def _equal(stated: Any, expected: Any, newer_figures: set[str], name: str = "") -> bool:
    """Whether two JSON values are equal, but for fields of `newer_figures`, which the first may lack."""
    if not (isinstance(stated, dict) and isinstance(expected, dict)):
        return bool(stated == expected)
    names = {key: f"{name}.{key}".lstrip(".") for key in expected}
    return stated.keys() <= expected.keys() and all(
        _equal(stated[key], expected[key], newer_figures, names[key]) if key in stated else names[key] in newer_figures
        for key in expected
    )


def model_card(model: Path, release: dict[str, Any] | None = None) -> Findings:
    """The card of one model repository, its plot, and its results for the Hub, against the files beside them, as far as
    cards of its version have them.

    release: evidence/release.json, if it is there.
    """
    card, facts = (model / "README.md").read_text(), metrics.model_facts(model)
    stated, findings = schema.stated(model), Findings()
    findings.part("metadata", stated, lambda: _index(card, facts))
    findings.part("plots", stated, lambda: _plots(model))
    data_id, version = (
        (render.data_of(card), None) if release is None else (render.data_id(release), release["version"])
    )
    findings.part("eval_results", stated, lambda: results.problems(model, facts, data_id, version))
    findings.tables(card, render.model_tables(facts), stated)
    return findings


def _index(card: str, facts: metrics.Facts) -> list[str]:
    return [
        f"README.md: model-index {name} is not the measured one"
        for name in render.mismatched_scores(card, render.own_scores(facts))
    ]


def _plots(model: Path) -> list[str]:
    drawn = model / plot.NAME
    if drawn.exists() and plot.source_of(drawn.read_bytes()) != plot.source(model):
        return [f"{plot.NAME} was not drawn from the logs in training/"]
    return []


def data_card(dataset: Path) -> Findings:
    """The data card against the tables beside it, as far as cards of its version have them."""
    findings = Findings()
    card, table_lines = (dataset / "README.md").read_text(), render.data_tables(metrics.data_facts(dataset))
    findings.tables(card, table_lines, schema.stated(dataset))
    return findings


def described(folder: Path, digest: Callable[[Path], str] = sha256_file) -> list[str]:
    """What stands in croissant.json is what the data of a whole release gives."""
    _require_comparable(folder, "croissant")
    release_info, dataset = schema.read_release(folder), folder / "dataset"
    expected = croissant.describe_dataset(release_info, dataset, metrics.data_facts(dataset), digest)
    is_equal = metrics.read_json(require_file(dataset, croissant.NAME)) == json.loads(json.dumps(expected))
    return [] if is_equal else [f"dataset/{croissant.NAME} is not what the data gives"]


def _require_comparable(folder: Path, part: str) -> None:
    """Raises Absent if today's code renders it otherwise than the version that the release states."""
    if reason := versions.skipped(part, schema.stated(folder).cards):
        raise Absent(f"skipped: {reason}")


def roots(dataset: Path) -> list[str]:
    """The Merkle roots are those of the tables."""
    stated, computed = metrics.read_json(require_file(dataset, ROOTS)), merkle.roots(dataset)
    return [
        f"{ROOTS}: the root of {name} is not that of its table"
        for name in sorted(stated.keys() | computed.keys())
        if stated.get(name) != computed.get(name)
    ]


def attestations(folder: Path) -> list[str]:
    """The statements of what was measured and gated say what the tables say."""
    _require_comparable(folder, "attestations")
    nodes = metrics.read_json(folder / RELEASE)[
        "nodes"
    ]  # statements and folders have the names of the release's format
    require_file(folder, GATES_STATED)
    is_release = (folder / "dataset").is_dir()
    expected = attest.evaluations(folder, nodes) if is_release else {}
    expected[GATES_STATED] = attest.gates(
        nodes, {name: gate["ok"] for name, gate in metrics.read_json(folder / GATES).items()}
    )
    present = {path.relative_to(folder).as_posix() for path in (folder / attest.FOLDER).rglob("*") if path.is_file()}
    problems = [f"{path} is about nothing in the release" for path in sorted(present - expected.keys()) if is_release]
    problems += [f"{path} is missing" for path in sorted(expected.keys() - present)]
    common = sorted(present & expected.keys())
    return problems + [
        f"{path} is not what the tables give" for path in common if metrics.read_json(folder / path) != expected[path]
    ]


def canary(dataset: Path, items: str) -> list[str]:
    """items: the digest of the artifact of evaluation items."""
    is_equal = metrics.read_json(require_file(dataset, CANARY)) == metrics.canary(items)
    return [] if is_equal else [f"{CANARY} is not that of the items"]


def _measured(dataset: Path) -> list[str]:
    return scores(dataset) + chat_scores(dataset)


def chat_scores(dataset: Path) -> list[str]:
    """What models that converse scored is what their tables give."""
    facts = metrics.chat_facts(dataset / "evaluation")
    problems = []
    for benchmark, models in facts.items():
        for table in metrics.chat_tables(dataset / "evaluation", benchmark):
            path, measured = table.with_name("scores.json"), models[schema.model(table.parent)]
            if not path.exists() or not _equals_measured(path, measured):
                problems.append(f"evaluation/{benchmark}/{table.parent.name}/scores.json is not what its table gives")
    return problems


def fresh_set(folder: Path) -> list[str]:
    """The fresh set is the one that the published weights give: drawn from their digest, less what was taken out."""
    from stages.data.table import read_jsonl
    from stages.evaluation import generated_eval

    fresh_folder = folder / "dataset/evaluation/fresh"
    if not (fresh_folder / "meta.json").exists():
        return ["evaluation/fresh/meta.json is missing: no item is known to be newer than the weights"]
    meta = metrics.read_json(fresh_folder / "meta.json")
    if (folder / "model").is_dir() and (digest := generated_eval.digest_of(folder / "model")) != meta["digest"]:
        return [f"evaluation/fresh/meta.json was drawn from the weights {meta['digest']}, and these are {digest}"]
    if (drawn_by := str(meta.get("generator", generated_eval.FIRST_GENERATOR))) != generated_eval.GENERATOR:
        raise Absent(
            f"skipped: drawn by version {drawn_by} of the generator, and this atom has {generated_eval.GENERATOR}"
        )
    removed_ids = {row["id"] for row in meta["removed"]}
    expected = [row for row in generated_eval.draw(meta["digest"], meta["problems"]) if row["id"] not in removed_ids]
    if read_jsonl(fresh_folder / "chat.jsonl") != json.loads(json.dumps(expected)):
        return ["evaluation/fresh/chat.jsonl is not what the digest of the weights gives"]
    return []


def cards(folder: Path) -> Findings:
    """The cards of a whole release against its files, as far as cards of its version have what today's have."""
    stated, findings = schema.stated(folder), Findings()
    if stated.format < 2:
        raise Absent("not asked, since it was made by an older version of atom, whose cards had other tables")
    models, release_info = model_folders(folder), schema.read_release(folder)
    for name in models:
        findings.add(model_card(folder / name, release_info), f"{name}/")
    data_facts = metrics.data_facts(folder / "dataset")
    table_lines = render.data_tables(data_facts)
    changes = metrics.interventions(metrics.checkpoint_facts(folder / "checkpoints"))
    run_costs = costs.usage_by_stage(folder)
    for name in models:
        card = (folder / name / "README.md").read_text()
        phases = training.logs(folder / name)
        card_tables = {key: table_lines[key] for key in ("sources", "funnel", "order")} | render.intervention_tables(
            phases, changes
        )
        card_tables |= render.cost_tables(run_costs)
        card_tables |= render.unread_tables(metrics.model_facts(folder / name), data_facts["order"])
        table_findings = Findings()
        table_findings.tables(card, card_tables, stated)
        findings.add(table_findings, f"{name}/")
    data = folder / "dataset"
    findings.add(data_card(data), "dataset/")
    problems = _measured(data) + canary(data, release_info["nodes"]["items"]["digest"])
    findings.problems += [f"dataset/{text}" for text in problems]
    findings.compared = True
    return findings
