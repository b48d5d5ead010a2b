"""JSON Schemas of recipes, data recipes and cluster profiles, for editors: from the classes that validate these files.

    python -m pipeline.operations.json_schema recipe

A schema has the fields, types, bounds and descriptions. Only `atom validate` finds contradictions between fields.
https://json-schema.org/draft/2020-12
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from pipeline.graph import recipe, registry
from pipeline.launch.cluster_profile import Profile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SUFFIX = ".schema.json"


def schema_id(kind: str) -> str:
    return f"urn:atom-release:schema:{kind}"


def models() -> dict[str, type[BaseModel]]:
    """The class of each kind of file that a user writes."""
    return {"recipe": recipe.schema(), "data_recipe": registry.definition().DATA_RECIPE, "cluster_profile": Profile}


class _Generator(GenerateJsonSchema):
    """Marks operational fields by a name of its own, which other readers of a schema skip."""

    def generate(self, schema: Any, mode: Any = "validation") -> dict[str, Any]:
        return {"$schema": DIALECT, **_marked(super().generate(schema, mode))}


def _marked(value: Any) -> Any:
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if not isinstance(value, dict):
        return value
    marks = {"x-operational": True} if value.get("identity") is False else {}
    is_marked = isinstance(value.get("identity"), (bool, str))
    return {name: _marked(item) for name, item in value.items() if not (is_marked and name == "identity")} | marks


def text(kind: str) -> str:
    """The schema of a kind of file, as a file."""
    schema = models()[kind].model_json_schema(schema_generator=_Generator)
    body = {"$schema": DIALECT, "$id": schema_id(kind), **schema, "title": f"atom {kind.replace('_', ' ')}"}
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    print(text(sys.argv[1]), end="")
