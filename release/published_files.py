"""The published files: one closed list of what each kind of repository holds, and where every file comes from.

`atom build` copies and makes what stands here, and nothing else; `origins.json` states it; and `atom verify` refuses
any other file. A loader takes up files by their names: an adapter, a second chat template, a further shard. So names
that look like one on the list are refused as well.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pipeline.core.parts import PART_NAME
from pipeline.core.source_code import PACKAGES, SUFFIXES
from pipeline.core.store import Artifact
from pipeline.core.text import printable
from release.layout import (
    ALL_SUMS,
    EXPORTED,
    GATES,
    GATES_STATED,
    MODEL,
    PAGE,
    PUBLIC_KEY,
    RETRACTED,
    SIGNATURE,
    SITE,
    SIZE,
    SUMS,
    TRAINING,
    WITHOUT_ORDER,
    folders_of,
    models_of,
    when,
)

DISTRIBUTION, CODE_LICENSE = "atom-release", "Apache-2.0"
"""The name of atom's wheel, and its license."""
CODE_FILES = ("pyproject.toml", "LICENSE")
"""The files that build the code, beside the constraints."""
STANDARD_DOCUMENTS = (
    "CITATION.cff bom.cdx.json bom.spdx3.json energy.json eu_summary.json eu_summary.md mof.yml osaid.json"
)
"""The documents in evidence/standards."""
NAMES = {
    "code": "|".join(map(re.escape, CODE_FILES)),
    "constraints": r"constraints[A-Za-z0-9_.-]*\.txt",
    "encoding": r"[A-Z0-9_]+",
    "extension": r"[A-Za-z_]\w*",
    "key": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?-[0-9a-f]{12}",
    "model": rf"(?:{'|'.join(EXPORTED)})(?:-[0-9]+)?",
    "module": rf"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))})",
    "node": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?",
    "package": "|".join(PACKAGES),
    "part": PART_NAME,
    "phase": rf"(?:{'|'.join((*TRAINING, SIZE))})(?:-[0-9]+)?",
    "read": rf"(?:{'|'.join(kind for kind in TRAINING if kind != 'reward')})(?:-[0-9]+)?",
    "recipe": r"[A-Za-z0-9_][\w.-]*\.ya?ml",
    "release": r"[a-z0-9][a-z0-9._-]*",
    "sampled": "|".join(WITHOUT_ORDER),
    "sha256": r"[0-9a-f]{64}",
    "shard": r"[0-9]{5}-of-[0-9]{5}",
    "source": r"[a-z][a-z0-9_]*",
    "step": r"[0-9]+",
    "table": r"[a-z_]+",
    "variant": r"[a-z0-9_-]+",
}
"""The pattern of each name that may stand in a path between braces."""
EVERYWHERE = (SUMS, SIGNATURE, PUBLIC_KEY, RETRACTED, ".gitattributes")
"""Files that any repository may have: checksums, a signature, a tombstone, and what the Hub adds."""
Receivers = Literal["", "every", "final", "later", "own"]
"""The model repositories that get a copy: all; that of the final model; those of this and the later models, since a
card compares a model with earlier ones and never with later ones; that of this model alone."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of a repository, or files that are alike.

    Attributes:
        path: The path from the folder of the repository, with NAMES between braces.
        origin: How `atom build` makes it, as origins.json states it, with details of the build between braces; "" for a
            copy, and for a file that states no origin.
        node: The node of whose artifact it is a copy, with NAMES between braces; "" if it is none.
        source: Its path in that artifact.
        receivers: The model repositories that get the copy.
        needed: True if every repository of the kind has it.
    """

    path: str
    origin: str = ""
    node: str = ""
    source: str = ""
    receivers: Receivers = ""
    needed: bool = False

    def fits(self, path: str) -> bool:
        return fits(self.path, path)


