"""Step `datatrove`: a filter, formatter or extractor of datatrove, by its import path.

A block runs as it is, or by its accelerator (`accelerated.py`), which gives the same results. What it downloads must be
a file that the recipe pins under `assets`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.bounds import LongLine, Sha256
from pipeline.core.errors import AtomError, MissingData, RecipeError
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from stages.data.blocks import Block, datatrove_version, in_words, is_stock, parameters_of
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal
from stages.data.estimates import SPACY_SECONDS

Assets = Annotated[dict[LongLine, Sha256], Field(max_length=100)]
# The version of datatrove with which the accelerators were compared; the blocks of another one run as they are.
PROVEN = "0.10.1"
BASES = (
    "datatrove.pipeline.filters.base_filter.BaseFilter",
    "datatrove.pipeline.formatters.base.BaseFormatter",
    "datatrove.pipeline.extractors.base.BaseExtractor",
)
# Classes of datatrove whose results depend on the version of spaCy, unless the recipe chooses other words.
_COUNT_WORDS = (
    "GopherQualityFilter",
    "GopherRepetitionFilter",
    "FineWebQualityFilter",
    "C4QualityFilter",
    "FastTextClassifierFilter",
)
WHAT = "filter, formatter or extractor"
_PROBE = "This plain text of two sentences shows whether a block can run. It is not one of the documents."
# The function by which blocks of datatrove get files from the net.
_DOWNLOAD = "cached_asset_path_or_download"
# The files that recipes pin, by name, with the digests that were stated.
_assets: dict[str, Path] = {}


class BlockStep(Block, Filter):
    """A filter, formatter or extractor of datatrove, such as datatrove.pipeline.filters.GopherQualityFilter.

    Its parameters are written beside `block`. docs/curation.md says which blocks run as they are and which faster.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "exclusion_writer": "removed documents have a disposition each",
        "batch_size": "documents are filtered one by one",
        "timeout": "a clock must not decide what is kept",
    }

    step: Literal["datatrove"] = "datatrove"
    """selects this step; `block` alone does so as well"""
    words: Literal["atom"] | None = None
    """atom: words are counted by stages/data/curate/words.py; null: as the block does it"""
    assets: Assets = Field({})
    """digests of files that the block reads, by paths from the data recipe"""

    @property
    def name(self) -> str:
        return self.class_name

    @property
    def seconds_per_mb(self) -> float:
        spacy = SPACY_SECONDS if self.class_name in _COUNT_WORDS and self.words is None else 0.0
        return super().seconds_per_mb + spacy

    def _present_code(self) -> str:
        counts_words = self.class_name in _COUNT_WORDS or bool(self.extension)
        spacy = _spacy_version() if counts_words and self.words is None else None
        return super()._present_code() + (f", spacy {spacy}" if spacy else "")

    def inspect(self) -> str:
        block = self._create()
        return f"block {self.block}: {'stock' if self._accelerated(block) is None else 'accelerated'}"

    def function(self) -> FilterFunction:
        block = self._create()
        accelerated = self._accelerated(block)
        return _stock(block) if accelerated is None else lambda document: accelerated(document.text)

    def _create(self) -> Any:
        """Returns the block, which has filtered a text: what it lacks is found before there are documents."""
        kind = self.imported(BASES, WHAT)
        self.require_parameters(kind, {})
        for path, digest in self.assets.items():
            self._add_asset(path, digest)
        block = self.create(BASES, WHAT, **self._words(kind))
        if dependence := _dependence(block):
            raise RecipeError(f"block {self.block}: {dependence}")
        _pin_downloads(block)
        from datatrove import data

        # Blocks load models and word lists with the first document, and fail only then.
        probe = data.Document(_PROBE, "probe", metadata={"url": "https://example.org/", "language": "en"})
        try:
            _stock(block)(probe)
        except AtomError as error:
            raise RecipeError(f"block {self.block}: {error}") from None
        except Exception as error:
            raise RecipeError(f"block {self.block} fails on a plain text: {in_words(error)}") from None
        return block

    def _words(self, kind: type[Any]) -> dict[str, Any]:
        """Returns the parameter with the words of this project, if the recipe names them."""
        from datatrove.utils.typeshelper import Languages
        from datatrove.utils.word_tokenizers import load_word_tokenizer

        language = parameters_of(kind).get("language")
        counts_words = language is not None and language.default == Languages.english
        if self.words == "atom":
            if not counts_words or "language" in self.parameters:
                reason = "`language` chooses other words" if counts_words else "it counts none"
                raise RecipeError(f"block {self.block}: words = atom, but {reason}; leave `words` out")
            from stages.data.curate.words import WORDS

            return {"language": WORDS}
        if counts_words:
            try:
                load_word_tokenizer(self.parameters.get("language", Languages.english))
            except (ImportError, ValueError) as error:
                raise RecipeError(
                    f"block {self.block} cannot count words ({in_words(error)}); write `words: atom` for English, or "
                    "install what it needs"
                ) from None
        return {}

    def _accelerated(self, block: Any) -> Callable[[str], str | Removal] | None:
        """Returns the accelerator of a block; None if it has none that is proven to give the same."""
        from stages.data.curate.filters.accelerated import ACCELERATORS
        from stages.data.curate.words import WORDS

        kind = type(block)
        # The accelerators count the words of this project; a block with other words runs as it is.
        if not is_stock(kind) or datatrove_version() != PROVEN or getattr(block, "language", WORDS) is not WORDS:
            return None
        accelerator = ACCELERATORS.get(kind.__name__)
        return None if accelerator is None else accelerator(block)

    def _add_asset(self, path: str, digest: str) -> None:
        file = Path(self.folder, path)
        if not file.is_file():
            raise MissingData(f"block {self.block}: assets names {file}, which is not here; put it there")
        if (present := f"sha256:{sha256_file(file)}") != digest:
            raise RecipeError(
                f"block {self.block}: {file} is pinned to {digest}, but has {present}; restore it, or change the pin"
            )
        # datatrove asks for a file by the name in its address alone.
        if _assets.setdefault(file.name, file) != file:
            raise RecipeError(f"block {self.block}: another asset is called {file.name} as well; rename one of them")


