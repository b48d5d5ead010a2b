"""The layout of a release folder, and the names of phases and models in it.

    model/ model-<name>/ dataset/      one repository each: the final model, the earlier ones, the data
    variant-<name>/                    one repository each: the final model's weights in another form
    checkpoints/<phase>-step-<n>/      one branch each of the checkpoint repository, whose main branch is checkpoints/*
    README.md code/ evidence/ site/    the evidence repository: the root of the release folder itself

Every repository (and every checkpoint branch) carries its own `SHA256SUMS`, so that a pulled copy can be checked alone,
and once it is signed a `model.sig`.
`evidence/SHA256SUMS` covers every file of the release except itself and the root's, and the root's covers it.

The tables of documents in a dataset folder are in parts by source:

    kept/<source>/part-*.parquet
    dispositions/<source>/part-*.parquet
    tokens/documents/<source>/part-*.parquet
    order/<phase>/part-*.parquet
    measures/<source>/part-*.parquet
    attribution/<source>/part-*.parquet
    notices/<source>/part-*.parquet
    generated/<source>/part-*.parquet

Part n of each table is about the documents of part n of the source. `measures` is there for sources whose steps
measure, `attribution` for licenses that ask for it, `notices` for packages, `generated` for texts of a model.
`over_parts` reads them with several processes. The folders of earlier runs, `earlier/<key>/`, have the same files.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.core.parts import part_file, part_tables
from stages.formats.table import MEASURES

SUMS = "SHA256SUMS"
"""In each repository, the checksums of its files."""
ALL_SUMS = f"evidence/{SUMS}"
"""The checksums of the whole release."""
ORIGINS = "evidence/origins.json"
"""How each file of the release was made."""
RELEASE = "evidence/release.json"
STATEMENTS = "evidence/statements"
"""The folder of the provenance statements."""
RECIPE = "evidence/recipe.json"
"""The recipe with all defaults."""
REHEARSALS = "evidence/rehearsals"
"""The folder of the rehearsals of phases, if there were any."""
CODE_README = "code/README.md"
SECOND_VERIFIER = "evidence/independent_verifier.py"
STANDARDS = "evidence/standards"
"""The folder of the documents in the forms of standards."""
GATES = "evidence/gates.json"
GATES_STATED = "evidence/attestations/gates.json"
SITE = "site"
"""The folder of the page for people, made from all other files; a release may lack it."""
PAGE = f"{SITE}/index.html"
ROOTS = "merkle.json"
"""In the dataset repository, the Merkle root of each of its tables."""
GOLDENS = "goldens.json"
"""In a model repository, token ids, text, logits and greedy continuations of fixed inputs."""
NOTICE = "NOTICE"
"""In the dataset repository, the names and notices that the licenses of its documents ask for."""
LICENSE_TEXTS = "license_texts"
"""In the dataset repository, the folder of the texts of licenses that ask to be kept with the documents."""
OPT_OUTS = "opt_out.json"
"""In the dataset repository, the requests of the deny-list, if the corpus had one."""
CURATION = "curation.json"
"""In the dataset repository, the steps of each source and what classifiers measured, if sources name pipelines."""
PREFERENCES = "rl/preferences/summary.json"
"""In the dataset repository, what was counted of the pairs of answers that others ordered, if the recipe has some."""
REFERENCES = "references.json"
"""In the dataset repository, the sources whose texts are by reference, if there are any."""
RETRACTED = "retracted.json"
"""In each repository from which documents were taken back, the tombstone."""
CANARY = "evaluation/canary.json"
SIGNATURE, PUBLIC_KEY = "model.sig", "model.pub"
"""In each repository, but in no checksum file: the signature covers the checksum files, and the fingerprint identifies
the key."""
MODEL, BASE = "model", "model-base"
"""The folders of the final model and of the base model."""
VARIANT = "variant"
"""The beginning of the folders of the final model in other forms."""
LOSS = "loss.json"
"""In a variant's repository, its loss against the original."""
RUNTIMES = "evidence/runtimes.json"
"""The outputs of other programs for the final model and its variants."""
PARTS = (MODEL, BASE, "dataset", "checkpoints")
"""The parts of every release beside its root; `model_folders` and `variant_folders` are further ones."""
TRAINING = ("pretrain", "midtrain", "longcontext", "sft", "rlvr", "dpo", "reward", "online-rlhf")
"""Kinds of phases, as `stages.graph` names them, in the order of training."""
EXPORTED = ("init", "base", "mid", "long", "sft", "rlvr", "dpo", "online-rlhf")
"""Kinds of exported models, as `stages.graph` names them, in the order of training."""
CHAT = EXPORTED[EXPORTED.index("sft") :]
"""Phases that train conversation, and the models after them."""
ORDER = (
    "init", "pretrain", "size", "base", "midtrain", "mid", "longcontext", "long", "sft", "rlvr", "dpo", "reward",
    "online-rlhf", "student", "distillation",
)  # fmt: skip
"""Kinds of phases and of exported models in one order: a model comes after the phase that made it."""
MERGE, UNMERGED = "merge-", "unmerged-"
"""The beginnings of two names: of the node that averages checkpoints of a phase, whose weights are published as a
checkpoint, and of the exported model of that phase's last checkpoint, which is measured and not published."""
WITHOUT_ORDER = ("rlvr", "dpo", "reward", "online-rlhf", "distillation")
"""Phases that sample their training data; only their replayed data has an order."""
SIZE = "size"
"""The kind of phases that train smaller models of the recipe: size-1, size-2, …"""
STUDENT = ("student", "distillation")
"""Phases that fine-tune a smaller model, and distill the final one into it; the variant `distilled` is their result."""
IMPORT = "import"
"""The node of the published model that training begins with; after it, the recipe may leave out phases."""
REWARD_EXPORT = "export-reward"
"""The node that exports the reward model, which is published with the scores that it made and not as a model."""


