"""The closed list of files: those that this tool writes into each kind of repository.

A loader takes up files by their names: an adapter, a second chat template, a further shard. So a file that is not on
the list is refused, whatever it holds, and so are names that look like one on the list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache

from pipeline.core.parts import PART_NAME
from pipeline.core.source_code import PACKAGES, SUFFIXES
from pipeline.core.text import printable
from release.checks.listing import Contents
from release.checks.verdict import CheckResult, Problems
from release.facts.assemble import CODE_FILES
from release.layout import EXPORTED, PUBLIC_KEY, RETRACTED, SIGNATURE, SIZE, SUMS, TRAINING
from release.standards.bundle import DOCUMENTS, RECORDED

STANDARDS = [path for path in (*DOCUMENTS, RECORDED) if path.startswith("evidence/")]
NAMES = {
    "benchmark": "test|fresh|preferences|memorization|harness",
    "code": "|".join(map(re.escape, CODE_FILES)),
    "constraints": r"constraints[A-Za-z0-9_.-]*\.txt",
    "document": "|".join(map(re.escape, STANDARDS)),
    "encoding": r"[A-Z0-9_]+",
    "extension": r"[A-Za-z_]\w*",
    "key": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?-[0-9a-f]{12}",
    "model": rf"(?:{'|'.join(EXPORTED)})(?:-[0-9]+)?",
    "module": rf"(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*(?:{'|'.join(map(re.escape, sorted(SUFFIXES)))})",
    "node": r"[a-z0-9_]+(?:-[a-z0-9_]+)*(?:@[0-9]+)?",
    "package": "|".join(PACKAGES),
    "part": PART_NAME,
    "phase": rf"(?:{'|'.join((*TRAINING, SIZE))})(?:-[0-9]+)?",
    "recipe": r"[A-Za-z0-9_][\w.-]*\.ya?ml",
    "release": r"[a-z0-9][a-z0-9._-]*",
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


@dataclass(frozen=True)
class FileList:
    """The files of a kind of repository, by their paths, with NAMES between braces. Those with an exclamation mark are
    in every such repository.

    Attributes:
        title: The kind, for sentences.
        copied: Files that are copied from artifacts.
        generated: Files that `atom build` makes.
        others: Files that state no origin: results of the gates, and the page.
        together: {a folder: names of files that it has if it has any}; the first that fits a folder counts.
    """

    title: str
    copied: str = ""
    generated: str = ""
    others: str = ""
    together: Mapping[str, str] = field(default_factory=dict)

    @property
    def patterns(self) -> list[str]:
        """The paths of all files."""
        return _paths(f"{self.copied} {self.generated} {self.others}")

    def holds(self, path: str) -> bool:
        """Returns True if a repository of the kind may have a file of this path."""
        return path in EVERYWHERE or _compiled(" ".join(self.patterns)).fullmatch(path) is not None

    def generates(self, path: str) -> bool:
        """Returns True if `atom build` makes a file of this path."""
        return _compiled(self.generated).fullmatch(path) is not None

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
        for path in self._needed(present) if complete else ():
            if path not in present:
                yield f"{path} is missing, and {self.title} has it"

    def _needed(self, present: set[str]) -> Iterator[str]:
        """The paths that must be there, beside these files."""
        marked = f"{self.copied} {self.generated} {self.others}".split()
        yield from (path.removeprefix("!") for path in marked if path.startswith("!"))
        for folder in sorted({path.rpartition("/")[0] for path in present}) if self.together else ():
            names = next((names for place, names in self.together.items() if fits(place, folder)), "")
            yield from (f"{folder}/{name}" for name in names.split())


def fits(pattern: str, path: str) -> bool:
    """Returns True if a path with NAMES between braces is the pattern of another one."""
    return _compiled(pattern).fullmatch(path) is not None


def _paths(text: str) -> list[str]:
    return [path.removeprefix("!") for path in text.split()]


@cache
def _compiled(patterns: str) -> re.Pattern[str]:
    """The regular expression of paths with NAMES between braces."""
    alternatives = []
    for pattern in _paths(patterns):
        parts = re.split(r"\{(\w+)\}", pattern)
        texts = [f"(?:{NAMES[part]})" if number % 2 else re.escape(part) for number, part in enumerate(parts)]
        alternatives.append("".join(texts))
    return re.compile("|".join(alternatives), re.ASCII)


def _shown(path: str) -> str:
    """A path in which a letter of another script does not look like one of ours."""
    return path if path.isascii() else f"{printable(path)} ({path.encode('unicode_escape').decode()})"


WEIGHTS = "model.safetensors model-{shard}.safetensors model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
TOKENIZER = "!tokenizer.json !tokenizer_config.json !chat_template.jinja !training_chat_template.jinja"
LOADED = f"!config.json !generation_config.json {TOKENIZER}"
CARD = "!README.md !LICENSE"
MODELS = FileList(
    "a model repository",
    copied=f"""
        {LOADED} {WEIGHTS} !parity.json base.json training/{{phase}}.jsonl
        evaluation/{{model}}.json evaluation/{{benchmark}}/{{model}}.json
        evaluation/contamination/report.json evaluation/memorization/scores.json
        evaluation/harness/scores.json evaluation/harness/tasks.json
    """,
    generated=f"""
        {CARD} !goldens.json serve.yaml prediction.json .eval_results/{{release}}-data.yaml
        training.png experts.png !progress.png inference.png reinforcement.png
    """,
)
MEASURED = "!loss.json evaluation/{table}.parquet"
GGUF = FileList("a variant in GGUF", f"model-{{encoding}}.gguf {MEASURED}", CARD)
PEFT = FileList(
    "an adapter", f"!adapter_config.json !{ADAPTER} !base.json generation_config.json {TOKENIZER} {MEASURED}", CARD
)
SAFETENSORS = FileList("a variant in safetensors", f"{LOADED} {WEIGHTS} {MEASURED}", CARD)
CHECKPOINTS = FileList("a checkpoint", f"!state.json {WEIGHTS} {WEIGHTS.replace('model', 'optimizer')}", "!LICENSE")
CHECKPOINTS_MAIN = FileList("the main branch of the checkpoints", "", f"{CARD} !index.json")
DATA = """
    kept/{source}/{part} dispositions/{source}/{part} tokens/documents/{source}/{part} generated/{source}/{part}
    measures/{source}/{part} sources/{source}.json opt_out.json
