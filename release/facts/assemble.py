"""Copies the parts of a release from the run's artifacts, and records the origin of every file.

`origins` maps each path of the release to {"artifact": node, "file": path in it} for a verbatim copy, or to
{"generated": its producer}. With the manifests and statements beside it, every byte leads back to a statement.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import source_code
from pipeline.core.errors import AtomError
from pipeline.core.source_code import PACKAGES
from pipeline.core.store import Artifact
from release import references
from release.data_layout import GENERATED
from release.facts.forecast import FILE, FOLDER
from release.facts.forecast import MODEL as MODEL_PREDICTED
from release.facts.score_facts import HARNESS, MEMORIZATION
from release.layout import (
    ALL_SUMS,
    GATES,
    GATES_STATED,
    MODEL,
    OPT_OUTS,
    REWARD_EXPORT,
    SITE,
    SUMS,
    VARIANT,
    WITHOUT_ORDER,
    folders_of,
    models_of,
    order_of,
    phases_of,
    sizes_of,
    when,
)
from release.schema import PublishedLicenses
from stages.formats.table import MEASURES
from stages.train.imported_weights import NAME as BASE

if TYPE_CHECKING:
    from release.facts.model_facts import ModelFacts

DISTRIBUTION, CODE_LICENSE = "atom-release", "Apache-2.0"
IMPORT = "import"
"""The node of the published model that training begins with; after it, the recipe may leave out phases."""
CODE_FILES = ("pyproject.toml", "LICENSE")


class Assembly:
    """A release folder that is being built."""

    def __init__(self, folder: Path, by_reference: Collection[str] = ()) -> None:
        """by_reference: sources whose documents are placed without their texts."""
        self.folder, self.by_reference = folder, by_reference
        self.origins: dict[str, dict[str, str]] = {}

    def copy(self, node: str, artifact: Artifact, file: str, target: str) -> None:
        origin = origin_of_copy(node, artifact, file, target, self.by_reference)
        if "generated" in origin:
            references.write_without_text(artifact / file, self.folder / target)
        else:
            self._put(target, (artifact / file), None)
        self.origins[target] = origin

    def include(self, source: Path, target: str, reason: str) -> None:
        """Copies a file that is not part of an artifact: code, statements, metrics."""
        self._put(target, source, None)
        self.origins[target] = {"generated": reason}

    def write(self, target: str, data: bytes, reason: str) -> None:
        self._put(target, None, data)
        self.origins[target] = {"generated": reason}

    def register(self, path: Path, reason: str) -> None:
        """Records the origin of a file that was written into the folder."""
        self.origins[path.relative_to(self.folder).as_posix()] = {"generated": reason}

    def json(self, target: str, value: Any, reason: str, sort_keys: bool = True) -> None:
        self.write(target, to_json(value, sort_keys), reason)

    def _put(self, target: str, source: Path | None, data: bytes | None) -> None:
        if target in self.origins:
            raise AtomError(f"two files of the release want to be {target}; rename one of them")
        path = self.folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is not None:
            shutil.copyfile(source, path)
        else:
            path.write_bytes(data or b"")


def origin_of_copy(
    node: str, artifact: Artifact, file: str, target: str, by_reference: Collection[str]
) -> dict[str, str]:
    """The origin of a file of an artifact in its place of the release. by_reference: sources whose documents are placed
    without their texts."""
    if any(target.startswith(f"dataset/kept/{name}/") for name in by_reference):
        return {"generated": f"{file} of {artifact.key} without its texts"}
    return {"artifact": node, "file": file}


def to_json(value: Any, sort_keys: bool = True) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=sort_keys, allow_nan=False) + "\n").encode()


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


def placement(
    node: str, artifact: Artifact, phases: Sequence[str] = (), models: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """(file of the artifact, path in the release) for every published file of a node.

    phases, models: those of the release, in the order of training; smaller models are phases here.
    """
    folders = folders_of(models)
    kind, _, suffix = node.partition("-")
    for row in artifact.rows:
        path, name = row.path, Path(row.path).name
        if kind == "acquire" and path == "source.json":
            yield path, f"dataset/sources/{suffix}.json"
        elif kind == "acquire" and path.startswith(f"{GENERATED}/"):
            yield path, f"dataset/{GENERATED}/{suffix}/{name}"
        elif node == "filter" and (path == OPT_OUTS or path.startswith(f"{MEASURES}/")):
            yield path, f"dataset/{path}"
        elif node == IMPORT and path == BASE:
            yield path, f"evidence/{BASE}"
            yield from ((path, f"{folder}/{BASE}") for folder in folders.values())
        elif kind == "items":
            yield path, f"dataset/evaluation/{path}"
        elif kind == "tasks":
            yield path, f"dataset/rl/{suffix}/{path}"
        elif node in WITHOUT_ORDER and path.endswith(".parquet"):
            yield path, f"dataset/rl/{node}/{path}"
        elif kind == "dedup" and (path.startswith(("kept/", "dispositions/")) or "/" not in path):
            yield path, f"dataset/{path}"
        elif kind == "tokenizer" and path == "stats.json":
            yield path, "dataset/tokens/tokenizer_stats.json"
        elif kind == "tokenize" and (path == "meta.json" or path.startswith("documents/")):
            yield path, f"dataset/tokens/{path}"
        elif kind == "order":
            yield path, f"dataset/order/{suffix}/{path}"
        elif "@" in node:
            phase, step = node.split("@")
            yield path, f"checkpoints/{phase}-step-{step}/{name}"
        elif node in phases and path.startswith("step-"):
            yield path, f"checkpoints/{node}-step-{int(path.split('/')[0].removeprefix('step-'))}/{name}"
        elif node in phases:
            yield path, f"evidence/training/{node}/{path}"
            if (
                path == "training.jsonl" and node != "reward" and order_of(node) == node
            ):  # the repository alone proves the training facts of a model's card
                model_dirs = [folder for model, folder in folders.items() if when(model) >= when(node)]
                yield from ((path, f"{folder}/training/{node}.jsonl") for folder in model_dirs)
        elif node == REWARD_EXPORT and path == "parity.json":
            yield path, "evidence/parity/reward.json"
        elif kind == "export" and path == "parity.json":
            yield path, f"evidence/parity/{suffix}.json"
            if suffix in folders:
                yield path, f"{folders[suffix]}/parity.json"
        elif kind == "export" and path.startswith("model/") and suffix in folders:
            yield path, f"{folders[suffix]}/{path.removeprefix('model/')}"
        elif kind == VARIANT:
            yield path, f"{node}/{_place_in_variant(path)}"
        elif kind == "evaluate":
            yield path, f"dataset/evaluation/{suffix}/{path}"
            if path == "scores.json":
                # A model's card compares it with earlier models, never with later ones.
                later = models[models.index(suffix) :]
                yield from ((path, f"{folders[m]}/evaluation/{suffix}.json") for m in later if m in folders)


def _place_in_variant(path: str) -> str:
    """The place of a file of a variant in its repository: weights and loss at the root, tables below."""
    return f"evaluation/{path}" if path.endswith(".parquet") else path.removeprefix("model/")


def measured(node: str, path: str, models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path of the artifact, path in the release) of measurements other than those of `evaluate`."""
    kind, _, suffix = node.partition("-")
    if kind == "contamination" or node == "fresh":
        yield path, f"dataset/evaluation/{node}/{path}"
        if path == "report.json":
            yield path, f"{MODEL}/evaluation/contamination/{path}"
        return
    if kind in (MEMORIZATION, HARNESS):
        yield path, f"dataset/evaluation/{kind}/{suffix}/{path}"
        if path in ("scores.json", "tasks.json") and (folder := folders_of(models).get(suffix)):
            yield path, f"{folder}/evaluation/{kind}/{path}"
        return
    benchmark = {"solve": "test", "fresh": "fresh", "prefer": "preferences"}.get(kind)
    if benchmark is not None:
        suffix = suffix.removeprefix("solve-")
        yield path, f"dataset/evaluation/{benchmark}/{suffix}/{path}"
        if path == "scores.json" and suffix in models:
            later, folders = models[models.index(suffix) :], folders_of(models)
            yield from ((path, f"{folders[m]}/evaluation/{benchmark}/{suffix}.json") for m in later if m in folders)


def placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """(node, file of its artifact, path in the release) for every copy of a file of the release's own artifacts."""
    phases, models = [*phases_of(artifacts), *sizes_of(artifacts)], models_of(artifacts)
    for node, artifact in sorted(artifacts.items()):
        yield from ((node, *place) for place in placement(node, artifact, phases, models))
        for row in artifact.rows:
            yield from ((node, *place) for place in measured(node, row.path, models))


def earlier_placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """(key, file of its artifact, path in the release) of artifacts of earlier runs that training resumed from:
    checkpoints among the others, data by their keys in dataset/earlier/."""
    for key, artifact in sorted(artifacts.items()):
        for file, target in placement(key.rsplit("-", 1)[0], artifact):
            if target.startswith("dataset/"):
                yield key, file, f"dataset/earlier/{key}/{file}"
            elif target.startswith("checkpoints/") and "@" in key:
                yield key, file, target


def place_artifacts(assembly: Assembly, artifacts: Mapping[str, Artifact], earlier: Mapping[str, Artifact]) -> None:
    """Places the manifests of all artifacts, and copies of their published files. earlier: by key, artifacts of earlier
    runs."""
    for name, artifact in sorted({**artifacts, **earlier}.items()):
        manifest = artifact.path / "manifest.json"
        assembly.include(manifest, f"evidence/manifests/{name}.json", f"manifest of {artifact.key}")
    for node, file, target in placements(artifacts):
        assembly.copy(node, artifacts[node], file, target)
    for key, file, target in earlier_placements(earlier):
        assembly.copy(key, earlier[key], file, target)


