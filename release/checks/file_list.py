"""The closed list of files: those that this tool writes into each kind of repository.

A loader takes up files by their names: an adapter, a second chat template, a further shard. So a file that is not on
the list is refused, whatever it holds, and so are names that look like one on the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from pipeline.core.code_snapshot import PACKAGES, SUFFIXES
from pipeline.core.parts import PART_NAME
from pipeline.core.text import printable
from release import schema, schema_v2
from release.assembly.assemble import CODE_FILES
from release.assembly.message_tables import FOLDER as MESSAGES
from release.cards import composition, plot, scaling_plots
from release.checks.formats import PAGE_FILES
from release.checks.listing import Contents
from release.checks.verdict import CheckResult, Problems
from release.data_layout import ATTRIBUTION, GENERATED, NOTICES
from release.layout import (
    ALL_SUMS,
    EXPORTED,
    FILTER_AGREEMENT,
    FORMAT,
    GATES,
    GATES_STATED,
    GOLDENS,
    LICENSE_TEXTS,
    LOSS,
    MODEL,
    NOTICE,
    OPT_OUTS,
    ORIGINS,
    PAGE,
    PUBLIC_KEY,
    RECIPE,
    REFERENCES,
    RELEASE,
    RETRACTED,
    ROOTS,
    RUNTIMES,
    SECOND_VERIFIER,
    SIGNATURE,
    SIZE,
    SUMS,
    TRAINING,
    VARIANT,
)
from release.standards.bundle import DOCUMENTS, RECORDED
from stages.data.table import MEASURES
from stages.data.tokenizer import TOKENIZER_FILES
from stages.train.imported_weights import NAME as BASE

NAMES = {
    "source": r"[a-z][a-z0-9_]*",
    "name": r"[a-z0-9][a-z0-9._-]*",  # of a release
    "model": rf"(?:{'|'.join(dict.fromkeys((*EXPORTED, *schema_v2.MODELS)))})(?:-[0-9]+)?",
    "phase": rf"(?:{'|'.join(dict.fromkeys((*TRAINING, SIZE, *schema_v2.PHASES)))})(?:-[0-9]+)?",
    "step": r"[0-9]+",
    "benchmark": "test|fresh|preferences|memorization|harness",
    "node": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?",
    "key": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?-[0-9a-f]{12}",
    "table": r"[a-z_]+",
    "part": PART_NAME,
    "shard": r"[0-9]{5}-of-[0-9]{5}",
    "encoding": r"[A-Z0-9_]+",
    "sha256": r"[0-9a-f]{64}",
    "package": "|".join(PACKAGES),
    "module": rf"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))})",
    "recipe": r"[^/]+\.ya?ml",
    "constraints": r"constraints[A-Za-z0-9_.-]*\.txt",
    "variant": r"[a-z0-9_-]+",
    "page": PAGE_FILES.pattern,
}
"""The pattern of each name that may stand in a path between braces."""
EVERYWHERE = (SUMS, SIGNATURE, PUBLIC_KEY, RETRACTED, ".gitattributes")
"""Files that any repository may have: checksums, a signature, a tombstone, and what the Hub adds."""


@dataclass(frozen=True)
class FileList:
    """The files of a kind of repository.

    Attributes:
        title: The kind, for sentences.
        copied: Paths of files that are copied from artifacts, with NAMES between braces.
        generated: Paths of files that `atom build` makes.
        needed: The paths without which no such repository is complete.
        others: Further paths, of files that state no origin: the results of the gates, and the page.
        together: {a folder: names of files that it has if it has any}; the first that fits a folder counts.
    """

    title: str
    copied: tuple[str, ...]
    generated: tuple[str, ...]
    needed: tuple[str, ...]
    others: tuple[str, ...] = ()
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def holds(self, path: str) -> bool:
        """Returns True if a repository of the kind may have a file of this path."""
        return path in EVERYWHERE or matches((*self.copied, *self.generated, *self.others), path)

    def problems(self, paths: Iterable[str], complete: bool = True) -> Iterator[str]:
        """Sentences about files that are not on the list, and about missing ones.

        Args:
            paths: The files of the repository, from its folder.
            complete: Whether the needed files must be there.
        """
        present = set(paths)
        for path in sorted(present):
            if not self.holds(path):
                yield f"{_shown(path)} is no file of {self.title}; a release holds what atom writes, and nothing else"
        for path in self._wanted(present) if complete else ():
            if path not in present:
                yield f"{path} is missing, and {self.title} has it"

    def _wanted(self, present: set[str]) -> Iterator[str]:
        """The paths that must be there, beside these files."""
        yield from self.needed
        for folder in sorted({path.rpartition("/")[0] for path in present}) if self.together else ():
            names = next((names for place, names in self.together.items() if matches([place], folder)), ())
            yield from (f"{folder}/{name}" for name in names)


def matches(patterns: Iterable[str], path: str) -> bool:
    return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


_COMPILED: dict[str, re.Pattern[str]] = {}


def _compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a path with NAMES between braces."""
    if pattern not in _COMPILED:
        parts = re.split(r"\{(\w+)\}", pattern)
        texts = [f"(?:{NAMES[part]})" if number % 2 else re.escape(part) for number, part in enumerate(parts)]
        _COMPILED[pattern] = re.compile("".join(texts), re.ASCII)
    return _COMPILED[pattern]


