"""The data recipe: the sources of a corpus and their curation.

`load("tiny")` reads the packaged recipe `data_recipes/tiny.yaml`; a path reads that file. Nothing heavy is imported
here, because `atom plan` needs the recipe and the digests of the source trees before any stage runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.core.bounds import MOST_SOURCES, Key, Text
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.extensions import modules_in
from pipeline.core.stage import Config, added, identity, operational
from pipeline.core.store import canonical, sha256_bytes
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.dag import NodeSpec
from pipeline.graph.recipe import explain, find, lock_of
from stages.data import estimates
from stages.data.acquire import acquire_stage, hub_files
from stages.data.acquire.hub_files import LocalSource
from stages.data.acquire.licenses.expressions import AllowedLicenses, Licenses, forbids_derivatives
from stages.data.acquire.readers.base import Reader, SampledReader
from stages.data.acquire.readers.generated import Generated
from stages.data.acquire.readers.hub import Hub
from stages.data.acquire.source_probe import DUPLICATE, BytesPerToken, Probe
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.data.blocks import Block, Extensions, extension_folders
from stages.data.curate import deny_list, filter_stage
from stages.data.curate.alarms import RULES, Acknowledged, filter_losses, require_acknowledged
from stages.data.curate.classifier_stage import ClassifierSettings
from stages.data.curate.dedup_stage import DedupSource
from stages.data.curate.duplicates_stage import SearchedSource
from stages.data.curate.filter_stage import FilteredSource
from stages.data.curate.filters.base import Filter
from stages.data.curate.settings import CurationSettings, SourceParts, WorkPattern
from stages.data.curate.steps import MAX_STEPS, AnyFilter
from stages.data.estimates import Size, Stated
from stages.formats.table import HeldoutFraction
from stages.formats.tokenizer import TokenizerSection


class SourceConfig(Source):
    """A source of a data recipe: how its documents are acquired and curated."""

    heldout_fraction: HeldoutFraction | None = None
    """held-out fraction of this source; null: that of the data recipe, and 0 for problems"""
    work: WorkPattern | None = None
    """with heldout_by: work, a regular expression that is searched in a document's id, a space and its origin, and
    whose first group names its work; null: that of the reader, such as package or host, or each document by itself"""
    license_allow: Licenses = added(())
    """SPDX licenses of documents that are kept; of `A OR B` one must be listed, of `A AND B` both; empty: all"""
    pipeline: Key | None = added(None)
    """name of one of `pipelines`, whose steps come before those of `steps`; null: none"""
    steps: tuple[AnyFilter, ...] = Field((), max_length=MAX_STEPS)
    """curation steps, in order"""
    acknowledged_removals: Acknowledged = operational({})
    """by rule (the name of a step, opt_out, license, failed, generation, secrets, decontamination,
    deduplication), the share of the source that it may remove above curation.alarm_share"""
    supply: Stated | None = operational(None)
    """tokens of the source that somebody states, for `atom plan` until `atom pin` has probed it; null: unknown"""
    bytes_per_token: BytesPerToken = operational(4.0)
    """bytes of text in a token, by which `atom pin` turns the bytes of a sample into tokens, unless the recipe's
    tokenizer is sealed and counts them"""
    _lock: Path | None = None

    def beside(self, lock: Path) -> SourceConfig:
        """Returns the source with the lock file of its data recipe, which may be missing."""
        source = self.model_copy(update={"reader": self.reader.locked(lock)})
        source._lock = lock
        return source

    @property
    def probe_settings(self) -> str:
        """The digest of what decides on the documents that a sample keeps, and on what is said of them."""
        names = "kind license document_license license_allow reader steps"
        fields = {name: value for name, value in identity(self).items() if name in names.split()}
        others = self.bytes_per_token, acquire_stage.VERSION, filter_stage.VERSION
        return f"sha256:{sha256_bytes(canonical([fields, *others]))}"

    @property
    def probe(self) -> Probe | None:
        """The probe by `atom pin` of the source as its settings and its files are now; None if nothing."""
        locked = self.reader.pinned(self.name) if isinstance(self.reader, Hub) else self._pinned_here()
        probe = locked.probe if locked else None
        return probe if probe and probe.settings == self.probe_settings and probe.sampled_documents else None

    def _pinned_here(self) -> LocalSource | None:
        """Returns the source as it was pinned, with files on this machine; None if not, or if they are others now."""
        entry = hub_files.read_local(self._lock).get(self.name) if self._lock else None
        # A tree digest in the recipe is that of files which need not be here.
        if entry is None or (self.tree_digest == "auto" and self.reader.missing(self.name)):
            return None
        digest = resolve_tree_digest(self) if self.tree_digest == "auto" else self.tree_digest
        return entry if digest == entry.tree_digest else None

    @property
    def limited_share(self) -> float:
        """The share of the probed documents that `limit` of the reader leaves."""
        limit, probe = self.reader.limit if isinstance(self.reader, SampledReader) else None, self.probe
        return min(1.0, limit / probe.documents) if limit and probe and probe.documents else 1.0

    @property
    def sized(self) -> SourceConfig:
        """The source with the size that a probe says it has."""
        if (probe := self.probe) is None or not probe.documents or not probe.bytes:
            return self
        documents, size = (max(1, round(self.limited_share * count)) for count in (probe.documents, probe.bytes))
        return self.model_copy(update={"expected": Size(documents=min(documents, 10**13), bytes=size)})

    @model_validator(mode="after")
    def _check_license_allow(self) -> SourceConfig:
        license = self.document_license or self.license
        is_stated = self.reader.gives_licenses or self.reader.states_parents
        if self.license_allow and not is_stated and not AllowedLicenses(self.license_allow).allows(license):
            raise ValueError(
                f"source {self.name}: the license {license} of its documents is not in license_allow, so none of "
                "them may be trained on; leave the source out, or list the license if its terms allow training"
            )
        return self


class DataRecipe(Config):
    """A data recipe: one file of `data_recipes/`."""

    name: Key
    """name of the data recipe"""
    description: Text
    """short description of the corpus"""
    sources: tuple[SourceConfig, ...] = Field(min_length=1, max_length=MOST_SOURCES)
    """sources of the corpus; exact duplicates are decided in their order"""
    pipelines: dict[Key, Annotated[tuple[AnyFilter, ...], Field(max_length=MAX_STEPS)]] = operational(
        {}, max_length=MAX_STEPS
    )
    """curation steps by the kind of text, such as web or scans, for sources to name"""
    classifiers: tuple[ClassifierSettings, ...] = added((), max_length=MOST_SOURCES)
    """classifiers, each trained on documents of some sources, for steps to name"""
    notice: Text | None = added(None)
    """paragraph that the cards of the data and of the models print, such as on licenses; null: none"""
    curation: CurationSettings = CurationSettings()
    """curation of all sources together"""
    extensions: Extensions = operational(())
    """folders of Python modules, relative to this file, whose classes `block` can name; their digests are part of
    the keys"""
    heldout_fraction: HeldoutFraction = 0.05
    """share of documents, by content hash, held out from training; 0 for problems"""
    heldout_by: Literal["document", "work"] = "document"
    """what is held out: single documents, or all documents of a work, such as a package, so that none of it is
    trained on; the share is then one of works"""

    @model_validator(mode="after")
    def _check_distinct(self) -> DataRecipe:
        names = {"sources": [source.name for source in self.sources]}
        names["classifiers"] = [classifier.name for classifier in self.classifiers]
        for kind, listed in names.items():
            if duplicates := sorted(name for name, count in Counter(listed).items() if count > 1):
                raise ValueError(f"two {kind} are named {duplicates[0]}; names must differ")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> DataRecipe:
        for source in self.sources:
            if source.pipeline not in (None, *self.pipelines):
                known = ", ".join(self.pipelines) or "none"
                raise ValueError(f"source {source.name} names the pipeline {source.pipeline}; `pipelines` has {known}")
            # A misspelt rule would acknowledge nothing, and the run would stop after hours.
            rules = [*dict.fromkeys(step.name for step in self.steps_of(source)), *RULES]
            if wrong := [rule for rule in source.acknowledged_removals if rule not in rules]:
                raise ValueError(
                    f"acknowledged_removals of source {source.name}: {wrong[0]} is no rule of this source; it has "
                    f"{', '.join(rules)}"
                )
        names = {f"classifier-{classifier.name}" for classifier in self.classifiers}
        used = {name for source in self.sources for step in self.steps_of(source) for name in step.inputs}
        if lone := sorted(names ^ used):
            raise ValueError(
                f"{lone[0]} must be in `classifiers` and be used by a step; add the one, or remove the other"
            )
        for classifier in self.classifiers:
            examples = {*classifier.positive, *classifier.negative}
            if unknown := sorted(examples - {source.name for source in self.sources}):
                raise ValueError(f"classifier {classifier.name} has examples of {unknown[0]}, which is no source")
        return self

    @model_validator(mode="after")
    def _check_works(self) -> DataRecipe:
        shares = {self.heldout_fraction_of(source) for source in self.sources if self.work_of(source)} - {0}
        if len(shares) > 1:
            raise ValueError(
                f"heldout_fraction is {' and '.join(map(str, sorted(shares)))} of sources with works, so a work could "
                "be trained on in one of them and held out in another; give them one share"
            )
        return self

    @model_validator(mode="after")
    def _check_generated(self) -> DataRecipe:
        sources = {source.name: source for source in self.sources}
        for source in self.sources:
            if not isinstance(source.reader, Generated):
                continue
            parent = sources.get(source.reader.from_source)
            if parent is None or parent.kind == "chat" or isinstance(parent.reader, Generated):
                what = "no source" if parent is None else f"a source of {parent.reader.reader}"
                raise ValueError(
                    f"source {source.name} is made from {source.reader.from_source}, which is {what}; name a source "
                    "of plain text that is not generated itself"
                )
            if source.parts != parent.parts:
                raise ValueError(
                    f"source {source.name} has parts = {source.parts}, and {parent.name}, from which it is made, has "
                    f"{parent.parts}; use {parent.parts}"
                )
            for license in filter(None, (parent.license, parent.document_license)):
                if forbids_derivatives(license):
                    raise ValueError(
                        f"source {source.name} is made from {parent.name}, whose license {license} forbids derived "
                        "texts; leave it out, or name another source"
                    )
        return self

    def steps_of(self, source: SourceConfig) -> tuple[Filter, ...]:
        """Returns the steps of the pipeline that a source names, then its own."""
        return (*self.pipelines.get(source.pipeline or "", ()), *source.steps)

    def problem_of(self, source: SourceConfig, probe: Probe) -> str:
        """Returns what a probe says is wrong with a source, or else an alarm by the present settings; empty without."""
        # What is wrong is often why a rule removes much.
        if probe.problem:
            return probe.problem
        removed = {rule: row.documents for rule, row in probe.removed.items() if rule != DUPLICATE}
        steps = [step.name for step in self.steps_of(source)]
        losses = filter_losses(source.name, steps, probe.sampled_documents, removed)
        try:
            require_acknowledged(
                losses, self.curation.alarm_share, {source.name: source.acknowledged_removals}, report=None
            )
        except AtomError as alarm:
            return str(alarm)
        return ""

    def resolved(self) -> DataRecipe:
        """Returns the recipe with the digests of all source trees and of the deny-list, from the files on disk.

        Raises RecipeError if a pin differs.
        """
        sources = tuple(s.sized.model_copy(update={"tree_digest": resolve_tree_digest(s)}) for s in self.sources)
        return self.model_copy(update={"sources": sources, "curation": self._resolved_curation()})

    def present(self) -> tuple[DataRecipe, tuple[str, ...]]:
        """Resolves the digests of what is here, with a message for each source that is missing, and for the deny-list.

        A source with missing files keeps its digest, a pinned one or `auto`; so does a missing deny-list.
        """
        sources, messages = [], []
        for source in self.sources:
            missing, digest = source.reader.missing(source.name), source.tree_digest
            if missing is None:
                digest = resolve_tree_digest(source)
            else:
                keys = "; keys below are provisional" if digest == "auto" else ""
                messages.append(f"{missing}; {source.reader.remedy} before running{keys}")
            sources.append(source.sized.model_copy(update={"tree_digest": digest}))
        path, curation = self.curation.deny_list, self.curation
        if path is not None and not Path(path).is_file():
            keys = "; keys below are provisional" if curation.deny_list_sha256 is None else ""
            messages.append(f"no deny-list at {path}; put it there before running{keys}")
        else:
            curation = self._resolved_curation()
        return self.model_copy(update={"sources": tuple(sources), "curation": curation}), tuple(messages)

    def acquire_config(self, source: str, seed: int) -> dict[str, Any]:
        """Returns the config of stage acquire for one source.

        The curation steps are left out, because a change of them must not acquire the source again.
        """
        source_config = next(s for s in self.sources if s.name == source)
        return {"source": _fields_of(source_config, Source), "seed": seed}

    def filter_config(self, seed: int) -> dict[str, Any]:
        """Returns the config of stage filter for all sources."""
        sources = []
        for source in self.sources:
            generator = source.reader.generator if isinstance(source.reader, Generated) else None
            sources.append(_fields_of(source, FilteredSource) | {"generator": generator})
        return {"sources": sources, "curation": self.curation.model_dump(), "seed": seed, "notice": self.notice}

    def duplicates_config(self) -> dict[str, Any]:
        """Returns the config of stage duplicates for all sources."""
        sources = [_fields_of(source, SearchedSource) for source in self.sources]
        return {"sources": sources, "minhash": self.curation.model_dump()["minhash"], "expected": self.expected}

    def representatives_config(self) -> dict[str, Any]:
        """Returns the config of stage representatives for all sources."""
        sources = [_fields_of(source, SourceParts) for source in self.sources]
        return {"sources": sources, "minhash": self.curation.model_dump()["minhash"], "expected": self.expected}

    def dedup_config(self) -> dict[str, Any]:
        """Returns the config of stage dedup for all sources."""
        sources = [
            _fields_of(source, DedupSource)
            | {"heldout_fraction": self.heldout_fraction_of(source), "work": self.work_of(source)}
            for source in self.sources
        ]
        minhash, alarm_share = self.curation.model_dump()["minhash"], self.curation.alarm_share
        return {"sources": sources, "minhash": minhash, "alarm_share": alarm_share}

    def tokenize_config(self) -> dict[str, Any]:
        """Returns the config of stage tokenize for all sources."""
        return {"conversations": self.conversations, "parts": self.parts, "expected": self.expected}

    def acquisition_nodes(self, seed: int) -> list[NodeSpec]:
        """Returns the nodes that acquire the sources; generated ones after those that they are made from."""
        acquired, generated = [], []
        for source in self.sources:
            node, config = f"acquire-{source.name}", self.acquire_config(source.name, seed)
            # Generated sources come last, so that the node of the parent is there.
            if parent := self.generated.get(source.name):
                generated.append(NodeSpec(node, "generate", config, {"parent": f"acquire-{parent}"}))
            else:
                acquired.append(NodeSpec(node, "acquire", config))
        return acquired + generated

    def curation_nodes(
        self, seed: int, tokenizer: TokenizerSection, evaluated: Mapping[str, str], imported: Mapping[str, str]
    ) -> list[NodeSpec]:
        """Returns the nodes from acquired sources to token shards.

        Args:
            seed: Seed of the recipe.
            tokenizer: The section `tokenizer`.
            evaluated: The nodes of evaluation items, by role. Training documents with such an item are removed.
            imported: The node of the published model whose tokenizer is used, by role; empty if one is trained.
        """
        acquired = {source.name: f"acquire-{source.name}" for source in self.sources}
        classifiers, models = [], {}
        for classifier in self.classifiers:
            node, config = f"classifier-{classifier.name}", {"classifier": classifier.model_dump(), "seed": seed}
            examples = {name: acquired[name] for name in (*classifier.positive, *classifier.negative)}
            classifiers.append(NodeSpec(node, "classifier", config, examples))
            models[node] = node
        tokenizer_config = tokenizer.model_dump() | {"leave_out": (*tokenizer.leave_out, *self.conversations)}
        # Later stages read the filtered documents beside what was found in them.
        searched = {"filter": "filter", "duplicates": "duplicates"}
        return [
            *classifiers,
            NodeSpec("filter", "filter", self.filter_config(seed), {**acquired, **models, **evaluated}),
            NodeSpec("duplicates", "duplicates", self.duplicates_config(), {"filter": "filter"}),
            NodeSpec("representatives", "representatives", self.representatives_config(), searched),
            NodeSpec("dedup", "dedup", self.dedup_config(), {**searched, "representatives": "representatives"}),
            NodeSpec("tokenizer", "tokenizer", tokenizer_config, {"dedup": "dedup", **imported}),
            NodeSpec("tokenize", "tokenize", self.tokenize_config(), {"dedup": "dedup", "tokenizer": "tokenizer"}),
        ]

    @property
    def generated(self) -> dict[str, str]:
        """{source that a generator writes: the source that it is made from}."""
        readers = {source.name: source.reader for source in self.sources}
        return {name: reader.from_source for name, reader in readers.items() if isinstance(reader, Generated)}

    @property
    def parts(self) -> dict[str, int]:
        """The number of parts of each source."""
        return {source.name: source.parts for source in self.sources}

    @property
    def expected(self) -> Size | None:
        """The expected size of all sources; None if that of one is unknown."""
        return estimates.total(source.expected for source in self.sources)

    @property
    def conversations(self) -> tuple[str, ...]:
        """The sources whose documents are turns of conversations."""
        return tuple(source.name for source in self.sources if source.kind == "chat")

    @property
    def works(self) -> dict[str, str]:
        """The patterns of works, by source of which whole works are held out."""
        return {source.name: pattern for source in self.sources if (pattern := self.work_of(source))}

    def _resolved_curation(self) -> CurationSettings:
        """Returns the settings of curation with the digest of the deny-list, if there is one."""
        path, pin = self.curation.deny_list, self.curation.deny_list_sha256
        if path is None:
            return self.curation
        digest = deny_list.digest_of(Path(path))
        if pin not in (None, digest):
            raise RecipeError(
                f"curation.deny_list_sha256 is pinned to {pin}, but {path} has {digest}; restore the pinned file, or "
                "change the pin"
            )
        return self.curation.model_copy(update={"deny_list_sha256": digest})

    def heldout_fraction_of(self, source: SourceConfig) -> float:
        """Returns the share of a source's documents that are held out from training."""
        if source.heldout_fraction is not None:
            return source.heldout_fraction
        return 0.0 if source.kind == "problems" else self.heldout_fraction

    def work_of(self, source: SourceConfig) -> str:
        """Returns the pattern of the works of a source that are held out as a whole; empty for single documents."""
        if self.heldout_by == "document":
            return ""
        return source.reader.work if source.work is None else source.work