@dataclass(frozen=True)
class FileList:
    """The files of a kind of repository.

    Attributes:
        title: The kind, for sentences.
        files: All of them.
        together: {pattern of a folder: names, with spaces between, of the files that it has if it has any}; the first
            pattern that fits a folder counts.
    """

    title: str
    files: tuple[PublishedFile, ...]
    together: Mapping[str, str] = field(default_factory=dict)

    def holds(self, path: str) -> bool:
        """Returns True if a repository of the kind may have a file of this path."""
        return path in EVERYWHERE or any(file.fits(path) for file in self.files)

    def made(self, path: str) -> PublishedFile | None:
        """Returns the entry of a file that `atom build` makes; None for any other path."""
        return next((file for file in self.files if file.origin and file.fits(path)), None)

    def problems(self, paths: Iterable[str], complete: bool = True) -> Iterator[str]:
        """Yields sentences about files that are not on the list, and about missing ones.

        Args:
            paths: The files of the repository, from its folder.
            complete: Whether the needed files must be there.
        """
        present = set(paths)
        for path in sorted(present):
            if not self.holds(path):
                yield f"{shown(path)} is no file of {self.title}; a release holds what atom writes, and nothing else"
        if not complete:
            return

        for path in self._needed(present):
            if path not in present:
                yield f"{path} is missing, and {self.title} has it"

    def _needed(self, present: set[str]) -> Iterator[str]:
        """Yields the paths that a repository with the files `present` must have."""
        yield from (file.path for file in self.files if file.needed)
        # Most kinds have no such folder, and a release may have very many files.
        if not self.together:
            return
        for folder in sorted({path.rpartition("/")[0] for path in present}):
            names = next((names for pattern, names in self.together.items() if fits(pattern, folder)), "")
            yield from (f"{folder}/{name}" for name in names.split())


