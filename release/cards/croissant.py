"""croissant.json of the dataset repository: Croissant 1.1 with its RAI vocabulary and PROV-O provenance.

This module writes the JSON-LD, and a gate validates it with mlcroissant; every number is read from the described files.
Specifications: docs.mlcommons.org/croissant/docs/croissant-spec-1.1.html, …/croissant-rai-spec.html, w3.org/TR/prov-o.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.parts import PART_PATTERN, part_number
from pipeline.core.store import sha256_file
from pipeline.core.yaml_text import read_trusted
from release import layout
from release.facts.data_facts import DataFacts, SourceFacts
from release.facts.published_tables import read_json
from release.layout import all_files
from release.schema import ReleaseInfo

NAME = "croissant.json"
LOADED = 256 << 20
"""The largest file whose records the gate loads."""
TYPES = {"double": "sc:Float", "float": "sc:Float", "bool": "sc:Boolean"}
TYPES |= dict.fromkeys(("int16", "int32", "int64", "uint64"), "sc:Integer")
"""{type of a column: its type in Croissant}; others are sc:Text."""
WORDS = read_trusted(Path(__file__).with_suffix(".yaml"))
CONTEXT: dict[str, Any] = {term: f"cr:{term}" for term in WORDS["terms"]} | WORDS["context"]


def describe_dataset(
    release: ReleaseInfo, dataset: Path, data: DataFacts, digest: Callable[[Path], str] = sha256_file
) -> dict[str, Any]:
    """Returns the JSON-LD of a dataset folder.

    Args:
        release: The statement of the release.
        dataset: The folder.
        data: Its facts.
        digest: Computes SHA-256 of a file.
    """
    repo = f"https://huggingface.co/datasets/{release.repository}-data"
    tables = _tables(dataset, data)
    patterns = {name: _pattern(dataset, files) for name, files in tables.items() if part_number(files[0]) is not None}
    # Curation counts the documents in which it replaced personal data.
    curated = read_json(dataset / "summary.json")["sources"]
    rules = sorted({rule.split("/")[0] for row in data.sources.values() for rule in row.removed})
    figures = {
        "read": sum(row.documents_in for row in data.sources.values()),
        "kept": sum(row.kept for row in data.sources.values()),
        "sources": len(data.sources),
        "rules": ", ".join(rules) or "no rule",
        "redacted": sum(row.get("edited", {}).get("PIIFormatter", 0) for row in curated.values()),
        "dispositions": patterns["dispositions"],
        "requests": release.contact or "the discussions of the repository",
    }
    distribution = [
        _file_set(name, patterns[name]) if name in patterns else _file(dataset, files[0], name, digest)
        for name, files in tables.items()
    ]
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": f"{release.name}-data",
        "description": f"What {release.title} was trained on: the documents that were kept, one disposition for "
        "every document that was read, and where each was seen in training.",
        "url": repo,
        "version": release.version,
        "license": _license_url(release.license.data_compilation),
        "citeAs": f"{release.title} {release.version}, {repo}",
        "creator": {"@type": "sc:Organization", "name": release.namespace},
        "isLiveDataset": False,
        **({"inLanguage": list(release.languages)} if release.languages else {}),
        "distribution": distribution,
        "recordSet": [_records(files[0], name, name in patterns) for name, files in tables.items()],
        "prov:wasDerivedFrom": [_source(dataset, name, row) for name, row in data.sources.items()],
        **{name: _filled(text, figures) for name, text in WORDS["data"].items()},
    }


def _filled(text: str | list[str], figures: dict[str, Any]) -> str | list[str]:
    """Returns a text, or each of a list, with the figures in it."""
    return text.format(**figures) if isinstance(text, str) else [part.format(**figures) for part in text]


def _tables(dataset: Path, data: DataFacts) -> dict[str, list[Path]]:
    """Returns the files of each table by its name."""
    tables = {"dispositions": all_files(layout.disposition_files(dataset))}
    by_source = {
        "kept": {name: files for name, files in layout.kept_files(dataset).items() if name in data.sources},
        "attribution": layout.attribution_files(dataset),
        "notices": layout.notice_files(dataset),
        "measures": layout.measure_files(dataset),
        "generated": layout.generated_files(dataset),
    }
    for kind, sources in by_source.items():
        tables |= {f"{kind}-{name}": files for name, files in sources.items()}
    tables["tokens"] = all_files(layout.token_files(dataset))
    tables["problems"] = [dataset / "evaluation/items.parquet"]

    # The others are orders, rollouts and pairs, outputs and results of each item. Their names are made of their paths.
    described = {path for files in tables.values() for path in files}
    places: dict[Path, list[Path]] = {}
    for path in sorted(dataset.rglob("*.parquet")):
        if path not in described:
            # The parts of one table are in a folder of their own, which names it.
            places.setdefault(path.parent if part_number(path) is not None else path.with_suffix(""), []).append(path)
    further: dict[str, list[Path]] = {}
    for place, files in places.items():
        name = "-".join(place.relative_to(dataset).parts)
        # The folder `a/b` and the file `a-b` have one name.
        further[f"{name}-{len(further)}" if name in further else name] = files
    return tables | further


def _license_url(spdx: str) -> str:
    """Returns the address of a license's text; an expression of several licenses is kept."""
    return spdx if " " in spdx else f"https://spdx.org/licenses/{spdx}.html"


