"""Checks that the plots of a release show the numbers beside them: each is drawn again and compared."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

from pipeline.core.errors import installing
from release.cards.plots import NAMES, SOFTWARE, Drawings, data_plots, entries, model_plots, version
from release.checks.findings import Findings
from release.opened_release import Release

ROUNDED = 16
"""The largest difference of a color, of 256, that another processor may round."""


def plots(release: Release) -> Findings:
    """Checks that the plots of a folder look like those that its numbers give, if the same matplotlib drew them."""
    findings = Findings(compared=False)
    if release.kind in ("release", "dataset"):
        _compare(release.dataset, data_plots(release.data), findings)
    if release.kind in ("release", "model"):
        for model in release.model_folders:
            _compare(model, model_plots(model, release.models[model.name]), findings)
    return findings


def unexpected(folder: Path, drawings: Drawings) -> list[str]:
    """Sentences about plots that a repository lacks, or should not have. drawings: those that it should have."""
    present = {name for name in NAMES if (folder / name).is_file()}
    missing = [f"{name} is missing" for name in sorted(drawings.keys() - present)]
    return missing + [f"{name} shows what is not here" for name in sorted(present - drawings.keys())]


def _compare(folder: Path, drawings: Drawings, findings: Findings) -> None:
    """Compares the plots of one repository."""
    for name in sorted(name for name in drawings if (folder / name).is_file()):
        published = (folder / name).read_bytes()
        stated = entries(published) or {}
        if importlib.util.find_spec("matplotlib") is None:
            findings.skipped["plots"] = f"plots: drawing them again needs matplotlib; {installing('report')}"
        elif stated.get(SOFTWARE) != version():
            findings.skipped["plots"] = f"plots: drawn by {stated.get(SOFTWARE)}, and here is {version()}"
        else:
            findings.compared = True
            drawn = drawings[name]()
            if published != drawn and not (stated == entries(drawn) and _look_alike(published, drawn)):
                findings.problems.append(f"{folder.name}/{name} does not show the numbers beside it")


def _look_alike(published: bytes, drawn: bytes) -> bool:
    """Returns True if two pictures differ in no pixel by more than ROUNDED."""
    from PIL import Image, ImageChops

    pictures = [Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGBA") for data in (published, drawn)]
    if pictures[0].size != pictures[1].size:
        return False
    bands = ImageChops.difference(*pictures).split()
    return not any(any(band.histogram()[ROUNDED + 1 :]) for band in bands)