@cache
def _spacy_version() -> str | None:
    try:
        return metadata.version("spacy")
    except metadata.PackageNotFoundError:
        return None


def _stock(block: Any) -> FilterFunction:
    """Returns a block's own function, without the bookkeeping of datatrove's pipelines."""
    from datatrove.pipeline.extractors.base import BaseExtractor
    from datatrove.pipeline.filters.base_filter import get_filter_result
    from datatrove.pipeline.formatters.base import BaseFormatter

    def filter_document(document: Document) -> str | Removal:
        (result,) = block.filter_batch([document])
        passes, reason = get_filter_result(result)
        # The reason is published as a part of the rule.
        return document.text if passes else Removal(escaped(str(reason), 100) if reason else "")

    if isinstance(block, BaseFormatter):
        return lambda document: block.format(document.text)
    if isinstance(block, BaseExtractor):
        return lambda document: block.extract(document.text) or Removal("no_text")
    return filter_document


def _dependence(block: Any) -> str | None:
    """Says why a block of datatrove, or one that extends it, gives a document a text that depends on earlier ones.

    Returns:
        None if its results depend on each document alone.
    """
    names = {kind.__name__ for kind in type(block).__mro__ if is_stock(kind)}
    # Results must not depend on the order of documents, which differs with the number of parts.
    if "PIIFormatter" in names:
        for each, replacer in (("email", block.emails_replacer), ("ip", block.ip_replacer)):
            if getattr(block, f"remove_{each}s") and len(replacer.replacements) > 1:
                return (
                    f"it uses the {len(replacer.replacements)} values of {each}_replacement in turn, so a text depends "
                    "on the documents before; give one value"
                )
    if "Trafilatura" in names and block.deduplicate:
        return "deduplicate = true compares a page with those before it; write deduplicate: false"
    if "C4BadWordsFilter" in names and block.keep_fraction > 0:
        return "keep_fraction is a share by a stream of random numbers; leave it out"
    return None


def _pin_downloads(block: Any) -> None:
    """Makes datatrove read files that are pinned, where it would download them."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("datatrove.") and hasattr(module, _DOWNLOAD):
            # Modules import the function by name, so each has a reference of its own.
            setattr(module, _DOWNLOAD, _pinned_file)
    if hasattr(block, "tldextractor"):  # of URLFilter: the list of public suffixes in the package, not the net's
        from tldextract import TLDExtract

        block.tldextractor = TLDExtract(cache_dir=None, suffix_list_urls=())


def _pinned_file(remote_path: str, *options: Any, **others: Any) -> str:
    """Returns the pinned file in the place of a download."""
    name = remote_path.rsplit("/", 1)[-1]
    if name not in _assets:
        raise AtomError(f"it reads {remote_path}, which no digest pins; put {name} and its SHA-256 into `assets`")
    return str(_assets[name])