def _shown(path: str) -> str:
    """A path in which a letter of another script does not look like one of ours."""
    return path if path.isascii() else f"{printable(path)} ({path.encode('unicode_escape').decode()})"


def _weights(stem: str) -> tuple[str, ...]:
    """The files of the tensors of one stem."""
    return f"{stem}.safetensors", f"{stem}-{{shard}}.safetensors", f"{stem}.safetensors.index.json"


CARD, LICENSE = "README.md", "LICENSE"
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
LOADED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
"""The files of a model that loaders read beside its weights."""

MODELS = FileList(
    "a model repository",
    copied=(
        *LOADED, *_weights("model"), "parity.json", BASE, "training/{phase}.jsonl", "evaluation/{model}.json",
        "evaluation/{benchmark}/{model}.json", "evaluation/contamination/report.json",
        "evaluation/memorization/scores.json", "evaluation/harness/scores.json", "evaluation/harness/tasks.json",
    ),
    generated=(
        CARD, LICENSE, GOLDENS, "serve.yaml", "prediction.json", ".eval_results/{name}-data.yaml", *plot.NAMES,
        *scaling_plots.NAMES,
    ),
    needed=(CARD, LICENSE, GOLDENS, scaling_plots.PROGRESS, "parity.json", *LOADED),
)  # fmt: skip
_MEASURED = (LOSS, "evaluation/{table}.parquet")
_ABOUT = (CARD, LICENSE)
VARIANTS = {
    "gguf": FileList(
        "a variant in GGUF", ("model-{encoding}.gguf", *_MEASURED), _ABOUT, (*_ABOUT, LOSS)
    ),
    "peft": FileList(
        "an adapter",
        (ADAPTER_CONFIG, ADAPTER, BASE, "generation_config.json", *TOKENIZER_FILES, *_MEASURED),
        _ABOUT,
        (*_ABOUT, LOSS, ADAPTER_CONFIG, ADAPTER, BASE, *TOKENIZER_FILES),
    ),
    "safetensors": FileList(
        "a variant in safetensors", (*LOADED, *_weights("model"), *_MEASURED), _ABOUT, (*_ABOUT, LOSS, *LOADED)
    ),
}  # fmt: skip
"""By the form of the weights; a repository has one."""
CHECKPOINTS = FileList(
    "a checkpoint", (*_weights("model"), *_weights("optimizer"), "state.json"), (LICENSE,), (LICENSE, "state.json")
)
CHECKPOINTS_MAIN = FileList(
    "the main branch of the checkpoints", (), (CARD, LICENSE, "index.json"), (CARD, LICENSE, "index.json")
)
_TABLES_OF_DOCUMENTS = tuple(
    f"{folder}/{{source}}{end}"
    for folder in ("kept", "dispositions", "tokens/documents", GENERATED, MEASURES)
    for end in ("/{part}", ".parquet")
)
_DATA = (
    *_TABLES_OF_DOCUMENTS, "dispositions.parquet", "summary.json", "sources/{source}.json", OPT_OUTS,
    "tokens/documents.parquet", "tokens/meta.json", "tokens/tokenizer_stats.json",
)  # fmt: skip
_ORDER = ("{part}", "order.parquet", "meta.json")
DATASET = FileList(
    "a data repository",
    copied=(
        *_DATA, *(f"order/{{phase}}/{name}" for name in _ORDER),
        *(f"earlier/{{key}}/{name}" for name in (*_DATA, *_ORDER, "documents/{source}/{part}", "documents.parquet")),
        "evaluation/items.parquet", "evaluation/chat.jsonl", "evaluation/{table}.parquet",
        *(f"evaluation/{{model}}/{name}" for name in ("{table}.parquet", "scores.json")),
        *(f"evaluation/{{benchmark}}/{{model}}/{name}" for name in ("{table}.parquet", "scores.json", "tasks.json")),
        "evaluation/contamination/items.parquet", "evaluation/contamination/report.json", "evaluation/fresh/chat.jsonl",
        "evaluation/fresh/meta.json", "rl/{phase}/tasks.jsonl", "rl/{phase}/{table}.parquet",
    ),
    generated=(
        CARD, LICENSE, NOTICE, f"{LICENSE_TEXTS}/python.txt", ROOTS, "croissant.json", FILTER_AGREEMENT, REFERENCES,
        composition.NAME, "evaluation/canary.json", "kept/{source}/{part}",
        *(f"{folder}/{{source}}{end}" for folder in (ATTRIBUTION, NOTICES) for end in ("/{part}", ".parquet")),
        f"{MESSAGES}/{{source}}/{{table}}/{{part}}",
    ),
    needed=(
        CARD, LICENSE, NOTICE, ROOTS, "croissant.json", FILTER_AGREEMENT, "evaluation/canary.json", "summary.json",
        "evaluation/items.parquet", "tokens/meta.json", "tokens/tokenizer_stats.json",
    ),
    together={
        "order/{phase}": ("meta.json",),
        "evaluation/contamination": ("items.parquet", "report.json"),
        "evaluation/fresh": ("chat.jsonl", "meta.json"),
        "evaluation/{model}": ("documents.parquet", "items.parquet", "scores.json"),
        "evaluation/preferences/{model}": ("pairs.parquet", "scores.json"),
        "evaluation/memorization/{model}": ("documents.parquet", "scores.json"),
        "evaluation/harness/{model}": ("items.parquet", "scores.json", "tasks.json"),
        "evaluation/{benchmark}/{model}": ("answers.parquet", "scores.json"),
    },
)  # fmt: skip
_STANDARDS = tuple(path for path in (*DOCUMENTS, RECORDED) if path.startswith("evidence/"))
_RECORDS = (RELEASE, ORIGINS, RECIPE, "evidence/environment.json", RUNTIMES, SECOND_VERIFIER)
EVIDENCE = FileList(
    "the evidence repository",
    copied=(f"evidence/{BASE}", "evidence/parity/{model}.json", "evidence/parity/reward.json",
            *(f"evidence/training/{{phase}}/{name}" for name in ("training.jsonl", "summary.json"))),
    generated=(
        CARD, LICENSE, *_RECORDS, *_STANDARDS, "evidence/changes.json",
        "evidence/manifests/{node}.json", "evidence/manifests/{key}.json", "evidence/statements/{sha256}.json",
        "evidence/metrics/{node}.jsonl", "evidence/metrics/{key}.jsonl", "evidence/opt_out/{sha256}.json",
        "evidence/attestations/evaluation-{model}.json",
        *(f"evidence/prediction/{name}.json" for name in ("prediction", "manifest", "statement")),
        *(f"code/{name}" for name in CODE_FILES), "code/{constraints}", "code/{package}/{module}",
        "code/as-run/recipes/{recipe}", "code/as-run/data_recipes/{recipe}",
    ),
    needed=(CARD, LICENSE, *_RECORDS, *_STANDARDS, ALL_SUMS, GATES, GATES_STATED, "code/LICENSE", PAGE),
    others=(ALL_SUMS, GATES, GATES_STATED, "{page}"),
)  # fmt: skip


