"""Checks the receipts of opt-outs against the dispositions of the release: every request has one that tells what was
removed for it, and nothing that it lists is kept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

from release import untrusted
from release.checks.findings import Findings
from release.facts.opt_outs import OptOut, read_opt_outs, removed_documents
from release.facts.published_tables import read_json
from release.layout import OPT_OUTS
from release.opened_release import Release
from release.tracing.receipts import MOST_LISTED, SCHEMA, receipt_path, receipts_below
from stages.data.curation.deny_list import OPT_OUT_RULE

MOST_PROBLEMS = 10_000
REQUEST = re.compile("[0-9a-f]{64}")


def receipts(release: Release) -> Findings:
    """Checks the receipts of a whole release."""
    dataset = release.dataset
    opt_outs = {opt_out.request: opt_out for opt_out in read_opt_outs(dataset)}
    problems = list(islice(_problems(release, opt_outs), MOST_PROBLEMS))
    removed = sum(opt_out.removed.total() for opt_out in opt_outs.values())
    text = f"{len(opt_outs)} requests, {removed} documents removed for them"
    return Findings(problems, compared=bool(opt_outs), detail=text, summary=text)


def _problems(release: Release, opt_outs: dict[str, OptOut]) -> Iterator[str]:
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
        if not REQUEST.fullmatch(request) or request not in names:
            yield f"{path} is missing"
            continue
        receipt = untrusted.read_json(release.root / path, follow=True)
        expected: dict[str, Any] = {
            "schema": SCHEMA, "request": request, "date": opt_out.date, "entries": opt_out.entries,
            "deny_list": digest, "rule": OPT_OUT_RULE, "removed": dict(opt_out.removed),
        }  # fmt: skip
        for name, value in expected.items():
            if receipt.get(name) != value:
                yield f"{path}: {name} is not what the data says"
        if [(row["id"], row["found"], row["duplicate_of"]) for row in receipt["documents"]] != documents[request]:
            yield f"{path}: documents are not those of the dispositions"