"""
TABLES = ("{part}", "{table}/{part}", "{table}/{source}/{part}", "{table}.parquet", "{table}.json", "{table}.jsonl")
DATASET = FileList(
    "a data repository",
    copied=f"""
        {DATA} !summary.json !tokens/meta.json !tokens/tokenizer_stats.json
        order/{{phase}}/{{part}} order/{{phase}}/meta.json
        {" ".join(f"earlier/{{key}}/{name}" for name in TABLES)}
        !evaluation/items.parquet evaluation/{{table}}.parquet evaluation/chat.jsonl
        evaluation/{{model}}/{{table}}.parquet evaluation/{{model}}/scores.json
        evaluation/{{benchmark}}/{{model}}/{{table}}.parquet evaluation/{{benchmark}}/{{model}}/scores.json
        evaluation/harness/{{model}}/tasks.json evaluation/contamination/items.parquet
        evaluation/contamination/report.json evaluation/fresh/chat.jsonl evaluation/fresh/meta.json
        rl/{{phase}}/tasks.jsonl rl/{{phase}}/probes.json rl/{{phase}}/{{table}}.parquet
    """,
    generated=f"""
        {CARD} !NOTICE license_texts/python.txt !merkle.json !croissant.json !filter_agreement.json
        references.json composition.png !evaluation/canary.json kept/{{source}}/{{part}}
        attribution/{{source}}/{{part}} notices/{{source}}/{{part}}
        messages/{{source}}/{{table}}/{{part}}
    """,
    together={
        "order/{phase}": "meta.json",
        "evaluation/contamination": "items.parquet report.json",
        "evaluation/fresh": "chat.jsonl meta.json",
        "evaluation/{model}": "documents.parquet items.parquet scores.json",
        "evaluation/preferences/{model}": "pairs.parquet scores.json",
        "evaluation/memorization/{model}": "documents.parquet scores.json",
        "evaluation/harness/{model}": "items.parquet scores.json tasks.json",
        "evaluation/{benchmark}/{model}": "answers.parquet scores.json",
    },
)
EVIDENCE = FileList(
    "the evidence repository",
    copied="""
        evidence/base.json evidence/parity/{model}.json evidence/parity/reward.json
        evidence/training/{phase}/training.jsonl evidence/training/{phase}/summary.json
    """,
    generated=f"""
        {CARD} !evidence/release.json !evidence/origins.json !evidence/recipe.json !evidence/environment.json
        !evidence/runtimes.json !evidence/independent_verifier.py {" ".join(f"!{path}" for path in STANDARDS)}
        evidence/manifests/{{node}}.json evidence/manifests/{{key}}.json evidence/statements/{{sha256}}.json
        evidence/metrics/{{node}}.jsonl evidence/metrics/{{key}}.jsonl evidence/opt_out/{{sha256}}.json
        evidence/attestations/evaluation-{{model}}.json evidence/changes.json evidence/prediction/prediction.json
        evidence/prediction/manifest.json evidence/prediction/statement.json
        !code/LICENSE !code/README.md code/{{code}} code/{{constraints}} code/{{package}}/{{module}}
        code/as-run/recipes/{{recipe}} code/as-run/data_recipes/{{recipe}}
        code/as-run/data_recipes/{{extension}}/{{module}}
    """,
    others="!evidence/SHA256SUMS !evidence/gates.json !evidence/attestations/gates.json !site/index.html",
)
KINDS = {
    "model": MODELS,
    "checkpoint": CHECKPOINTS,
    "repository": CHECKPOINTS_MAIN,
    "dataset": DATASET,
    "evidence": EVIDENCE,
}
PLACES = {
    "dataset": "dataset",
    "checkpoints": "repository",
    "checkpoints/{phase}-step-{step}": "checkpoint",
    "model": "model",
    "model-{model}": "model",
    "variant-{variant}": "variant",
}
"""{folder of a release: the kind of its repository}; the root is that of the evidence."""


def list_of(kind: str, paths: Iterable[str]) -> FileList:
    """Returns the list of a repository.

    Args:
        kind: As `listing.kind_of` names it.
        paths: The files of the repository, which show the form of a variant.
    """
    if kind != "variant":
        return KINDS[kind]
    names = set(paths)
    if any(name.endswith(".gguf") for name in names):
        return GGUF
    return PEFT if ADAPTER in names else SAFETENSORS


def generates(path: str) -> bool:
    """Returns True if `atom build` makes a file of this path of a release, rather than copies it from an artifact."""
    folder = place_of(path)
    kind = kind_of_place(folder)
    return list_of(kind, ()).generates(path.removeprefix(f"{folder}/"))


def place_of(path: str) -> str:
    """The folder of the repository that a file of a release is in; "" is the root."""
    parts = path.split("/")
    above = ["/".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
    return next((folder for folder in above if kind_of_place(folder)), "")


def kind_of_place(folder: str) -> str:
    """The kind of the repository in a folder of a release; "" for a folder that is no repository of its own."""
    if not folder:
        return "evidence"
    return next((kind for place, kind in PLACES.items() if fits(place, folder)), "")


def check(contents: Contents) -> CheckResult:
    """Checks that a folder has the files of its kind: none that is not on the list, and none missing."""
    name, folder = "file_list", contents.folder
    if contents.kind == "release" and contents.missing:
        return CheckResult(name, None, "not checked, because parts of the release are missing")
    complete = not (folder / RETRACTED).exists()
    problems: Problems = []
    for place in contents.places:
        kind = contents.kind if contents.kind != "release" else kind_of_place(place.folder)
        if not kind:
            problems.append(f"{_shown(place.folder)} is no folder of a release")
            continue
        paths = contents.present_in(place)
        prefix = f"{place.folder}/".lstrip("/")
        problems += [prefix + text for text in list_of(kind, paths).problems(paths, complete)]
    detail = problems[0] if problems else "every file is one that atom writes"
    return CheckResult(name, not problems, detail, problems)
