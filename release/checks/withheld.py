"""Checks what a release withholds: texts by reference, and documents that were removed on request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from release import layout, references, untrusted
from release.checks.check import Findings
from release.facts.document_facts import OptOut, read_opt_outs, removed_documents
from release.facts.published_tables import read_json
from release.layout import OPT_OUTS
from release.opened_release import Release
from release.references import Reference
from release.tracing.receipts import MOST_LISTED, SCHEMA, receipt_path, receipts_below
from stages.data.curate.deny_list import OPT_OUT_RULE
from stages.formats.file_digests import tree_digest
from stages.formats.table import read_errors


def by_reference(release: Release) -> Findings:
    """Checks that only sources by reference lack texts, and that their files are those of the source's digest.

    States what is by reference among what is skipped.
    """
    dataset = release.dataset
    stated = references.read(dataset)
    findings = Findings(compared=bool(stated))
    for name, files in layout.kept_files(dataset).items():
        documents, without = map(sum, zip(*map(_counts, files), strict=True))
        if name not in stated:
            if without:
                findings.problems.append(f"kept/{name}: {without} documents have no text, and are not by reference")
            continue
        if without != documents:
            findings.problems.append(f"kept/{name}: {documents - without} documents have a text, though by reference")
        findings.problems += _reference_problems(dataset, name, stated[name], [path.name for path in files])
        findings.skipped[name] = (
            f"the texts of {documents:,} documents of {name} are by reference to {stated[name].origin}; "
            "`atom rebuild-data` gets them and compares every hash"
        )
    for name in sorted(stated.keys() - layout.kept_files(dataset).keys()):
        findings.problems.append(f"references.json names {name}, of which there are no documents")
    findings.problems += _unreasoned(dataset, stated)
    names = ", ".join(findings.skipped)
    findings.summary = f"texts by reference: {names}; all others are here"
    return findings


def _unreasoned(dataset: Path, stated: Mapping[str, Reference]) -> list[str]:
    """Returns a sentence on each source that lacks a reason why its texts are published.

    Sources need one if a model wrote them from a source by reference.
    """
    reasons, problems = references.published_reasons(dataset), []
    for path in sorted((dataset / "sources").glob("*.json")):
        generated = read_json(path).get("generated") or {}
        if generated.get("from_source") in stated and path.stem not in reasons:
            problems.append(
                f"references.json does not say why the texts of {path.stem} are published, which a model wrote from "
                f"{generated['from_source']}"
            )
    return problems


def _reference_problems(dataset: Path, name: str, reference: Reference, tables: list[str]) -> list[str]:
    problems = []
    declared = read_json(dataset / "sources" / f"{name}.json")
    if tree_digest(reference.files.items()) != declared["tree_digest"]:
        problems.append(f"references.json: the files of {name} are not those of sources/{name}.json")
    if reference.source.get("name") != name:
        problems.append(f"references.json: the settings of {name} are of another source")
    if tables != [path.name for _, path in references.kept_tables(dataset, name, reference.parts)]:
        problems.append(f"references.json: {name} has {reference.parts} parts, and kept/{name} another number")
    return problems


def _counts(path: Path) -> tuple[int, int]:
    """Returns (documents, documents without a text) of a table."""
    import pyarrow.parquet as pq

    with read_errors(path), pq.ParquetFile(path) as file:
        if file.metadata.num_rows == 0:
            return 0, 0
        column = file.schema_arrow.names.index("text")
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        statistics = [group.column(column).statistics for group in groups if group.num_rows]
        # The footer of a table counts the nulls, so the texts need not be read.
        if all(each is not None and each.has_null_count for each in statistics):
            return file.metadata.num_rows, sum(each.null_count for each in statistics)
        without = sum(batch.column(0).null_count for batch in file.iter_batches(1024, columns=["text"]))
        return file.metadata.num_rows, without


MOST_PROBLEMS = 10_000
REQUEST = re.compile("[0-9a-f]{64}")


def receipts(release: Release) -> Findings:
    """Checks the receipts of a whole release."""
    dataset = release.dataset
    opt_outs = {opt_out.request: opt_out for opt_out in read_opt_outs(dataset)}
    problems = list(islice(_receipt_problems(release, opt_outs), MOST_PROBLEMS))
    removed = sum(opt_out.removed.total() for opt_out in opt_outs.values())
    text = f"{len(opt_outs)} requests, {removed} documents removed for them"
    return Findings(problems, compared=bool(opt_outs), detail=text, summary=text)


def _receipt_problems(release: Release, opt_outs: dict[str, OptOut]) -> Iterator[str]:
    dataset = release.dataset
    digest = read_json(dataset / OPT_OUTS)["deny_list"]
    documents: dict[str, list[tuple[str, str, str | None]]] = {request: [] for request in opt_outs}
    for row in removed_documents(dataset):
        if not row["requests"]:
            yield f"dispositions: {row['id']} is removed on request, and its match names none"
        for request in row["requests"]:
            if request not in documents:
                yield f"dispositions: {row['id']} is removed for a request that {OPT_OUTS} does not name"
            elif len(documents[request]) < MOST_LISTED:
                documents[request].append((row["id"], row["found"], row["duplicate_of"]))
    names = {path.stem for path in receipts_below(release.root)}
    for request in sorted(names - opt_outs.keys()):
        yield f"{receipt_path(request)} is a receipt of a request that dataset/{OPT_OUTS} does not name"
    for request, opt_out in sorted(opt_outs.items()):
        path = receipt_path(request)
        # A request is a part of the path, so it must be a digest.
        if not REQUEST.fullmatch(request) or request not in names:
            yield f"{path} is missing"
            continue
        receipt = untrusted.read_json(release.root / path, follow=True)
        expected: dict[str, Any] = {
            "schema": SCHEMA,
            "request": request,
            "date": opt_out.date,
            "entries": opt_out.entries,
            "deny_list": digest,
            "rule": OPT_OUT_RULE,
            "removed": dict(opt_out.removed),
        }
        for name, value in expected.items():
            if receipt.get(name) != value:
                yield f"{path}: {name} is not what the data says"
        if [(row["id"], row["found"], row["duplicate_of"]) for row in receipt["documents"]] != documents[request]:
            yield f"{path}: documents are not those of the dispositions"