def place_prediction(
    assembly: Assembly, artifact: Artifact, statement: Path, artifacts: Mapping[str, Artifact]
) -> None:
    """Places a prediction with its manifest and statement in the evidence, and a copy beside the predicted model."""
    reason = f"what was predicted before training, {artifact.key}"
    assembly.include(artifact / FILE, f"{FOLDER}/{FILE}", reason)
    assembly.include(artifact.path / "manifest.json", f"{FOLDER}/manifest.json", f"manifest of {artifact.key}")
    assembly.include(statement, f"{FOLDER}/statement.json", "statement of the ledger")
    assembly.include(artifact / FILE, f"{folders_of(models_of(artifacts))[MODEL_PREDICTED]}/{FILE}", reason)


def place_code(assembly: Assembly, roots: list[Path]) -> None:
    """Places the source files of the packages of atom and the files that build them, from the first root that has each.

    A root may also be one of the packages itself: then its parent is meant.
    """
    roots = list(dict.fromkeys(root.parent if root.name in PACKAGES else root for root in roots))
    for name in PACKAGES:
        root = next((root for root in roots if (root / name).is_dir()), None)
        if root is None:
            raise AtomError(
                f"the package {name} is in none of the code roots; the release must hold the code that made it"
            )
        for path in source_code.sources(root, name):
            assembly.include(path, f"code/{path.relative_to(root).as_posix()}", "source code")
    for root in reversed(roots):
        names = [root / name for name in CODE_FILES] + sorted(root.glob("constraints*.txt"))
        for path in names:
            if path.is_file() and f"code/{path.name}" not in assembly.origins:
                assembly.include(path, f"code/{path.name}", "source code")
    text = code_license_text(roots)
    if text is not None and "code/LICENSE" not in assembly.origins:
        assembly.write("code/LICENSE", text, "license text of the installed distribution")


def code_license_text(roots: list[Path]) -> bytes | None:
    """The license text of atom: from the first root that has one, else from the installed wheel."""
    license_root = next((root / "LICENSE" for root in roots if (root / "LICENSE").is_file()), None)
    if license_root is not None:
        return license_root.read_bytes()
    texts = (d.read_text("licenses/LICENSE") for d in importlib.metadata.distributions(name=DISTRIBUTION))
    return next((text.encode() for text in texts if text), None)


def license_of(folder: str, licenses: PublishedLicenses, models: Mapping[str, ModelFacts]) -> str:
    """The SPDX expression of the license of a repository. models: facts by folder."""
    if folder in models:
        return models[folder].license(licenses.weights)
    return {"dataset": licenses.data_compilation, "": licenses.code}.get(folder, licenses.weights)


def license_text(spdx: str, code_license: str, roots: list[Path]) -> bytes:
    """The full text if it is the license of the code and available; else its SPDX id and the address of the text."""
    text = code_license_text(roots)
    if spdx == code_license and text is not None:
        return text
    return (
        f"SPDX-License-Identifier: {spdx}\n\nThe text of this license: https://spdx.org/licenses/{spdx}.html\n".encode()
    )


def unexplained(origins: Mapping[str, Any], paths: list[str]) -> list[str]:
    """Files of a release without an origin; checksum files, the result of the gates, and the page need none."""
    unlisted = {ALL_SUMS, GATES, GATES_STATED}
    return [
        p
        for p in paths
        if p not in origins and p not in unlisted and Path(p).name != SUMS and not p.startswith(f"{SITE}/")
    ]
