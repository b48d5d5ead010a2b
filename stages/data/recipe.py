"""The data recipe: its sources, their licenses and readers, and the curation steps of each.

`load("tiny")` reads the packaged recipe `data_recipes/tiny.yaml`; a path reads that file. Nothing heavy is imported
here, since `atom plan` needs the recipe and the digests of the source trees before any stage runs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from pipeline.core.bounds import MOST_SOURCES, Key, License, Line, LongLine, Range, Share, SourceName, Text, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Renamed, added, operational
from pipeline.core.store import canonical, sha256_bytes, sha256_file
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import explain, find
from stages.data.filters.settings import MOST_STEPS, AnyStep, CurationSettings, Kind
from stages.data.synthetic.passkeys import min_characters
from stages.data.synthetic.problems import FORMS, TASKS

MOST_ENTRIES = 100_000
"""Files and folders under a source's path; FineWeb-Edu, of 1.3 trillion tokens, has some two thousand."""

Documents = Annotated[int, Range(1, 1e12)]
Drawn = Annotated[int, Range(1, 1e8, "they are drawn in memory")]
"""Procedural documents."""
Characters = Annotated[int, Range(1, 1e7)]
Shares = Annotated[dict[Key, Annotated[float, Range(0, 1000, above=True)]], Field(min_length=1, max_length=100)]
"""Weights of tasks by name; they need not sum to 1."""
Column = Line
"""The name of a field or column in files of others."""
HeldoutFraction = Annotated[float, Range(0, 1, below=True)]


class StdlibDocstrings(Config):
    """Docstrings of modules, classes and functions of the running Python's standard library."""

    reader: Literal["stdlib-docstrings"] = Field(description="selects this reader")
    modules: Literal["all", "top-level"] = Field("all", description="modules to read; top-level leaves packages out")
    limit: Documents | None = Field(
        None, description="maximum number of documents, chosen by a seeded hash of the id; null: all"
    )


class StdlibSource(Config):
    """Functions and methods of the standard library, or its whole files.

    Docstrings are removed, so that no held-out docstring is trained on inside its function.
    """

    reader: Literal["stdlib-source"] = Field(description="selects this reader")
    unit: Literal["function", "file"] = added("function", "what one document is; use only one of them in a data recipe")
    modules: Literal["all", "top-level"] = Field("all", description="modules to read; top-level leaves packages out")
    limit: Documents | None = Field(
        None, description="maximum number of documents, chosen by a seeded hash of the id; null: all"
    )


class Jsonl(Config):
    """JSON Lines files, plain or gzip; `path` is a file or a folder of *.jsonl and *.jsonl.gz."""

    reader: Literal["jsonl"] = Field(description="selects this reader")
    path: LongLine = operational(..., "file or folder; the tree digest, not the path, is part of the key")
    text_field: Column = Field("text", description="field with the text of a document")
    messages_field: Column | None = added(
        None, "field with messages (role, content, reasoning_content), read instead of text_field"
    )
    id_field: Column | None = Field(
        None, description="field with a unique id; null: the id is file name and line number"
    )
    license_field: Column | None = added(
        None, "field with the SPDX license of a document, or a list of them; null: the source's"
    )
    limit: Documents | None = Field(
        None, description="maximum number of documents, chosen by a seeded hash of the id; null: all"
    )


class Parquet(Config):
    """Parquet files; `path` is a file or a folder of *.parquet."""

    reader: Literal["parquet"] = Field(description="selects this reader")
    path: LongLine = operational(..., "file or folder; the tree digest, not the path, is part of the key")
    text_field: Column = Field("text", description="field with the text of a document")
    messages_field: Column | None = added(
        None, "field with messages (role, content, reasoning_content), read instead of text_field"
    )
    id_field: Column | None = Field(
        None, description="field with a unique id; null: the id is file name and row number"
    )
    license_field: Column | None = added(
        None, "field with the SPDX license of a document, or a list of them; null: the source's"
    )
    limit: Documents | None = Field(
        None, description="maximum number of documents, chosen by a seeded hash of the id; null: all"
    )


