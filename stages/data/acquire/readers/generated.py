"""Reader `generated`: texts that a language model, the generator, wrote from the documents of another source.

Stage `generate` draws them; the reader reads its tables. docs/synthetic-data.md describes the settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import field_validator

from pipeline.core.bounds import Context, Flag, License, Line, LongLine, PositiveShare, Range, SourceName, Text
from pipeline.core.errors import RecipeError
from pipeline.core.stage import operational
from stages.data.acquire.readers.base import Document, Files, Reader, Refused
from stages.formats.table import GENERATED_TEXTS, stream_rows
from stages.generation.engine import Engine, engine_field

# Of the files that decide what a generator writes: weights, configs, tokenizer and chat template.
SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
# Stands for the document in a prompt.
PLACE = "{text}"


class Generated(Reader):
    """Texts that a generator wrote, one from each document of another source.

    The source's tree_digest is that of the generator's files, and must be given.
    """

    reader: Literal["generated"]
    """selects this reader"""
    from_source: SourceName
    """source of the documents from which the texts are written"""
    share: PositiveShare = 1.0
    """share of these documents, chosen by a seeded hash of the id"""
    generator: Line
    """name of the generator, for cards and records"""
    path: LongLine = operational(...)
    """folder of the generator in the format of transformers"""
    generator_license: License
    """SPDX license of the generator's weights"""
    generator_terms: Text
    """text or URL that shows the generator's terms for its outputs"""
    output_license: License | None = None
    """SPDX license that these terms put on outputs, beside that of the document; null: none"""
    prompt: Text
    """prompt of the generator; {text} is replaced by the document"""
    form: Literal["chat", "text"] = "chat"
    """chat: the prompt is a user's message in the generator's template; text: it is continued"""
    greedy: Flag = False
    """take the most probable tokens; false: sample at temperature 1"""
    max_new_tokens: Context
    """maximum number of tokens of a text"""
    unfinished: Literal["remove", "keep"] = "remove"
    """texts that did not end within max_new_tokens"""
    batch: Annotated[int, Range(1, 1e5)] = 256
    """documents whose texts are generated together; a kill loses at most one batch"""
    engine: Engine = engine_field()
    """what computes the results"""

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if (places := prompt.count(PLACE)) != 1:
            raise ValueError(f"prompt has {PLACE} {places} times; write it once, where the document is to be")
        return prompt

    @property
    def names_files(self) -> bool:
        return True  # a name is the id of the document that the text was made from

    @property
    def states_parents(self) -> bool:
        return True

    @property
    def declared(self) -> dict[str, Any]:
        """The generator in source.json; its digest is the source's tree_digest."""
        stated = self.model_dump(exclude={"reader", "path", "engine", "batch"})
        return {"generated": stated | {"engine": self.engine.kind}}

    def missing(self, source: str) -> str | None:
        if any(Path(self.path).glob("*.safetensors")):
            return None
        return f"source {source}: no *.safetensors of the generator {self.generator} at {self.path}"

    def files(self, source: str) -> Files:
        if message := self.missing(source):
            raise RecipeError(f"{message}; check reader.path")
        paths = (path for path in Path(self.path).iterdir() if path.is_file() and path.suffix in SUFFIXES)
        return sorted((path.name, path) for path in paths)

    def absolute(self, folder: Path) -> Reader:
        return self.model_copy(update={"path": str((folder / self.path).resolve())})

    def license_of(self, license: str) -> str:
        """Returns the license of a text from a document of that license."""
        if self.output_license in (None, license):
            return license
        return " AND ".join(f"({part})" if " OR " in part else part for part in (license, str(self.output_license)))

    def documents(self, source: str, seed: int, files: Files) -> Iterator[Document | Refused]:
        """Yields the texts of the tables of a part, as stage `generate` draws them."""
        for _, path in files:
            for row in stream_rows(path, list(GENERATED_TEXTS)):
                if row["reason"]:
                    yield Refused(row["parent"], row["kind"], row["reason"], row["license"])
                else:
                    location, license = row["parent"], self.license_of(row["license"])
                    yield Document(location, row["text"], location, 0, license, "", "parent", (row["parent"],))