def when(name: str) -> tuple[int, int, str]:
    """Returns the sort key of a phase, or of an exported model.

    Numbers are compared as numbers: longcontext-2 comes before longcontext-10. Unknown names come last. An average of
    checkpoints comes after those of its phase, and a model that was not merged before the merged one.
    """
    plain = name.removeprefix(UNMERGED).removeprefix(MERGE)
    kind, number = numbered(plain)
    if kind in ORDER:
        place = "" if name.startswith(UNMERGED) else plain
        return ORDER.index(kind), number, f"{place}-merged" if name.startswith(MERGE) else place
    return len(ORDER), 0, name


def numbered(name: str) -> tuple[str, int]:
    """Returns the kind of a phase or an exported model, and its number.

    For longcontext-2 these are longcontext and 2. The number is 0 for a single one, such as online-rlhf.
    """
    match = re.fullmatch(r"(.+)-([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


def phases_of(nodes: Iterable[str]) -> list[str]:
    """Returns the training phases among a graph's nodes, in order."""
    return sorted((node for node in nodes if numbered(node)[0] in TRAINING), key=when)


def sizes_of(nodes: Iterable[str]) -> list[str]:
    """Returns the smaller models of the recipe among a graph's nodes, in order."""
    return sorted((node for node in nodes if numbered(node)[0] == SIZE), key=when)


def order_of(phase: str) -> str:
    """Returns the phase whose order of documents a phase reads.

    A smaller model reads that of pre-training, and a student of distillation that of supervised fine-tuning.
    """
    return "pretrain" if numbered(phase)[0] == SIZE else {"student": "sft"}.get(phase, phase)


def models_of(nodes: Iterable[str]) -> list[str]:
    """Returns the models that nodes export or evaluate, in the order of training.

    The last one is the model of the release.
    """
    models = set()
    for node in nodes:
        stage, _, model = node.partition("-")
        if stage in ("export", "evaluate") and node != REWARD_EXPORT:
            models.add(model)
    return sorted(models, key=when)


def trained_by(model: str) -> str:
    """Returns the phase that trained an exported model.

    It is midtrain for `mid`, longcontext-2 for `long-2`, and else the phase of the same name.
    """
    kind, number = numbered(model.removeprefix(UNMERGED))
    phase = {"base": "pretrain", "mid": "midtrain", "long": "longcontext"}.get(kind, kind)
    return f"{phase}-{number}" if number else phase


def model_name(folder: str, final: str) -> str:
    """Returns the name of the exported model in a folder. `final` is the name of the last one."""
    return final if folder == MODEL else folder.removeprefix(f"{MODEL}-")


def folders_of(models: Sequence[str]) -> dict[str, str]:
    """Returns {exported model: its folder} of models in the order of training.

    The untrained one, and those that were not merged, are only published as checkpoints.
    """
    folders = {}
    for model in models:
        if model != "init" and not model.startswith(UNMERGED):
            folders[model] = MODEL if model == models[-1] else f"{MODEL}-{model}"
    return folders


DISPOSITIONS, KEPT, TOKENS = "dispositions", "kept", "tokens/documents"
"""The folders of the tables that every source has."""
ATTRIBUTION = "attribution"
"""The folder of the tables of documents whose licenses ask for attribution."""
NOTICES = "notices"
"""The folder of the tables of the notices of packages that have such documents."""
GENERATED = "generated"
"""The folder of the tables of how each text of a model was made."""
Files = dict[str, list[Path]]
"""{source: the files of its table, in the order of their parts}, sorted by source."""


@dataclass(frozen=True)
class Part:
    """The tables of one part of the documents of a source. Each file may be missing.

    Attributes:
        source: The source.
        dispositions: The dispositions.
        kept: The kept documents.
        tokens: Their tokens.
    """

    source: str
    dispositions: Path
    kept: Path
    tokens: Path


def has_documents(dataset: Path) -> bool:
    """Returns True if a folder has dispositions, as every dataset folder does."""
    return (dataset / DISPOSITIONS).is_dir()


def kept_files(dataset: Path) -> Files:
    return _parts(dataset / KEPT)


def attribution_files(dataset: Path) -> Files:
    return _parts(dataset / ATTRIBUTION)


def disposition_files(dataset: Path) -> Files:
    return _parts(dataset / DISPOSITIONS)


def token_files(dataset: Path) -> Files:
    return _parts(dataset / TOKENS)


def all_files(files: Files) -> list[Path]:
    return [path for paths in files.values() for path in paths]


def kept_beside(dispositions: Path) -> Path:
    """Returns the table of the kept documents that a table of dispositions is about."""
    return dispositions.parents[2] / KEPT / dispositions.parent.name / dispositions.name


def notice_files(dataset: Path) -> Files:
    return _parts(dataset / NOTICES)


def generated_files(dataset: Path) -> Files:
    return _parts(dataset / GENERATED)


def measure_files(dataset: Path) -> Files:
    return _parts(dataset / MEASURES)


def document_parts(dataset: Path) -> Iterator[Part]:
    """Lists the parts of all documents, by source and number."""
    folders = [dataset / name for name in (DISPOSITIONS, KEPT, TOKENS)]
    tables = [_parts(folder) for folder in folders]
    for source in sorted(set().union(*tables)):
        names: set[str] = set()
        for files in tables:
            names.update(path.name for path in files.get(source, []))

        # A table may lack a part that another table has.
        for name in sorted(names):
            dispositions, kept, tokens = (folder / source / name for folder in folders)
            yield Part(source, dispositions, kept, tokens)


def orders(dataset: Path) -> list[Path]:
    """Lists the folders of the orders of all phases."""
    return sorted(path.parent for path in (dataset / "order").glob("*/meta.json"))


def problems(dataset: Path) -> Iterator[str]:
    """Yields a sentence for each table with missing parts."""
    for folder in (DISPOSITIONS, KEPT, TOKENS):
        for source, files in _parts(dataset / folder).items():
            if [path.name for path in files] != [part_file(number) for number in range(len(files))]:
                yield f"{folder}/{source} does not have the parts 0 to {len(files) - 1}"


def _parts(folder: Path) -> Files:
    """Lists the parts of a table, in a folder with a folder for each source; sources without parts are left out."""
    if not folder.is_dir():
        return {}
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    parts = {path.name: part_tables(path) for path in folders}
    return {source: files for source, files in parts.items() if files}


MOST_ALONE = 64 << 20
"""Bytes of parts that one process reads alone: to start a second one would take about as long."""
Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def over_parts(work: Callable[[Piece], Result], parts: Sequence[Piece], files: Sequence[Path]) -> Iterator[Result]:
    """Yields the result of `work` for each part, in their order.

    Each process holds what one part needs, so memory grows with the cores and not with the parts. `work`, parts and
    results must be picklable. `files` are those that are read; their size decides whether processes are worth it.
    Raises the errors of `work`.
    """
    processes = min(cores(), len(parts))
    size = sum(path.stat().st_size for path in files if path.exists())
    if processes < 2 or size <= MOST_ALONE:
        yield from map(work, parts)
        return

    # A fork would copy the threads' locks of Arrow in an unknown state.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(work, parts)
    finally:
        # A caller that stops early does not wait for parts that have not begun.
        pool.shutdown(cancel_futures=True)