class Problems(Config):
    """Procedural problems, drawn with the seed of the recipe."""

    reader: Literal["problems"] = Field(description="selects this reader")
    tasks: Shares = Field(description="weights of tasks by name; they need not sum to 1")
    form: Literal["plain", "worked"] = Field(
        description="plain: question and answer; worked: with the steps between them"
    )
    count: Drawn = Field(description="number of problems")

    @model_validator(mode="after")
    def _check_tasks(self) -> Problems:
        return _require_known_tasks(self)


assert set(FORMS) == {"plain", "worked"}


class Passkeys(Config):
    """Documents with a passkey to retrieve, in filler text from docstrings of the standard library.

    Lengths are drawn log-uniformly from `min_chars` to `max_chars`. Filler comes from PSF-2.0 text, the rest is this
    project's, so the license is `PSF-2.0 AND Apache-2.0`.
    """

    reader: Literal["passkeys"] = Field(description="selects this reader")
    count: Drawn = Field(description="number of documents")
    min_chars: Characters = Field(description="minimum length of a document in characters")
    max_chars: Characters = Field(description="maximum length of a document in characters")
    digits: Annotated[int, Range(2, 9)] = Field(
        6, description="digits of a passkey, all different; few digits give too few keys to generalize from"
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> Passkeys:
        minimum = min_characters(self.digits)
        if self.min_chars < minimum:
            raise ValueError(
                f"min_chars = {self.min_chars} leaves no room for key and question; use at least {minimum}"
            )
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars = {self.max_chars} is below min_chars = {self.min_chars}; raise it")
        return self


class ChatProblems(Config):
    """Procedural problems as conversations, some of whose answers reason first."""

    reader: Literal["chat-problems"] = Field(description="selects this reader")
    tasks: Shares = Field(description="weights of tasks by name; they need not sum to 1")
    thinking: Share = Field(description="share of answers that show their steps first")
    count: Drawn = Field(description="number of conversations")

    @model_validator(mode="after")
    def _check_tasks(self) -> ChatProblems:
        return _require_known_tasks(self)


P = TypeVar("P", Problems, ChatProblems)


def _require_known_tasks(reader: P) -> P:
    unknown = sorted(set(reader.tasks) - set(TASKS))
    if unknown:
        raise ValueError(f"tasks: unknown task {unknown[0]}; known are {', '.join(sorted(TASKS))}")
    return reader


class Courtesies(Config):
    """Requests for a courteous note, with answers of mixed quality (stages/data/synthetic/courtesy_notes.py)."""

    reader: Literal["courtesies"] = Field(description="selects this reader")
    count: Drawn = Field(description="number of conversations")


Reader = Annotated[
    StdlibDocstrings | StdlibSource | Jsonl | Parquet | Problems | Passkeys | ChatProblems | Courtesies,
    Field(discriminator="reader"),
]


CHATS = (ChatProblems, Courtesies)


TreeDigest = Annotated[str, Words(71, "digest: write auto, or sha256:<64 hex digits>", r"auto|sha256:[0-9a-f]{64}")]


class Source(Config):
    """Settings for acquiring one source."""

    name: SourceName = Field(description="name of the source, as in the mix of a phase")
    kind: Kind = Field(description="kind of the documents; chat: conversations")
    license: License = Field(description="SPDX license; with reader.license_field, that of the collection as a whole")
    license_evidence: Text = Field(description="text or URL that shows the license")
    origin: Text = Field(description="URL or text that states where the source comes from")
    tree_digest: TreeDigest = Field(
        "auto", description="expected digest of the files; auto: computed from the files present"
    )
    reader: Reader = Field(description="reader of the documents")

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name == "items":
            raise ValueError("`items` is the role of the evaluation items; choose another name")
        return name

    @model_validator(mode="after")
    def _check_kind(self) -> Source:
        chat = isinstance(self.reader, CHATS) or bool(getattr(self.reader, "messages_field", None))
        if chat != (self.kind == "chat"):
            raise ValueError(
                f"kind = {self.kind}, but reader {self.reader.reader} gives {'conversations' if chat else 'plain text'}"
                f"; {'use kind: chat' if chat else 'conversations come from messages_field and the chat readers'}"
            )
        return self


class SourceConfig(Source):
    """A source of a data recipe: how its documents are acquired and curated."""

    heldout_fraction: Annotated[HeldoutFraction | None, Renamed("heldout")] = Field(
        None, description="held-out fraction of this source; null: that of the data recipe"
    )
    steps: tuple[AnyStep, ...] = Field((), max_length=MOST_STEPS, description="curation steps, in order")


class DataRecipe(Config):
    """A data recipe: one file of `data_recipes/`."""

    name: Key = Field(description="name of the data recipe")
    description: Text = Field(description="short description of the corpus")
    sources: tuple[SourceConfig, ...] = Field(
        min_length=1, max_length=MOST_SOURCES, description="sources of the corpus"
    )
    curation: CurationSettings = Field(CurationSettings(), description="curation of all sources together")
    heldout_fraction: Annotated[HeldoutFraction, Renamed("heldout")] = Field(
        0.05, description="share of documents, by content hash, held out from training; 0 for problems"
    )

    @model_validator(mode="after")
    def _check_distinct(self) -> DataRecipe:
        counts = Counter(source.name for source in self.sources)
        duplicates = sorted(name for name, count in counts.items() if count > 1)
        if duplicates:
            raise ValueError(f"two sources are named {duplicates[0]}; names must differ")
        return self

    def resolved(self) -> DataRecipe:
        """The recipe with every tree digest computed from the files on disk. Raises RecipeError if a pin differs."""
        sources = tuple(s.model_copy(update={"tree_digest": resolve_tree_digest(s)}) for s in self.sources)
        return self.model_copy(update={"sources": sources})

    def present(self) -> tuple[DataRecipe, tuple[str, ...]]:
        """As `resolved`, but sources with missing files keep their digest: a pinned one, or `auto`. Also returns a
        message for each of those."""
        sources, sentences = [], []
        for source in self.sources:
            missing, digest = missing_files(source), source.tree_digest
            if missing is None:
                digest = resolve_tree_digest(source)
            else:
                keys = "; keys below are provisional" if digest == "auto" else ""
                sentences.append(f"{missing}; put it there before running{keys}")
            sources.append(source.model_copy(update={"tree_digest": digest}))
        return self.model_copy(update={"sources": tuple(sources)}), tuple(sentences)

    def acquire_config(self, source: str, seed: int) -> dict[str, Any]:
        """The config of stage acquire for one source: without its curation steps, which must not re-acquire it."""
        source_config = next(s for s in self.sources if s.name == source)
        return {"source": source_config.model_dump(include=set(Source.model_fields)), "seed": seed}

    def filter_config(self, seed: int) -> dict[str, Any]:
        """The config of stage filter for all sources."""
        sources = [
            {"name": s.name, "kind": s.kind, "steps": [step.model_dump() for step in s.steps]} for s in self.sources
        ]
        return {"sources": sources, "curation": self.curation.model_dump(), "seed": seed}

    def dedup_config(self) -> dict[str, Any]:
        """The config of stage dedup for all sources."""
        sources = [{"name": s.name, "kind": s.kind, "heldout_fraction": self._heldout(s)} for s in self.sources]
        curation = self.curation.model_dump()
        return {"sources": sources, "minhash": curation["minhash"], "shards": curation["shards"]}

    @property
    def conversations(self) -> tuple[str, ...]:
        """The sources whose documents are turns of conversations."""
        return tuple(source.name for source in self.sources if source.kind == "chat")

    def _heldout(self, source: SourceConfig) -> float:
        if source.heldout_fraction is not None:
            return source.heldout_fraction
        return 0.0 if source.kind == "problems" else self.heldout_fraction


def load(name_or_path: str | Path) -> DataRecipe:
    """A data recipe by packaged name or by path; relative file paths inside are relative to the YAML.

    Raises RecipeError in one sentence: no such recipe, not YAML, or the first field that is wrong and its fix.
    """
    path = find(str(name_or_path), "data_recipes", "data recipe")
    return loads(read_file(path, _title(path)), path)


def _title(path: Path) -> str:
    return f"data recipe {escaped(path.stem, 80)}"


def loads(content: bytes, path: Path) -> DataRecipe:
    """As `load`, from the bytes that were read from `path`."""
    title = _title(path)
    raw = parse_yaml(content, title)
    _require_licenses(title, raw)
    try:
        recipe = DataRecipe.model_validate(raw)
    except ValidationError as error:
        raise explain(error, DataRecipe, title, raw) from None
    return recipe.model_copy(update={"sources": tuple(_absolute(s, path.parent) for s in recipe.sources)})


def resolve_tree_digest(source: Source) -> str:
    """`sha256:` over the sorted (relative path, sha256) of the files that the source's reader reads.

    Procedural sources read none. Raises RecipeError if the files are not there or a pinned digest differs.
    """
    files = source_files(source)
    rows = [[relative, sha256_file(path)] for relative, path in files]
    digest = f"sha256:{sha256_bytes(canonical(rows))}"
    if source.tree_digest not in ("auto", digest):
        raise RecipeError(
            f"source {source.name}: tree_digest is pinned to {source.tree_digest} but the {len(files)} files here give "
            f"{digest}; restore the pinned files, or change the pin"
        )
    return digest


def source_files(source: Source) -> list[tuple[str, Path]]:
    """(relative path, path) of every file that the reader reads, sorted by relative path."""
    from stages.data.readers.python_stdlib import stdlib_files

    reader = source.reader
    if isinstance(reader, (StdlibDocstrings, StdlibSource)):
        return stdlib_files(top_level=reader.modules == "top-level")
    if isinstance(reader, Passkeys):
        return stdlib_files()
    if isinstance(reader, (Problems, *CHATS)):
        return []
    root = Path(reader.path)
    if root.is_file():
        return [(root.name, root)]
    if missing := missing_files(source):
        raise RecipeError(f"{missing}; check reader.path")
    return sorted((path.relative_to(root).as_posix(), path) for path in _files(source, root, _suffixes(reader)))


def missing_files(source: Source) -> str | None:
    """The beginning of an error message if the files of a source are missing; None if they exist or none are needed."""
    reader = source.reader
    if not isinstance(reader, (Jsonl, Parquet)):
        return None
    root, suffixes = Path(reader.path), _suffixes(reader)
    if root.is_file() or any(_files(source, root, suffixes)):
        return None
    return f"source {source.name}: no {' or '.join(suffixes)} file at {root}"


def _files(source: Source, root: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    """The regular files with these suffixes under a folder. Raises RecipeError if it holds more than MOST_ENTRIES
    entries, as a wrong path such as a root folder does."""
    count = 0
    for folder, folders, names in os.walk(root):
        count += len(folders) + len(names)
        if count > MOST_ENTRIES:
            raise RecipeError(
                f"source {source.name}: {root} holds more than {MOST_ENTRIES} files and folders; name the corpus alone"
            )
        yield from (path for name in names if name.endswith(suffixes) and (path := Path(folder, name)).is_file())


def _suffixes(reader: Jsonl | Parquet) -> tuple[str, ...]:
    return (".jsonl", ".jsonl.gz") if isinstance(reader, Jsonl) else (".parquet",)


def _require_licenses(title: str, raw: dict[str, Any]) -> None:
    sources = raw.get("sources")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        given_name = source.get("name") if isinstance(source, dict) else None
        name = escaped(str(given_name or f"number {i + 1}"), 60)
        fixes = {"license": "an SPDX id, e.g. Apache-2.0", "license_evidence": "a text or URL that shows it"}
        for field, fix in fixes.items():
            if isinstance(source, dict) and not source.get(field):
                raise RecipeError(f"{title}: source {name} has no {field}; add `{field}:` with {fix}")


def _absolute(source: SourceConfig, folder: Path) -> SourceConfig:
    if not isinstance(source.reader, (Jsonl, Parquet)):
        return source
    path = str((folder / source.reader.path).resolve())
    return source.model_copy(update={"reader": source.reader.model_copy(update={"path": path})})
