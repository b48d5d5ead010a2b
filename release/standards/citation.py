"""CITATION.cff of the release, in the Citation File Format 1.2.0 (citation-file-format.github.io).

The format knows software and datasets, and no models: weights are software, since one runs them. A license that is no
single identifier of SPDX has its address in place of an identifier. There is a date only if the maker states one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from release.standards.standard_facts import StandardFacts, address

IDENTIFIER = re.compile(r"(?!LicenseRef-)[A-Za-z0-9.-]+")


def citation(facts: StandardFacts) -> str:
    release, license = facts.release, facts.release.license.weights
    body: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use this release, please cite it as below.",
        "type": "software",
        "title": release.title,
        "version": release.version,
        "authors": [{"name": facts.maker.provider or f"the maker of {release.repository}, who states no name"}],
        "abstract": release.description,
        "url": address(facts.model_url()),
        "repository-artifact": address(facts.evidence_url),
    }
    if IDENTIFIER.fullmatch(license):
        body["license"] = license
    else:
        body["license-url"] = address(f"{facts.model_url()}/blob/main/LICENSE")
    if facts.maker.market_date:
        body["date-released"] = facts.maker.market_date
    if not release.description:
        del body["abstract"]
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=100)
