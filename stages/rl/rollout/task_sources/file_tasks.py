"""Task source `rows`: a file of tasks, scored by the verifier that the recipe names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Key, License, LongLine, Sha256, Text
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import operational
from pipeline.core.store import sha256_file
from stages.rl.rollout.task_sources.settings import Kind, Level, SourceSettings
from stages.tasks.rows import Row, question


class FileTasks(SourceSettings):
    """Rows of a file in the format of NeMo Gym, one JSON object per line."""

    source: Literal["rows"] = Field(description="selects this kind of tasks")
    path: LongLine = operational(..., "path of the file; its digest, not its path, is part of the key")
    digest: Sha256 = Field(description="SHA-256 digest of the file")
    verifier: Key = Field(description="name of the verifier that scores the answers")
    kind: Kind = Field(description="kind of the tasks, which names their bin")
    level: Level = Field(1, description="level of difficulty, which names their bin")
    license: License = Field(description="SPDX license of rows that state none")
    origin: Text = Field(description="origin of rows that state none: URL or text")

    def bins(self) -> list[str]:
        return [f"{self.kind}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        path = Path(self.path)
        if not path.is_file():
            raise RecipeError(f"tasks: there is no file {path}; put it there, or correct tasks.path")
        if (digest := f"sha256:{sha256_file(path)}") != self.digest:
            raise RecipeError(f"tasks: {path} has the digest {digest}, not {self.digest}; restore it, or change digest")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                question(row)
            except (ValueError, LookupError, TypeError) as error:
                raise AtomError(f"{path}, line {number}: not a row of NeMo Gym ({error!r}); fix it") from None
            fields = {"verifier": self.verifier, "kind": self.kind, "level": self.level}
            yield {"license": self.license, "origin": self.origin, **row, **fields, "id": f"{self.kind}/{number:06d}"}