def _pattern(dataset: Path, files: list[Path]) -> str:
    """Returns the pattern of the parts of a table: of one source, or of all."""
    folders = {file.parent for file in files}
    folder = files[0].parent if len(folders) == 1 else files[0].parent.parent / "*"
    return f"{folder.relative_to(dataset).as_posix()}/{PART_PATTERN}"


def _file_set(name: str, pattern: str) -> dict[str, Any]:
    """Returns the parts of a table; SHA256SUMS next to the description has their digests."""
    return {
        "@type": "cr:FileSet",
        "@id": f"{name}-parts",
        "name": f"{name}-parts",
        "encodingFormat": "application/x-parquet",
        "includes": pattern,
    }


def _file(dataset: Path, path: Path, name: str, digest: Callable[[Path], str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": f"{name}.parquet",
        "name": f"{name}.parquet",
        "contentUrl": path.relative_to(dataset).as_posix(),
        "contentSize": f"{path.stat().st_size} B",
        "encodingFormat": "application/x-parquet",
        "sha256": digest(path),
    }


def _records(path: Path, name: str, in_parts: bool) -> dict[str, Any]:
    """Returns a record set with a field for each column of a table. `path` is the table, or its first part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    fields, nested = [], list[str]()
    # A table in parts is a set of files; any other is one file.
    files = {"fileSet": {"@id": f"{name}-parts"}} if in_parts else {"fileObject": {"@id": f"{name}.parquet"}}
    for column in schema:
        # A list has the type of its values, and any other column its own.
        value = getattr(column.type, "value_type", column.type)
        # A field here has one value or a list of values, so structs and bytes are none.
        if pa.types.is_nested(value) or pa.types.is_binary(value):
            nested.append(column.name)
            continue
        array = {"isArray": True, "arrayShape": "-1"} if value != column.type else {}
        field = {"@type": "cr:Field", "@id": f"{name}/{column.name}", "name": column.name, **array}
        kind = TYPES.get(str(value), "sc:Text")
        fields.append({**field, "dataType": kind, "source": {**files, "extract": {"column": column.name}}})
    left_out = {"description": f"Columns that are no field: {', '.join(nested)}."} if nested else {}
    return {"@type": "cr:RecordSet", "@id": name, "name": name, **left_out, "field": fields}


def _source(dataset: Path, name: str, row: SourceFacts) -> dict[str, Any]:
    """Returns a source as a PROV entity: its origin, and the digest of the data that was read there, if it has one."""
    path = dataset / f"sources/{name}.json"
    declared = read_json(path) if path.exists() else {}
    entity: dict[str, Any] = {"@type": "prov:Entity", "@id": f"source/{name}", "prov:label": name}
    if row.origin:
        entity["prov:atLocation"] = row.origin
    if tree := declared.get("tree_digest"):
        entity["identifier"] = tree
    return entity | {"license": row.licenses}


def problems(path: Path, records: int = 3) -> list[str]:
    """Returns the errors of mlcroissant in a croissant.json, and the record sets that do not load.

    Args:
        path: The croissant.json, next to its files.
        records: The number of records of each set that are loaded.
    """
    import itertools
    import logging
    import warnings

    import mlcroissant

    # Its warnings are no findings, and would only be printed among the lines of the build.
    logging.getLogger("absl").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of its libraries about each other
        try:
            description = mlcroissant.Dataset(jsonld=path)
        except mlcroissant.ValidationError as error:
            return [" ".join(str(error).split())]
        # Its warnings are ignored, such as that on a missing `datePublished`: no clock enters a release.
        errors = list(description.metadata.ctx.issues.errors)
        # mlcroissant reads a whole file into memory.
        large = _large(path)
        for record_set in description.metadata.record_sets:
            if record_set.uuid in large:
                continue
            rows = list(itertools.islice(description.records(record_set.uuid), records))
            names = {field.uuid for field in record_set.fields}
            if any(set(row) != names for row in rows):
                errors.append(f"record set {record_set.uuid} does not load with its fields")
    return sorted(errors)


def _large(path: Path) -> set[str]:
    """Returns the record sets with a file of more than LOADED bytes."""
    names = set()
    for row in read_json(path)["distribution"]:
        pattern = row.get("includes", row.get("contentUrl", ""))
        if any(file.stat().st_size > LOADED for file in path.parent.glob(pattern)):
            names.add(row["@id"].removesuffix("-parts").removesuffix(".parquet"))
    return names
