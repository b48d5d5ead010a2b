"""Checks that every document has one disposition, a license, and the same text in every table."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from release.assembly.published_tables import read_json, stream_rows
from release.checks.check import Subject
from release.checks.findings import Findings

UNKNOWN_LICENSES = frozenset({"", "unknown", "noassertion", "none", "other"})


def licenses(subject: Subject) -> Findings:
    """Checks that every document has a license, including removed ones."""
    problems, expressions = [], set()
    for row in stream_rows(subject.folder / "dispositions.parquet", ["id", "source", "license"]):
        license = row["license"] or ""
        expressions.add(license)
        if license.lower() in UNKNOWN_LICENSES:
            problems.append(f"dispositions.parquet: document {row['id']} of source {row['source']} has no license")
    return Findings(problems, summary=f"every document has a license: {', '.join(sorted(expressions))}")


def dispositions(subject: Subject) -> Findings:
    """Checks that each document has one disposition, that in = kept + removed, and that the kept ones are exactly those
    of kept/*.parquet."""
    dataset = subject.folder
    columns = ["id", "source", "disposition", "rule", "split", "license"]
    ids: set[str] = set()
    kept: dict[str, dict[str, tuple[Any, Any]]] = {}
    counts: Counter[str] = Counter()
    pairs: dict[tuple[Any, Any], tuple[Any, Any]] = {}  # shared by documents
    duplicate, problems = "", []
    for row in stream_rows(dataset / "dispositions.parquet", columns):
        key, source = row["id"], row["source"]
        duplicate = duplicate or (key if key in ids else "")
        ids.add(key)
        counts[source] += 1
        kept_of_source = kept.setdefault(source, {})
        if row["disposition"] not in ("kept", "removed") or (row["disposition"] == "removed") != bool(row["rule"]):
            problems.append(f"dispositions.parquet: document {key} is neither kept nor removed by a rule")
        if row["disposition"] == "kept":
            pair = row["split"], row["license"]
            kept_of_source[key] = pairs.setdefault(pair, pair)
    if duplicate:
        problems.insert(0, f"dispositions.parquet: document {duplicate} has two fates")
    for source in sorted(kept):
        problems += _check_kept_documents(dataset, source, kept[source])
        declared = dataset / "sources" / f"{source}.json"
        if declared.exists() and read_json(declared).get("documents", counts[source]) != counts[source]:
            problems.append(
                f"dispositions.parquet: {counts[source]} documents of {source}, the source says another number"
            )
    total, kept_total = counts.total(), sum(map(len, kept.values()))
    summary = f"{total} documents in = {kept_total} kept + {total - kept_total} removed"
    return Findings(problems, summary=summary)


def _check_kept_documents(dataset: Path, source: str, expected: dict[str, tuple[Any, Any]]) -> list[str]:
    """Checks that kept/<source>.parquet has exactly the documents of `expected`, {id: (split, license)}."""
    path = dataset / "kept" / f"{source}.parquet"
    problems, extra, missing = [], set(), set(expected)
    for row in stream_rows(path, ["id", "split", "license"]) if path.exists() else ():
        missing.discard(row["id"])
        if row["id"] not in expected:
            extra.add(row["id"])
        elif expected[row["id"]] != (row["split"], row["license"]):
            problems.append(
                f"kept/{source}.parquet: document {row['id']} has another split or license than its disposition"
            )
    if different := min(missing | extra, default=""):
        problems.insert(0, f"kept/{source}.parquet: document {different} is not kept in both tables")
    return problems


def content_hashes(subject: Subject) -> Findings:
    """Checks that the content hash of every kept document is that of its text, and equal in every table."""
    dataset = subject.folder
    dispositions = stream_rows(dataset / "dispositions.parquet", ["source", "id", "kept_hash"])
    stated = {(r["source"], r["id"]): r["kept_hash"] for r in dispositions}
    tokens = stream_rows(dataset / "tokens/documents.parquet", ["source", "id", "content_hash"])
    tokenized = {(r["source"], r["id"]): r["content_hash"] for r in tokens}
    problems = []
    for path in sorted((dataset / "kept").glob("*.parquet")):
        for row in stream_rows(path, ["id", "text", "content_hash"]):
            if hashlib.sha256(row["text"].encode()).hexdigest() != row["content_hash"]:
                problems.append(f"kept/{path.name}: the text of {row['id']} is not what its content hash says")
            key = (path.stem, row["id"])
            if stated.pop(key, None) != row["content_hash"]:
                problems.append(f"dispositions.parquet: the kept hash of {row['id']} is not that of kept/{path.name}")
            if tokenized.pop(key, None) != row["content_hash"]:
                problems.append(
                    f"tokens/documents.parquet: the content hash of {row['id']} is not that of kept/{path.name}"
                )
    problems += [
        f"dispositions.parquet: {key} has a kept hash, but is not kept"
        for (_, key), kept_hash in stated.items()
        if kept_hash
    ]
    problems += [f"tokens/documents.parquet: {key} is no kept document" for _, key in tokenized]
    return Findings(problems)
