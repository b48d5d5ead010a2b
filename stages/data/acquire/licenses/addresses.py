"""The license whose text or summary has an address."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pipeline.core.bounds import spdx

VERSIONS = ("1.0", "2.0", "2.1", "2.5", "3.0", "4.0")
# A deed or the text of a license in a language.
_PAGE = r"(?:/(?:deed|legalcode)(?:\.[a-z]{2}(?:[_-][a-z]{2,4})?)?)?"
_CREATIVE_COMMONS = re.compile(
    r"/licen[cs]es/(by(?:-nc)?(?:-sa|-nd)?|by-nd-nc|sa|nd|nc|nc-sa|nd-nc)"
    rf"(?:/({'|'.join(map(re.escape, VERSIONS))})(?:/([a-z]{{2}}|igo|scotland))?{_PAGE})?"
)
# The picture of a license, as the chooser of Creative Commons puts it beside the link: its group is the place.
_BUTTON = re.compile(r"(?:i\.creativecommons\.org|licensebuttons\.net)/([lp])/(.+)/(?:88x31|80x15)\.(?:png|svg)")
_PUBLIC_DOMAIN = re.compile(rf"/publicdomain/(zero|mark)/1\.0{_PAGE}")
_DEDICATION = re.compile(rf"/licenses/publicdomain{_PAGE}")
# {address of the text of a license, without scheme, www., ending and last slash: its expression}. The addresses of
# the GFDL without a version lead to its newest one.
_LICENSE_TEXTS = {
    "gnu.org/licenses/fdl-1.3": "GFDL-1.3-only",
    "gnu.org/licenses/fdl": "LicenseRef-GFDL",
    "gnu.org/copyleft/fdl": "LicenseRef-GFDL",
    "nationalarchives.gov.uk/doc/open-government-licence/version/3": "OGL-UK-3.0",
}


def place_of(address: str) -> str:
    """Returns the host and path of an address in lower case, without www., ending and last slash; "" without a host."""
    try:
        parts = urlsplit(address.strip())
    except ValueError:
        return ""
    host, path = (parts.hostname or "").removeprefix("www."), parts.path.rstrip("/")
    return re.sub(r"\.(html|txt|php|json|en\.html)$", "", f"{host}{path}".lower()) if host else ""


def expression_of(address: str) -> str | None:
    """Returns the SPDX expression of the license whose text, summary or button has this address; None if it is unknown.

    A license of Creative Commons that was adapted to a country and is not in SPDX is a LicenseRef of its own, and so is
    one without a version.
    """
    place = place_of(address)
    if button := _BUTTON.fullmatch(place):
        return _creative_commons(f"/{'licenses' if button[1] == 'l' else 'publicdomain'}/{button[2]}")
    host, slash, path = place.partition("/")
    return _creative_commons(slash + path) if host == "creativecommons.org" else _LICENSE_TEXTS.get(host + slash + path)


def creative_commons(kind: str, version: str | None, region: str | None = None) -> str:
    """Returns the expression of a license of Creative Commons.

    Args:
        kind: The elements in the order of SPDX, such as BY-NC-SA.
        version: None if it is not stated.
        region: The country to which it was adapted, as its address has it.
    """
    if version is None:
        return f"LicenseRef-CC-{kind}-unversioned"
    name = f"CC-{kind}-{version}" + (f"-{region.upper()}" if region else "")
    try:
        return spdx(name)
    except ValueError:
        return f"LicenseRef-{name}"


def _creative_commons(path: str) -> str | None:
    if match := _CREATIVE_COMMONS.fullmatch(path):
        # Version 1.0 has the parts in another order than SPDX and the later versions.
        return creative_commons(match[1].upper().replace("ND-NC", "NC-ND"), match[2], match[3])
    if match := _PUBLIC_DOMAIN.fullmatch(path):
        return {"zero": "CC0-1.0", "mark": "CC-PDM-1.0"}[match[1]]
    return "CC-PDDC" if _DEDICATION.fullmatch(path) else None
