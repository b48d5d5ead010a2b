"""Step `datatrove`: a filter, formatter or extractor of datatrove, by its import path and with its own parameters.

A data recipe can name the classes of datatrove, and those in the folders that it lists under `extensions`. Nothing is
imported before `inspect` and `function`, so `atom plan` only parses the settings. A block runs as it is, or by its
accelerator (`accelerated.py`), which gives the same results. What it downloads must be a file that the recipe pins
under `assets`.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.bounds import LongLine, Settings, Sha256, Words
from pipeline.core.errors import AtomError, MissingData, RecipeError
from pipeline.core.stage import operational
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal
from stages.data.estimates import SPACY_SECONDS
from stages.formats.file_digests import tree_digest

DATATROVE = "datatrove"
# Folders of Python modules, relative to the data recipe. The last part of a path is the name of the package.
Extensions = Annotated[tuple[LongLine, ...], Field(max_length=20)]
Place = Annotated[str, Words(4096, empty=True)]
BlockPath = Annotated[
    str,
    Words(
        300,
        "import path of a class; write such as datatrove.pipeline.filters.RegexFilter",
        r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
    ),
]
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
_PROBE = "This plain text of two sentences shows whether a block can run. It is not one of the documents."
# The function by which blocks of datatrove get files from the net.
_DOWNLOAD = "cached_asset_path_or_download"
# The files that recipes pin, by name, with the digests that were stated.
_assets: dict[str, Path] = {}
# Classes of datatrove that are refused, and what to use instead.
_REFUSED = {
    "SamplerFilter": "draws a random number for each document, so what it keeps depends on the documents before; use "
    "`limit` of the reader",
    "LambdaFilter": "takes a Python function, which a data recipe cannot state; write a filter into a folder of "
    "`extensions`",
    "UnigramLogProbFilter": "downloads a table of words that no digest pins; write a filter of your own",
}
_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


class BlockStep(Filter):
    """A filter, formatter or extractor of datatrove, such as datatrove.pipeline.filters.GopherQualityFilter.

    Its parameters are written beside `block`. docs/curation.md says which blocks run as they are and which faster.
    """

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    # Parameters of the class that a recipe cannot set, and the reason.
    refused: ClassVar[Mapping[str, str]] = {
        "exclusion_writer": "removed documents have a disposition each",
        "batch_size": "documents are filtered one by one",
        "timeout": "a clock must not decide what is kept",
    }

    step: Literal["datatrove"] = "datatrove"
    """selects this step; `block` alone does so as well"""
    block: BlockPath
    """import path of the class; further settings are its own parameters"""
    parameters: Settings = Field({})
    """parameters of the class, if one of them is called like a setting here"""
    code: LongLine = "auto"
    """expected version of datatrove, and digest of the extension; auto: those that are here"""
    folder: Place = operational("")
    """folder of the data recipe; set when that is read"""
    extension: Place = operational("")
    """folder of the extension that has the class; set when the data recipe is read"""
    words: Literal["atom"] | None = None
    """atom: words are counted by stages/data/curate/words.py; null: as the block does it"""
    assets: Assets = Field({})
    """digests of files that the block reads, by paths from the data recipe"""

    @model_validator(mode="before")
    @classmethod
    def _collect_parameters(cls, values: Any) -> Any:
        """Moves the parameters of the class, which are written beside `block`, into the field for them."""
        if not isinstance(values, dict):
            return values
        fields = {name: value for name, value in values.items() if name in cls.model_fields}
        parameters = {name: value for name, value in values.items() if name not in cls.model_fields}
        stated = fields.get("parameters", {})
        # Values of a wrong form are left as they are, so that validation names them.
        return {**fields, "parameters": {**stated, **parameters}} if parameters and isinstance(stated, dict) else values

    def located(self, folder: Path, extensions: Mapping[str, Path]) -> Self:
        """Returns the block with its places on this machine and the version of its code.

        Args:
            folder: The folder of the data recipe.
            extensions: The folder of each package of its `extensions`.

        Raises:
            RecipeError: No extension has the class, or `code` pins another version.
        """
        package = self.block.partition(".")[0]
        if package != DATATROVE and package not in extensions:
            raise RecipeError(
                f"block {self.block} is in no module of datatrove; list the folder {package} under `extensions`"
            )
        places = {"folder": str(folder), "extension": str(extensions.get(package, ""))}
        block = self.model_copy(update=places)
        block._require_code()
        return block.model_copy(update={"code": block._present_code()})

    def portable(self) -> Self:
        """Returns the block without its places on this machine."""
        return self.model_copy(update={"folder": "", "extension": ""})

    def _present_code(self) -> str:
        """Returns the version of the code that is here."""
        parts = [f"datatrove {datatrove_version()}"]
        if self.extension:
            parts.append(f"{Path(self.extension).name} {extension_digest(Path(self.extension))}")
        counts_words = self.name in _COUNT_WORDS or bool(self.extension)
        if counts_words and self.words is None and (spacy := _spacy_version()):
            parts.append(f"spacy {spacy}")
        return ", ".join(parts)

    def _require_code(self) -> None:
        present = self._present_code()
        if self.code not in ("auto", present):
            raise RecipeError(
                f"block {self.block} is pinned to {self.code}, but here is {present}; install that version, or write "
                "code: auto"
            )

    @property
    def name(self) -> str:
        return self.block.rpartition(".")[2]

    @property
    def seconds_per_mb(self) -> float:
        spacy = SPACY_SECONDS if self.name in _COUNT_WORDS and self.words is None else 0.0
        return super().seconds_per_mb + spacy

    def inspect(self) -> str:
        block = self._create()
        return f"block {self.block}: {'stock' if self._accelerated(block) is None else 'accelerated'}"

    def function(self) -> FilterFunction:
        block = self._create()
        accelerated = self._accelerated(block)
        return _stock(block) if accelerated is None else lambda document: accelerated(document.text)

    def _create(self) -> Any:
        """Returns the block, which has filtered a text: what it lacks is found before there are documents."""
        kind = self._imported()
        self._require_parameters(kind)
        for path, digest in self.assets.items():
            self._add_asset(path, digest)
        words = self._words(kind)
        try:
            block = kind(**words, **self.parameters)
        except AtomError:
            raise
        except Exception as error:
            raise RecipeError(f"block {self.block} cannot be created: {in_words(error)}") from None
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

    def _imported(self) -> type[Any]:
        """Imports the class. Raises RecipeError if there is no such class, or if it is refused."""
        self._require_code()
        module_name, _, name = self.block.rpartition(".")
        package = module_name.partition(".")[0]
        if package != DATATROVE:
            if not self.extension:
                raise RecipeError(f"block {self.block} is in no folder of `extensions`; list the folder {package}")
            _add_package(package, Path(self.extension))
        try:
            module = import_module(module_name)
        except Exception as error:
            raise RecipeError(f"block {self.block} cannot be imported: {in_words(error)}") from None
        # A class is refused before anything of it runs.
        kind = getattr(module, name, None)
        if isinstance(kind, type) and is_stock(kind) and name in _REFUSED:
            raise RecipeError(f"block {self.block} {_REFUSED[name]}")
        extended = tuple(map(resolve_name, BASES))
        if not isinstance(kind, type) or not issubclass(kind, extended) or inspect.isabstract(kind):
            names = [each for each, value in vars(module).items() if isinstance(value, type)]
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else "name one"
            raise RecipeError(f"block {self.block} is no filter, formatter or extractor; {hint}")
        return kind

    def _require_parameters(self, kind: type[Any]) -> None:
        """Raises RecipeError for parameters that the class does not have, or that it needs and does not get."""
        known = parameters_of(kind)
        # A class that passes unknown parameters on cannot be checked by its signature.
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in known.values())
        for name in self.parameters:
            if name in self.refused:
                raise RecipeError(f"block {self.block}: {name} cannot be set; {self.refused[name]}")
            if name not in known and not takes_any:
                near = difflib.get_close_matches(name, known, 1)
                names = ", ".join(each for each in known if each not in self.refused)
                hint = f"did you mean {near[0]}?" if near else f"it has {names or 'none'}"
                raise RecipeError(f"block {self.block} has no parameter {name}; {hint}")
        for name, each in known.items():
            is_needed = each.default is inspect.Parameter.empty and each.kind not in _VARIADIC
            if is_needed and name not in self.parameters:
                raise RecipeError(f"block {self.block} needs the parameter {name}; add it")

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


def parameters_of(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class, by name."""
    # Without the first one, which is the instance.
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])