def fits(pattern: str, path: str) -> bool:
    """Returns True if a path fits a pattern: a path with NAMES between braces."""
    return _compiled(pattern).fullmatch(path) is not None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns the regular expression of a path with NAMES between braces, each of which is a group."""
    # Literal texts and names in turn, a literal text first.
    parts = re.split(r"\{(\w+)\}", pattern)
    expression = re.escape(parts[0])
    for name, literal in zip(parts[1::2], parts[2::2], strict=True):
        expression += f"(?P<{name}>{NAMES[name]})" + re.escape(literal)
    return re.compile(expression, re.ASCII)


def shown(path: str) -> str:
    """Returns a path for a message, with escapes after one that is not ASCII: its letters may look like ASCII ones."""
    if path.isascii():
        return path
    return f"{printable(path)} ({path.encode('unicode_escape').decode()})"


def _made(paths: str, origin: str, at: str = "") -> tuple[PublishedFile, ...]:
    """Lists files of one origin.

    `paths` are those after `at`, with spaces between and an exclamation mark before each that is needed.
    """
    return tuple(
        PublishedFile(at + path.removeprefix("!"), origin, needed=path.startswith("!")) for path in paths.split()
    )


def _copied(
    node: str, paths: str, at: str = "", below: str = "", receivers: Receivers = ""
) -> tuple[PublishedFile, ...]:
    """Lists copies of files of one artifact.

    `paths` are those after `below` in the artifact and after `at` in the repository, with spaces between and an
    exclamation mark before each that is needed.
    """
    names = [(path.removeprefix("!"), path.startswith("!")) for path in paths.split()]
    return tuple(
        PublishedFile(at + name, node=node, source=below + name, receivers=receivers, needed=needed)
        for name, needed in names
    )


WEIGHTS = "model.safetensors model-{shard}.safetensors model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
TOKENIZER = "!tokenizer.json !tokenizer_config.json !chat_template.jinja !training_chat_template.jinja"
LOADED = f"!config.json !generation_config.json {TOKENIZER}"
CARD_AND_LICENSE = (*_made("!README.md", "card from the published files"), *_made("!LICENSE", "license"))
PREDICTED = "what was predicted before training, {key}"
SCORES = "{table}.parquet scores.json"
MODELS = FileList(
    "a model repository",
    (
        *_copied("export-{model}", f"{LOADED} {WEIGHTS}", below="model/", receivers="own"),
        *_copied("export-{model}", "!parity.json", receivers="own"),
        *_copied("import", "base.json", receivers="every"),
        # The repository alone proves the training facts of its card.
        PublishedFile("training/{read}.jsonl", node="{read}", source="training.jsonl", receivers="later"),
        PublishedFile("evaluation/{model}.json", node="evaluate-{model}", source="scores.json", receivers="later"),
        *(
            PublishedFile(f"evaluation/{benchmark}/{{model}}.json", node=node, source="scores.json", receivers="later")
            for benchmark, node in (
                ("test", "solve-{model}"),
                ("fresh", "fresh-solve-{model}"),
                ("preferences", "prefer-{model}"),
            )
        ),
        *_copied("contamination", "report.json", at="evaluation/contamination/", receivers="final"),
        *_copied("harness-{model}", "scores.json tasks.json", at="evaluation/harness/", receivers="own"),
        *CARD_AND_LICENSE,
        *_made("!goldens.json", "what plain transformers makes of fixed inputs"),
        *_made("serve.yaml", "options of vLLM for this model"),
        *_made("prediction.json", PREDICTED),
        *_made(".eval_results/{release}-data.yaml", "scores in evaluation/ for the Hub"),
        *_made("training.png experts.png", "plot of the logs in training/"),
        *_made(
            "!progress.png inference.png reinforcement.png",
            "plot of the scores in evaluation/ and the logs in training/",
        ),
    ),
)
VARIANT_NODE = "variant-{variant}"
MEASURED = (
    *_copied(VARIANT_NODE, "!loss.json"),
    *_copied(VARIANT_NODE, "{table}.parquet", at="evaluation/"),
    *CARD_AND_LICENSE,
)
GGUF = FileList("a variant in GGUF", (*_copied(VARIANT_NODE, "model-{encoding}.gguf", below="model/"), *MEASURED))
PEFT = FileList(
    "an adapter",
    (
        *_copied(
            VARIANT_NODE,
            f"!adapter_config.json !{ADAPTER} !base.json generation_config.json {TOKENIZER}",
            below="model/",
        ),
        *MEASURED,
    ),
)
SAFETENSORS = FileList(
    "a variant in safetensors", (*_copied(VARIANT_NODE, f"{LOADED} {WEIGHTS}", below="model/"), *MEASURED)
)
STATE = f"!state.json {WEIGHTS} {WEIGHTS.replace('model', 'optimizer')}"
CHECKPOINTS = FileList(
    "a checkpoint",
    (
        *_copied("{phase}", STATE, below="step-{step}/"),
        *_copied("{phase}@{step}", STATE),
        *_made("!LICENSE", "license"),
    ),
)
CHECKPOINTS_MAIN = FileList(
    "the main branch of the checkpoints", (*CARD_AND_LICENSE, *_made("!index.json", "states of the checkpoints"))
)
EARLIER = ("{part}", "{table}/{part}", "{table}/{source}/{part}", "{table}.parquet", "{table}.json", "{table}.jsonl")
"""Files of artifacts of earlier runs."""
DATASET = FileList(
    "a data repository",
    (
        *_copied("dedup", "kept/{source}/{part} dispositions/{source}/{part} !summary.json"),
        *_copied("tokenize", "documents/{source}/{part} !meta.json", at="tokens/"),
        PublishedFile("tokens/tokenizer_stats.json", node="tokenizer", source="stats.json", needed=True),
        PublishedFile("generated/{source}/{part}", node="acquire-{source}", source="generated/{part}"),
        PublishedFile("sources/{source}.json", node="acquire-{source}", source="source.json"),
        *_copied("filter", "measures/{source}/{part} opt_out.json"),
        *_copied("order-{phase}", "{part} meta.json", at="order/{phase}/"),
        *(PublishedFile(f"earlier/{{key}}/{path}") for path in EARLIER),
        *_copied("items", "!items.parquet {table}.parquet chat.jsonl", at="evaluation/"),
        *_copied("evaluate-{model}", SCORES, at="evaluation/{model}/"),
        *_copied("solve-{model}", SCORES, at="evaluation/test/{model}/"),
        *_copied("fresh-solve-{model}", SCORES, at="evaluation/fresh/{model}/"),
        *_copied("prefer-{model}", SCORES, at="evaluation/preferences/{model}/"),
        *_copied("harness-{model}", f"{SCORES} tasks.json", at="evaluation/harness/{model}/"),
        *_copied("contamination", "items.parquet report.json", at="evaluation/contamination/"),
        *_copied("fresh", "chat.jsonl meta.json", at="evaluation/fresh/"),
        *_copied("tasks-{phase}", "tasks.jsonl probes.json {table}.parquet", at="rl/{phase}/"),
        *_copied("{sampled}", "{table}.parquet", at="rl/{sampled}/"),
        *CARD_AND_LICENSE,
        *_made("!NOTICE", "release.standards.bundle"),
        *_made("license_texts/python.txt", "license of the interpreter's standard library"),
        *_made("!merkle.json", "Merkle roots of the tables"),
        *_made("!croissant.json", "description of the tables"),
        *_made("references.json", "settings of the sources by reference"),
        *_made("composition.png", "plot of the tables of kept documents"),
        *_made("!evaluation/canary.json", "made from the digest of the evaluation items"),
        *_made("kept/{source}/{part}", "{file} of {key} without its texts"),
        *_made("attribution/{source}/{part} notices/{source}/{part}", "release.assembly.assemble"),
        *_made("messages/{source}/{table}/{part}", "release.facts.message_tables"),
    ),
    together={
        "order/{phase}": "meta.json",
        "evaluation/contamination": "items.parquet report.json",
        "evaluation/fresh": "chat.jsonl meta.json",
        "evaluation/{model}": "documents.parquet items.parquet scores.json",
        "evaluation/preferences/{model}": "pairs.parquet scores.json",
        "evaluation/harness/{model}": "items.parquet scores.json tasks.json",
        "evaluation/test/{model}": "answers.parquet scores.json",
        "evaluation/fresh/{model}": "answers.parquet scores.json",
    },
)
EVIDENCE = FileList(
    "the evidence repository",
    (
        *_copied("import", "base.json", at="evidence/"),
        PublishedFile("evidence/parity/{model}.json", node="export-{model}", source="parity.json"),
        PublishedFile("evidence/parity/reward.json", node="export-reward", source="parity.json"),
        *_copied("{phase}", "training.jsonl summary.json", at="evidence/training/{phase}/"),
        *CARD_AND_LICENSE,
        *_made("!evidence/release.json !evidence/origins.json", "release.assembly.build_release"),
        *_made("!evidence/recipe.json", "resolved recipe"),
        *_made("!evidence/environment.json", "environment of the build"),
        *_made("!evidence/runtimes.json", "what other programs make of the fixed inputs"),
        *_made("!evidence/independent_verifier.py", "a second verifier, from docs/formats.md"),
        *_made(
            " ".join(f"!{name}" for name in STANDARD_DOCUMENTS.split()),
            "release.standards.bundle",
            at="evidence/standards/",
        ),
        *_made("!evidence/standards/packages.json", "packages of the statements, with licenses and hashes"),
        *_made("evidence/manifests/{node}.json evidence/manifests/{key}.json", "manifest of {key}"),
        *_made("evidence/statements/{sha256}.json", "statement of the ledger"),
        *_made("evidence/metrics/{node}.jsonl evidence/metrics/{key}.jsonl", "timed metrics of the run"),
        *_made("evidence/opt_out/{sha256}.json", "release.tracing.receipts"),
        *_made("evidence/attestations/evaluation-{model}.json", "in-toto statement of what was measured"),
        *_made("evidence/changes.json", "comparison with the release that --previous names"),
        *_made("evidence/prediction/prediction.json", PREDICTED),
        *_made("evidence/prediction/manifest.json", "manifest of {key}"),
        *_made("evidence/prediction/statement.json", "statement of the ledger"),
        *_made("!code/LICENSE code/{code} code/{constraints} code/{package}/{module}", "source code"),
        *_made("!code/README.md", "README of the code"),
        *_made(
            "recipes/{recipe} recipes/{extension}/{module} data_recipes/{recipe} data_recipes/{extension}/{module}",
            "recipe file as run",
            at="code/as-run/",
        ),
        *(PublishedFile(path, needed=True) for path in (ALL_SUMS, GATES, GATES_STATED, PAGE)),
    ),
)
KINDS = {
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "repository": CHECKPOINTS_MAIN,
    "dataset": DATASET,
    "evidence": EVIDENCE,
}
"""{kind of a repository: its files}; the files of a variant depend on its form."""
PLACES = {
    "dataset": "dataset",
    "checkpoints": "repository",
    "checkpoints/{phase}-step-{step}": "checkpoint",
    "model": "model",
    "model-{model}": "model",
    VARIANT_NODE: "variant",
}
"""{folder of a release: the kind of its repository}; the root is that of the evidence."""
PLACED: tuple[tuple[str, FileList], ...] = (
    ("", EVIDENCE),
    ("dataset/", DATASET),
    ("checkpoints/{phase}-step-{step}/", CHECKPOINTS),
    *((f"{VARIANT_NODE}/", variant) for variant in (SAFETENSORS, PEFT, GGUF)),
    ("{folder}/", MODELS),
)
"""(prefix of the paths in a release, files) of the repositories that hold copies; `folder` is that of a model."""


def list_of(kind: str, paths: Iterable[str]) -> FileList:
    """Returns the list of a repository.

    Args:
        kind: As `checks.listing.kind_of` names it.
        paths: The files of the repository, which show the form of a variant.
    """
    if kind != "variant":
        return KINDS[kind]
    names = set(paths)
    if any(name.endswith(".gguf") for name in names):
        return GGUF
    return PEFT if ADAPTER in names else SAFETENSORS


def place_of(path: str) -> str:
    """Returns the folder of the repository that a file of a release is in; "" is the root."""
    parts = path.split("/")
    # The innermost folder decides, since a checkpoint lies in the folder of the main branch.
    for depth in range(len(parts) - 1, 0, -1):
        folder = "/".join(parts[:depth])
        if kind_of_place(folder):
            return folder
    return ""


def kind_of_place(folder: str) -> str:
    """Returns the kind of the repository in a folder of a release; "" for a folder that is no repository of its own."""
    if not folder:
        return "evidence"
    return next((kind for place, kind in PLACES.items() if fits(place, folder)), "")


def made(path: str) -> PublishedFile | None:
    """Returns the entry of a file of a release that `atom build` makes; None for a path of no such file."""
    folder = place_of(path)
    # Without its files, the form of a variant is unknown; `atom build` makes the same files in each.
    return list_of(kind_of_place(folder), ()).made(path.removeprefix(f"{folder}/"))


def origin_of_copy(
    node: str, artifact: Artifact, file: str, target: str, by_reference: Collection[str]
) -> dict[str, str]:
    """Returns the origin of a file of an artifact in its place of the release.

    Args:
        node: The node of the artifact.
        artifact: The artifact.
        file: The path in the artifact.
        target: The path in the release.
        by_reference: Sources whose documents are placed without their texts.
    """
    if any(target.startswith(f"dataset/kept/{name}/") for name in by_reference):
        return {"generated": f"{file} of {artifact.key} without its texts"}
    return {"artifact": node, "file": file}


def placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """Yields (node, file of its artifact, path in the release) for every copy of a file of the release's artifacts."""
    folders = folders_of(models_of(artifacts))
    for node, artifact in sorted(artifacts.items()):
        yield from ((node, *place) for place in placement(node, artifact, folders))


