"""Pins the sources of a data recipe that have files, and probes each with a sample.

The pin of a source of the Hub is a revision, and the sizes and digests of its files. That of a source with files on
this machine is their tree digest. Sources that are drawn from a seed have no files. The sources are asked at the same
time, and each is written to the lock file when it is done, so that nothing that was learnt is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError, MachineError, RecipeError
from pipeline.core.progress import human
from pipeline.core.store import Store, sha256_file
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph import dag
from pipeline.graph.recipe import find, lock_of
from pipeline.graph.recipe import load as load_recipe
from pipeline.hub import client
from stages.data.acquire import hub_files, hub_samples
from stages.data.acquire.hub_files import LocalSource, LockedSource
from stages.data.acquire.hub_samples import Sample
from stages.data.acquire.readers.base import SampledReader
from stages.data.acquire.readers.hub import Hub
from stages.data.acquire.source_probe import BY_SETTING, BY_TOKENIZER
from stages.data.acquire.sources import require_tree, resolve_tree_digest
from stages.data.recipe import SourceConfig, load

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Sources that are asked at the same time.
PARALLEL = 8
Entry = LockedSource | LocalSource


@dataclass(frozen=True)
class Pin:
    """A source as it is pinned now.

    Attributes:
        name: Name of the source.
        entry: Its entry in the lock file.
        previous: The commit to which it was pinned; None if to none, or with other settings.
        done: Its number among the sources that are done.
        total: The number of all of them.
    """

    name: str
    entry: Entry
    previous: str | None
    done: int
    total: int

    def __str__(self) -> str:
        entry, probe = self.entry, self.entry.probe
        moved = isinstance(entry, LockedSource) and self.previous not in (None, entry.revision)
        change = f", previously {str(self.previous)[:12]}" if moved else ""
        line = f"{self.name}: {entry.place}{change}, {entry.file_count} files, {entry.bytes / 1e9:.3f} GB"
        if probe and probe.sampled_documents:
            kept = f"{human(probe.kept_tokens)} of {human(probe.bytes / probe.bytes_per_token)} tokens kept"
            line += f"; {kept}, by {probe.sampled_documents:,} documents"
        return f"{line} ({self.done} of {self.total})"

    def json(self) -> dict[str, Any]:
        entry, pinned = self.entry, dict[str, str | None]()
        if isinstance(entry, LockedSource):
            pinned = {"repo": entry.repo, "revision": entry.revision, "previous": self.previous}
        else:
            pinned = {"tree_digest": entry.tree_digest}
        return {
            "name": self.name,
            **pinned,
            "files": entry.file_count,
            "bytes": entry.bytes,
            "probe": entry.probe.model_dump(mode="json") if entry.probe else None,
        }


def data_recipe(reference: str) -> Path:
    """Returns the data recipe of a name or path, which may be that of a recipe that names it. Raises RecipeError."""
    try:
        path = find(reference, "pipeline.recipes", "recipe")
    except RecipeError as error:
        try:
            return find(reference, "data_recipes", "data recipe")
        except RecipeError:
            raise error from None
    title = f"recipe {escaped(path.stem, 80)}"
    data = parse_yaml(read_file(path, title), title).get("data")
    return path if data is None else find(str(data), "data_recipes", "data recipe", path.parent)


def tokenizer_of(reference: str, store: Store) -> Path | None:
    """Returns the tokenizer.json of a recipe by name or path.

    None for a data recipe, and before there is one: most recipes train theirs on the data that is to be pinned.

    Raises:
        RecipeError: The recipe is not valid.
    """
    path = data_recipe(reference)
    try:
        if find(reference, "pipeline.recipes", "recipe") == path:
            return None
    except RecipeError:  # of a packaged data recipe, which `data_recipe` has found
        return None
    graph = dag.compose(load_recipe(reference), store, without_data=True)
    for name in ("tokenizer", "import"):
        if name in graph.nodes and store.sealed(graph.nodes[name].key):
            file = store.open(graph.nodes[name].key).path / "tokenizer.json"
            if file.is_file():
                return file
    return None


def pin(path: Path, sample: bool = True, tokenizer: Path | None = None) -> Iterator[Pin]:
    """Asks for each source of a data recipe that has files, probes it, and yields each as it is written to the lock.

    Args:
        path: The data recipe.
        sample: Read a sample of each source; without one, its earlier probe stays if it is of the same files.
        tokenizer: The tokenizer.json that counts tokens; None: `bytes_per_token` of each source does.

    Raises:
        RecipeError: At the beginning, if there is nothing to pin, or if the lock file is damaged, which stays as it is.
        AtomError: At the end, if some sources cannot be pinned or probed. Their earlier entries stay.
    """
    recipe = load(path)
    sources = [source for source in recipe.sources if isinstance(source.reader, SampledReader)]
    if not sources:
        raise RecipeError(f"data recipe {escaped(path.stem, 80)} has no source with files; there is nothing to pin")
    lock = lock_of(path)
    known: dict[str, Entry] = {**hub_files.read(lock), **hub_files.read_local(lock)}
    failures, hashes = dict[str, AtomError](), dict[str, set[str]]()
    entries = {source.name: known[source.name] for source in sources if source.name in known}
    stopped = threading.Event()
    tokens_by, counter = BY_SETTING, None
    if tokenizer is not None:
        from stages.formats.tokenizer import load_for_corpus

        tokens_by, counter = f"{BY_TOKENIZER}sha256:{sha256_file(tokenizer)}", load_for_corpus(tokenizer)
    client.load()  # imported once, before threads use it
    with TemporaryDirectory() as folder, ThreadPoolExecutor(PARALLEL) as pool:

        def ask(source: SourceConfig) -> tuple[Entry, Sample | None]:
            """Returns a source as it is now, and its sample; None if an earlier one will do."""
            reader, earlier = source.reader, known.get(source.name)
            entry = _entry_of(source)
            probe = earlier.probe if earlier and earlier.content == entry.content else None
            entry = entry.model_copy(update={"probe": probe})
            # A tokenizer counts better than a setting, and nothing is counted anew by the setting.
            is_counted = probe and (counter is None or probe.tokens_by == tokens_by)
            if not sample or (probe and is_counted and not probe.problem and probe.settings == source.probe_settings):
                return entry, None
            place = Path(folder, source.name)
            place.mkdir()
            label = f"probe/{recipe.name}/{source.name}"
            if isinstance(reader, Hub) and isinstance(entry, LockedSource):
                return entry, hub_samples.fetch(source.name, entry, reader, label, place, stopped)
            return entry, hub_samples.take(source.name, source.files(), reader, label, place, stopped)

        jobs = {pool.submit(ask, source): source for source in sources}
        try:
            for done, job in enumerate(as_completed(jobs), start=1):
                source = jobs[job]
                earlier = known.get(source.name)
                try:
                    entry, pieces = job.result()
                    if pieces is not None:
                        entry, hashes[source.name] = _probed(source, entry, pieces, tokens_by, counter)
                except AtomError as error:
                    failures[source.name] = error
                    continue
                except OSError as error:  # of a file on this machine
                    failures[source.name] = AtomError(f"source {source.name}: {error}; check its files")
                    continue
                if entry.probe and (problem := recipe.problem_of(source, entry.probe)):
                    failures[source.name] = AtomError(problem)
                entries[source.name] = entry
                hub_files.write(lock, entries)
                previous = None
                if isinstance(earlier, LockedSource) and isinstance(entry, LockedSource) and earlier.repo == entry.repo:
                    previous = earlier.revision
                yield Pin(source.name, entry, previous, done, len(sources))
        except BaseException:
            # Requests that have not begun are left out.
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if hashes:
        in_order = {source.name: entries[source.name] for source in sources if source.name in entries}
        hub_files.write(lock, _with_shared(in_order, hashes))
    if failures:
        raise _joined([failures[source.name] for source in sources if source.name in failures], len(sources))


def _entry_of(source: SourceConfig) -> Entry:
    """Returns a source as it is now, without a probe."""
    reader = source.reader
    if isinstance(reader, Hub):
        return hub_files.resolve(source.name, reader.repo, reader.revision, reader.pattern)
    # Also of a source with a pinned digest: what a sample says is then said of these files.
    files, digest = source.files(), resolve_tree_digest(source.model_copy(update={"tree_digest": "auto"}))
    require_tree(source, digest, len(files))
    size = sum(path.stat().st_size for _, path in files)
    return LocalSource(tree_digest=digest, file_count=len(files), bytes=size)


def _probed(
    source: SourceConfig, entry: Entry, sample: Sample, tokens_by: str, counter: Tokenizer | None
) -> tuple[Entry, set[str]]:
    """Returns the entry of a source with its probe, and the content hashes of the sample."""
    from loguru import logger

    from stages.data.probing import Measurement

    logger.disable("datatrove")  # it logs each of many small steps
    measurement = Measurement(source, sample, entry.bytes, counter)
    sampled = hub_samples.format_of(source.reader)
    probe, earlier = measurement.probe(source.probe_settings, sampled, tokens_by), entry.probe
    # A sample that was cut earlier than the one before says less.
    if earlier and earlier.settings == probe.settings and earlier.sampled_documents > probe.sampled_documents:
        probe = earlier.model_copy(update={"problem": probe.problem})
    return entry.model_copy(update={"probe": probe}), measurement.hashes


def _with_shared(entries: Mapping[str, Entry], hashes: Mapping[str, set[str]]) -> dict[str, Entry]:
    """Returns the entries, those that were probed now with the documents that they share with ones before them."""
    result, earlier = dict(entries), dict[str, set[str]]()
    for name, entry in entries.items():
        if name in hashes and entry.probe:
            shared = {other: count for other in earlier if (count := len(hashes[name] & earlier[other]))}
            result[name] = entry.model_copy(update={"probe": entry.probe.model_copy(update={"shared": shared})})
            earlier[name] = hashes[name]
    return result


def _joined(failures: list[AtomError], sources: int) -> AtomError:
    """Returns the failures of sources as one error. It is of the machine if all of them are."""
    kind = MachineError if all(isinstance(error, MachineError) for error in failures) else AtomError
    shown = "; ".join(map(str, failures[:3])) + ("; …" if len(failures) > 3 else "")
    others = sources - len(failures)
    in_order = f"; {others} of {sources} sources are in order" if others else ""
    return kind(f"{shown}{in_order}")
