"""Validates the documents of the bundle by each standard's own tool, or by its published schema, without a network.

bom.cdx.json       the strict schema of CycloneDX 1.7, which cyclonedx-python-lib carries
bom.spdx3.json     the model of SPDX 3.0.1, of which spdx-python-model is generated: classes, properties, types,
                   required properties, and references
mof.yml            what the register's schema requires (a schema in frameworks.yaml)
CITATION.cff       what the format requires of the fields that are used (a schema there, too)
eu_summary.json    no field is left blank, each has its basis, each section of the template is there
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import CheckFailed
from release import untrusted
from release.standards import bundle
from release.standards.frameworks import NOT_INCLUDED, TABLES

MOST_ERRORS = 3
"""Errors of one document that are reported."""
WORDS = 300
"""Characters of an error of a library."""
SECTIONS = ("1.1", "1.2", "1.3", "2.1", "2.2.1", "2.2.2", "2.3", "2.4", "2.5", "2.6", "3.1", "3.2", "3.3")


def cyclonedx(content: bytes) -> Iterator[str]:
    """Yields the errors of bom.cdx.json."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    body = untrusted.parse_json(content, "it")
    for error in JsonStrictValidator(SchemaVersion.V1_7).validate_str(content.decode(), all_errors=True) or ():
        yield _schema_error(error.data)
    if body["specVersion"] != "1.7":  # which the schema leaves open
        yield f"specVersion: {body['specVersion']} is not 1.7"

    # Components may hold components, to any depth.
    references, pending = list[str](), [body.get("metadata", {}).get("component", {}), *body.get("components", [])]
    while pending:
        part = pending.pop()
        references += [part["bom-ref"]] if "bom-ref" in part else []
        pending += part.get("components", [])
    if len(set(references)) < len(references):
        yield "two components have one bom-ref"


def spdx(content: bytes) -> Iterator[str]:
    """Yields the errors of bom.spdx3.json."""
    from spdx_python_model import v3_0_1 as model

    untrusted.parse_json(content, "it")
    objects, written = model.SHACLObjectSet(), io.BytesIO()
    try:
        model.JSONLDDeserializer().read(io.BytesIO(content), objects)
        unresolved = sorted(map(str, objects.link()))
        model.JSONLDSerializer().write(objects, written)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        yield _short(f"{type(error).__name__}: {error}")
        return
    if unresolved:
        yield f"refers to {unresolved[0]}, which is no element of it"
    # The library keeps one of two elements with the same id.
    if len(json.loads(written.getvalue())["@graph"]) != len(json.loads(content)["@graph"]):
        yield "two elements have one spdxId"


def framework(content: bytes) -> Iterator[str]:
    """Yields the errors of mof.yml."""
    body = yaml.safe_load(content)
    yield from _against(TABLES["schemas"][bundle.MOF], body)
    rows = body["release"]["components"]
    if [row["name"] for row in rows] != [component["name"] for component in TABLES["components"]]:
        yield "its components are not the seventeen of the framework"
    # A component is either not included, or has a place and a license.
    for row in rows:
        if row["description"] != NOT_INCLUDED and not all(row[name] for name in ("location", "license_name")):
            yield f"{row['name']} has no location or license"


def citation(content: bytes) -> Iterator[str]:
    """Yields the errors of CITATION.cff."""
    yield from _against(TABLES["schemas"][bundle.CITATION], yaml.safe_load(content))


def eu_summary(content: bytes) -> Iterator[str]:
    """Yields the errors of eu_summary.json."""
    body = untrusted.parse_json(content, "it")
    if [section["number"] for section in body["sections"]] != list(SECTIONS):
        yield "its sections are not those of the template"
    for section in body["sections"]:
        for field in section["fields"]:
            if field["answer"] in ("", None, [], {}) or field["basis"] not in ("computed", "maker", "not stated"):
                yield f"{section['number']}, {field['label']}: it has no answer, or no basis of it"


VALIDATORS: dict[str, Callable[[bytes], Iterator[str]]] = {
    bundle.CYCLONEDX: cyclonedx,
    bundle.SPDX: spdx,
    bundle.MOF: framework,
    bundle.CITATION: citation,
    bundle.EU_SUMMARY: eu_summary,
}
"""{path in the release: its validator, which yields a sentence about each error}"""


def problems(release: Path) -> list[str]:
    """Returns the errors of the documents in a folder with `evidence/`. Raises ImportError without the tools."""
    return [f"{path}: {text}" for path in VALIDATORS for text in errors(release, path)]


def errors(release: Path, path: str) -> list[str]:
    """Returns the first errors of one document."""
    try:
        content = untrusted.read(release / path, untrusted.JSON_BYTES, follow=True)
        return list(itertools.islice(VALIDATORS[path](content), MOST_ERRORS))
    except CheckFailed as error:
        return [str(error)]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        return [_short(f"{type(error).__name__}: {error}")]


def _against(schema: dict[str, Any], body: Any) -> Iterator[str]:
    from jsonschema import Draft7Validator

    for error in Draft7Validator(schema).iter_errors(body):
        yield _schema_error(error)


def _schema_error(error: Any) -> str:
    return _short(f"{'/'.join(map(str, error.absolute_path)) or 'the document'}: {error.message}")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WORDS else f"{line[:WORDS]}…"