def is_stock(kind: type[Any]) -> bool:
    """Returns True for a class of datatrove itself."""
    return kind.__module__.partition(".")[0] == DATATROVE


def in_words(error: Exception) -> str:
    """Returns an error of another package in one line, without a full stop."""
    text = " ".join(str(error).split()).rstrip(".")
    return escaped(f"{type(error).__name__}: {text}" if text else type(error).__name__, 400)


@cache
def datatrove_version() -> str:
    return metadata.version(DATATROVE)


def extension_folders(recipe_folder: Path, extensions: Extensions) -> dict[str, Path]:
    """Returns the folder of each package that a data recipe lists under `extensions`.

    Raises:
        RecipeError: A folder has no Python module, or a name that no package can have.
    """
    folders: dict[str, Path] = {}
    for extension in extensions:
        folder = (recipe_folder / extension).resolve()
        if not folder.name.isidentifier() or folder.name == DATATROVE or folder.name in folders:
            raise RecipeError(
                f"extensions: {escaped(extension, 200)} gives no package a name of its own; name the folder with "
                "letters, digits and '_'"
            )
        if not extension_files(folder):
            raise RecipeError(f"extensions: there is no Python module in {folder}; correct the path")
        folders[folder.name] = folder
    return folders


def extension_files(folder: Path) -> list[Path]:
    """Returns the Python modules of an extension."""
    return sorted(path for path in folder.rglob("*.py") if path.is_file())


def extension_digest(folder: Path) -> str:
    files = ((path.relative_to(folder).as_posix(), sha256_file(path)) for path in extension_files(folder))
    return tree_digest(files)


def _add_package(name: str, folder: Path) -> None:
    """Makes the modules in a folder importable as those of a package.

    Raises:
        RecipeError: Another package has this name.
    """
    present = sys.modules.get(name)
    if present is not None and list(getattr(present, "__path__", [])) == [str(folder)]:
        return
    if present is not None or importlib.util.find_spec(name) is not None:
        raise RecipeError(
            f"extensions: another package is called {name} as well; give the folder {folder} a name of its own"
        )
    # The folder becomes a package without being put on sys.path, where its modules could hide others.
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package


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