def _fields_of(source: SourceConfig, kind: type[Config]) -> dict[str, Any]:
    """Returns the settings of a source that a stage's settings of a source have as well."""
    return source.model_dump(include=set(kind.model_fields))


def load(name_or_path: str | Path) -> DataRecipe:
    """Returns a data recipe by packaged name or by path; relative file paths inside are relative to the YAML.

    Raises RecipeError in one sentence: no such recipe, not YAML, or the first invalid field and its remedy.
    """
    path = find(str(name_or_path), "data_recipes", "data recipe")
    return loads(read_file(path, _title(path)), path)


def loads(content: bytes, path: Path) -> DataRecipe:
    """Reads a data recipe from the bytes of `path`; see `load`."""
    title = _title(path)
    raw = parse_yaml(content, title)
    _require_licenses(title, raw)
    try:
        recipe = DataRecipe.model_validate(raw)
    except ValidationError as error:
        raise explain(error, DataRecipe, title, raw) from None
    lock, extensions = lock_of(path), extension_folders(path.parent, recipe.extensions)

    def locate(value: Filter | Reader) -> Any:
        return value.located(path.parent, extensions) if isinstance(value, Block) else value

    def located(source: SourceConfig) -> SourceConfig:
        reader = locate(source.reader.absolute(path.parent))
        steps = tuple(map(locate, recipe.steps_of(source)))
        return source.model_copy(update={"reader": reader, "steps": steps}).beside(lock)

    sources = tuple(map(located, recipe.sources))
    curation = recipe.curation
    if curation.deny_list is not None:
        curation = curation.model_copy(update={"deny_list": str((path.parent / curation.deny_list).resolve())})
    # The steps of pipelines are those of their sources now.
    return recipe.model_copy(update={"sources": sources, "curation": curation, "pipelines": {}})


def extension_modules(recipe: DataRecipe, path: Path) -> dict[str, bytes]:
    """Returns the Python modules of the extensions of the recipe at `path`, by package and path in it."""
    folders = extension_folders(path.parent, recipe.extensions)
    return {
        f"{name}/{file.relative_to(folder).as_posix()}": file.read_bytes()
        for name, folder in folders.items()
        for file in modules_in(folder)
    }


def _title(path: Path) -> str:
    return f"data recipe {escaped(path.stem, 80)}"


def _require_licenses(title: str, raw: dict[str, Any]) -> None:
    sources = raw.get("sources")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        stated_name = source.get("name") if isinstance(source, dict) else None
        name = escaped(str(stated_name or f"number {i + 1}"), 60)
        fixes = {"license": "an SPDX id, e.g. Apache-2.0", "license_evidence": "a text or URL that shows it"}
        for field, fix in fixes.items():
            if isinstance(source, dict) and not source.get(field):
                raise RecipeError(f"{title}: source {name} has no {field}; add `{field}:` with {fix}")