def earlier_placements(artifacts: Mapping[str, Artifact]) -> Iterator[tuple[str, str, str]]:
    """Yields (key, file of its artifact, path in the release) of artifacts of earlier runs that training resumed from.

    Their checkpoints stand among the others, and their data by their keys in dataset/earlier/.
    """
    for key, artifact in sorted(artifacts.items()):
        for file, target in placement(key.rsplit("-", 1)[0], artifact):
            if target.startswith("dataset/"):
                yield key, file, f"dataset/earlier/{key}/{file}"
            elif target.startswith("checkpoints/") and "@" in key:
                yield key, file, target


def placement(node: str, artifact: Artifact, folders: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Yields (file of the artifact, path in the release) for every published file of a node.

    Args:
        node: The node.
        artifact: Its artifact.
        folders: {model: its folder} of the release, in the order of training.
    """
    # Few entries are about one node, and a node may have a hundred thousand files.
    entries = [
        (prefix, file, match.groupdict())
        for prefix, file_list in PLACED
        for file in file_list.files
        if file.node and (match := _compiled(file.node).fullmatch(node))
    ]
    for row in artifact.rows:
        # The forms of a variant share files, and each is copied once.
        targets: dict[str, None] = {}
        for prefix, file, node_names in entries:
            if (match := _compiled(file.source).fullmatch(row.path)) is None:
                continue
            names = node_names | match.groupdict()
            if "step" in names:
                # The folder of a checkpoint has zeros before its step, and its branch has none.
                names["step"] = str(int(names["step"]))
            receivers = _receivers(file, names, folders or {}) if file.receivers else ("",)
            for folder in receivers:
                targets[(prefix + file.path).format(**names, folder=folder)] = None
        yield from ((row.path, target) for target in targets)


def _receivers(file: PublishedFile, names: Mapping[str, str], folders: Mapping[str, str]) -> Iterable[str]:
    """Returns the folders of the models that get a copy. `names` are those in the paths of its node and its file."""
    if file.receivers == "own":
        return [folders[names["model"]]] if names["model"] in folders else []
    if file.receivers == "later":
        # A file belongs to a model, or to a phase whose log the model's card reads.
        earliest = names.get("model") or names["read"]
        return [folder for model, folder in folders.items() if when(model) >= when(earliest)]
    if file.receivers == "every":
        return folders.values()
    return [MODEL]


def unexplained(origins: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """Lists files of a release without an origin; checksum files, the result of the gates, and the page need none."""
    unlisted = {ALL_SUMS, GATES, GATES_STATED}
    files = []
    for path in paths:
        needs_origin = path not in unlisted and Path(path).name != SUMS and not path.startswith(f"{SITE}/")
        if needs_origin and path not in origins:
            files.append(path)
    return files


def code_license_text(roots: list[Path]) -> bytes | None:
    """Returns the license text of atom: from the first root that has one, else from the installed wheel."""
    for root in roots:
        if (root / "LICENSE").is_file():
            return (root / "LICENSE").read_bytes()
    for distribution in importlib.metadata.distributions(name=DISTRIBUTION):
        if text := distribution.read_text("licenses/LICENSE"):
            return text.encode()
    return None


def license_text(spdx: str, code_license: str, roots: list[Path]) -> bytes:
    """Returns the content of LICENSE.

    This is the full text if it is the license of the code and available, else the SPDX id and the address of the text.
    """
    text = code_license_text(roots)
    if spdx == code_license and text is not None:
        return text
    address = f"https://spdx.org/licenses/{spdx}.html"
    return f"SPDX-License-Identifier: {spdx}\n\nThe text of this license: {address}\n".encode()