def list_of(kind: str, paths: Iterable[str]) -> FileList:
    """Returns the list of a repository.

    Args:
        kind: As `listing.kind_of` names it.
        paths: The files of the repository, which show the form of a variant.
    """
    if kind == "variant":
        names = set(paths)
        if any(name.endswith(".gguf") for name in names):
            return VARIANTS["gguf"]
        return VARIANTS["peft" if ADAPTER_CONFIG in names else "safetensors"]
    return {
        "model": MODELS, "checkpoint": CHECKPOINTS, "repository": CHECKPOINTS_MAIN, "dataset": DATASET,
        "evidence": EVIDENCE,
    }[kind]  # fmt: skip


def generates(path: str) -> bool:
    """Returns True if `atom build` makes a file of this path of a release, rather than copies it from an artifact."""
    parts = path.split("/")
    folders = ("/".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1))
    folder = next(folder for folder in folders if kind_of_place(folder))
    lists = VARIANTS.values() if (kind := kind_of_place(folder)) == "variant" else [list_of(kind, ())]
    return any(matches(each.generated, path.removeprefix(f"{folder}/")) for each in lists)


def kind_of_place(folder: str) -> str:
    """The kind of the repository in a folder of a release; "" for a folder that no release has."""
    for pattern, kind in PLACES.items():
        if _compiled(pattern).fullmatch(folder):
            return kind
    return ""


PLACES = {
    "": "evidence", "dataset": "dataset", "checkpoints": "repository", "checkpoints/{phase}-step-{step}": "checkpoint",
    MODEL: "model", f"{MODEL}-{{model}}": "model", f"{VARIANT}-{{variant}}": "variant",
}  # fmt: skip


def check(contents: Contents) -> CheckResult:
    """Checks that a folder has the files of its kind: none that is not on the list, and none missing."""
    name, folder = "file_list", contents.folder
    if contents.kind == "release" and contents.missing:
        return CheckResult(name, None, "not checked, because parts of the release are missing")
    number = schema.stated(folder).format
    complete = number == FORMAT and not (folder / RETRACTED).exists()
    problems: Problems = []
    for place in contents.places:
        kind = contents.kind if contents.kind != "release" else kind_of_place(place.folder)
        if not kind:
            problems.append(f"{_shown(place.folder)} is no folder of a release")
            continue
        paths = contents.present_in(place)
        prefix = f"{place.folder}/".lstrip("/")
        problems += [prefix + text for text in list_of(kind, paths).problems(paths, complete)]
    reason = f"skipped: which files a release of format {number} must have, this atom does not know"
    skipped = [] if number == FORMAT else [reason]
    detail = problems[0] if problems else "every file is one that atom writes"
    return CheckResult(name, not problems, detail, problems, skipped)
