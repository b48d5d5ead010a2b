"""Addresses of licenses, as SPDX expressions."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pipeline.core.bounds import spdx

_KINDS = {
    "by": "BY", "by-sa": "BY-SA", "by-nd": "BY-ND", "by-nc": "BY-NC", "by-nc-sa": "BY-NC-SA", "by-nc-nd": "BY-NC-ND",
    "by-nd-nc": "BY-NC-ND", "sa": "SA", "nd": "ND", "nc": "NC", "nc-sa": "NC-SA", "nd-nc": "NC-ND",
}  # fmt: skip
_CREATIVE_COMMONS = re.compile(
    r"/licenses/([a-z-]+)/(1\.0|2\.0|2\.1|2\.5|3\.0|4\.0)(?:/([a-z]{2}|igo|scotland))?(?:/|$)"
)
_PUBLIC_DOMAIN = {"/publicdomain/zero/1.0": "CC0-1.0", "/publicdomain/mark/1.0": "CC-PDM-1.0"}
_DEDICATION = "/licenses/publicdomain"
_BY_IDENTIFIER = {"spdx.org": "/licenses/", "opensource.org": "/license"}
_TEXTS = {
    "apache.org/licenses/license-2.0": "Apache-2.0",
    "gnu.org/licenses/fdl-1.1": "GFDL-1.1-only",
    "gnu.org/licenses/fdl-1.2": "GFDL-1.2-only",
    "gnu.org/licenses/fdl-1.3": "GFDL-1.3-only",
    "gnu.org/licenses/fdl": "LicenseRef-GFDL",
    "gnu.org/copyleft/fdl": "LicenseRef-GFDL",
    "nationalarchives.gov.uk/doc/open-government-licence/version/1": "OGL-UK-1.0",
    "nationalarchives.gov.uk/doc/open-government-licence/version/2": "OGL-UK-2.0",
    "nationalarchives.gov.uk/doc/open-government-licence/version/3": "OGL-UK-3.0",
    "unlicense.org": "Unlicense",
}
"""{address of the text of a license, without scheme, www., ending and last slash: its expression}. The addresses of the
GFDL without a version lead to its newest one."""


def expression_of(address: str) -> str | None:
    """The SPDX expression of the license whose text or summary has this address; None if it is unknown.

    A license of Creative Commons that was adapted to a country and is not in SPDX is a LicenseRef of its own.
    """
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        return None
    host, path = (parts.hostname or "").removeprefix("www."), parts.path.rstrip("/")
    if host == "creativecommons.org":
        return _creative_commons(path.lower())
    if host in _BY_IDENTIFIER and path.startswith(_BY_IDENTIFIER[host]):
        try:
            return spdx(re.sub(r"\.(html|json|txt)$", "", path.rsplit("/", 1)[-1]))
        except ValueError:
            return None
    return _TEXTS.get(re.sub(r"\.(html|txt|en\.html)$", "", f"{host}{path}".lower()))


def _creative_commons(path: str) -> str | None:
    if match := _CREATIVE_COMMONS.match(path):
        kind, version, country = _KINDS.get(match[1]), match[2], match[3]
        if kind is None:
            return None
        name = f"CC-{kind}-{version}" + (f"-{country.upper()}" if country else "")
        try:
            return spdx(name)
        except ValueError:
            return f"LicenseRef-{name}"
    if path.startswith(_DEDICATION):
        return "CC-PDDC"
    return next((license for start, license in _PUBLIC_DOMAIN.items() if f"{path}/".startswith(f"{start}/")), None)
