"""The facts that the documents of standards are made from, read from the published files of a release."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.core import provenance
from pipeline.core.bounds import spdx
from release.facts.data_facts import DataFacts
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import Manifest, read_json
from release.facts.run_facts import Costs, total_cost
from release.facts.variant_facts import VariantFacts
from release.layout import MODEL, STANDARDS, VARIANT, phases_of
from release.opened_release import Release
from release.schema import ReleaseInfo
from release.standards.package_list import PACKAGES, Package
from stages.maker import Category, Maker

NOT_STATED = "not stated"
LEFT_OUT = "making of the machines, network, storage, experiments before this run, and use of the model"
PROCEDURAL = ("problems", "chat-problems", "courtesies", "passkeys")
"""Readers whose documents a program of this project wrote."""
HUB = "https://huggingface.co"
WEIGHTS = (".safetensors", ".gguf")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?!//[^/?]*(%5[BD]|:[0-9]*[^0-9/?]))")
"""Begins an address with a scheme, whose host has no bracket and whose port is a number."""
LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, eq=False)
class StandardFacts:
    """Compared by identity, so that what is expensive is computed once for each object.

    models: by folder, the final one first. costs: by stage. packages: of the environments. ended, acquired: the last
    ends of an attempt and of an acquisition, as `provenance.clock` writes them; "" without one. methods: how energy was
    estimated. counted: attempts with an estimate, of all. declared: source.json by source. manifests: by node.
    variants: of the final model, by the end of their repository's name."""

    folder: Path
    release: ReleaseInfo
    data: DataFacts
    models: Mapping[str, ModelFacts]
    costs: Costs
    maker: Maker
    packages: list[Package]
    ended: str
    acquired: str
    methods: list[str]
    counted: tuple[int, int]
    declared: Mapping[str, dict[str, Any]]
    manifests: Mapping[str, Manifest]
    variants: Mapping[str, VariantFacts] = field(default_factory=dict)

    @property
    def provider(self) -> str:
        return self.maker.provider or self.release.namespace

    @property
    def contact(self) -> str:
        return self.maker.address or self.release.contact or NOT_STATED

    @property
    def published_base(self) -> str:
        """The repository of the published model that training began with, whose data is not in the release; else ""."""
        base = self.models[MODEL].base
        return str(base["repo"]) if base else ""

    @property
    def phases(self) -> list[str]:
        return phases_of(self.release.nodes)

    @property
    def evidence_url(self) -> str:
        return f"{HUB}/datasets/{self.release.repository}-evidence"

    @property
    def data_url(self) -> str:
        return f"{HUB}/datasets/{self.release.repository}-data"

    def variant_url(self, suffix: str) -> str:
        return f"{HUB}/{self.release.repository}{suffix}"

    def model_url(self, folder: str = MODEL) -> str:
        return f"{HUB}/{self.release.repository}{folder.removeprefix(MODEL)}"

    def url_of(self, path: str) -> str:
        """The address of a path of the release on the Hub."""
        top, _, rest = path.partition("/")
        if top == "dataset":
            return address(f"{self.data_url}/tree/main/{rest}")
        if top == "checkpoints":
            return address(f"{HUB}/{self.release.repository}-checkpoints/tree/main/{rest}".rstrip("/"))
        if top.partition("-")[0] == MODEL:
            return address(f"{self.model_url(top)}/tree/main/{rest}".rstrip("/"))
        return address(f"{self.evidence_url}/tree/main/{path}")

    def weights(self, folder: str) -> dict[str, str]:
        """{path in the model's folder: SHA-256} of its weights, by the manifest of its export."""
        return self._weights(f"export-{self.models[folder].name()}")

    def variant_weights(self, suffix: str) -> dict[str, str]:
        """{path in the variant's folder: SHA-256} of its weights, by the manifest of its stage."""
        return self._weights(f"{VARIANT}{suffix}")

    def _weights(self, node: str) -> dict[str, str]:
        digests = self.manifests[node].digests if node in self.manifests else {}
        paths = {path.removeprefix("model/"): digest for path, digest in digests.items() if path.startswith("model/")}
        return {path: digest for path, digest in sorted(paths.items()) if path.endswith(WEIGHTS)}

    def category(self, source: str) -> tuple[Category, str]:
        """The category of a source, and why: the maker's statement, or the reader and the origin."""
        if source in self.maker.sources:
            return self.maker.sources[source], "maker"
        reader = self.declared.get(source, {}).get("reader")
        if self.data.sources[source].generated is not None:
            return "synthetic", "computed"
        if reader in PROCEDURAL:
            return "other", "computed"
        public = reader == "hub" or self.data.sources[source].origin.startswith(("https://", "http://"))
        return ("public" if public else "other"), "computed"

    def read_by(self, folder: str) -> list[str]:
        """The sources that the phases of a model read."""
        read = {name for phase in self.models[folder].training for name in self.data.sources_read(phase)}
        return [name for name in self.data.sources if name in read]

    def of_category(self, category: Category) -> list[str]:
        return [name for name in self.data.sources if self.category(name)[0] == category]


def read_facts(release: Release) -> StandardFacts:
    """Returns the facts of a release, with what its statements and the declarations of its sources say."""
    ended = acquired = ""
    methods, attempts, counted = set[str](), 0, 0
    for body in release.statements.values():
        finished = str(body["predicate"]["runDetails"]["metadata"]["finishedOn"])
        ended = max(ended, finished)
        if provenance.parameters_of(body)["node"].startswith("acquire-"):
            acquired = max(acquired, finished)
        usage = provenance.usage(body)
        if provenance.phase_of(body) is None:
            attempts, counted = attempts + 1, counted + ("energy_joules_estimate" in usage)
        if "energy_method" in usage:
            methods.add(str(usage["energy_method"]))
    declared = {path.stem: read_json(path) for path in sorted((release.dataset / "sources").glob("*.json"))}
    section = release.recipe.get("release", {})
    return StandardFacts(
        folder=release.root,
        release=release.info,
        data=release.data,
        models=release.models,
        costs=release.costs,
        maker=Maker.model_validate(section.get("maker", {})),
        packages=[Package(**row) for row in read_json(release.root / STANDARDS / PACKAGES)],
        ended=ended,
        acquired=acquired,
        methods=sorted(methods),
        counted=(counted, attempts),
        declared=declared,
        manifests=release.manifests,
        variants=release.variants,
    )


def energy(facts: StandardFacts) -> dict[str, Any]:
    """Returns the content of energy.json: energy by stage, and carbon by the maker's factor.

    Energies are in kWh, carbon in kg of CO2 equivalent, null without a factor:

    carbon in kg = energy in kWh x overhead x grams of CO2 equivalent per kWh / 1000
    """
    carbon, (counted, attempts) = facts.maker.carbon, facts.counted

    def row(usage: dict[str, float]) -> dict[str, float | None]:
        kwh = usage["energy_wh"] / 1000
        return {
            "attempts": int(usage["attempts"]),
            "failed": int(usage["failed"]),
            "core_hours": usage["core_hours"],
            "gpu_hours": usage["gpu_hours"],
            "energy_kwh": kwh,
            "co2_kg": kwh * carbon.overhead * carbon.grams_per_kwh / 1000 if carbon else None,
        }

    return {
        "measured": False,
        "methods": facts.methods,
        "attempts_with_energy": counted,
        "attempts": attempts,
        "factors": {"carbon": carbon.model_dump() if carbon else None, "stated_by": "maker" if carbon else None},
        "left_out": LEFT_OUT,
        "stages": {stage: row(usage) for stage, usage in facts.costs.items()},
        "total": row(total_cost(facts.costs)),
    }


def address(text: str) -> str:
    """A text as the reference of a URI (RFC 3986): what no URI has is escaped, and escapes are kept."""
    place, sign, fragment = quote(text, safe="/:?@!$&'()*+,;=-._~%#", errors="surrogatepass").partition("#")
    if not SCHEME.match(place):
        place = place.replace(":", "%3A")
    return LONE_PERCENT.sub("%25", f"{place}{sign}{fragment.replace('#', '%23')}")


def segment(text: str, safe: str = "") -> str:
    """A text as one segment of the path of a URI; different texts give different segments."""
    return quote(text, safe=safe, errors="surrogatepass")


def expression(license: str) -> str | None:
    """The SPDX expression in the spelling of SPDX; None for a text that is none."""
    try:
        return spdx(license)
    except (ValueError, RecursionError):
        return None


def joined(licenses: list[str]) -> str | None:
    """The expression of licenses that all apply, each to its part; None if one is no expression."""
    known = [expression(license) for license in licenses]
    texts = [text for text in known if text is not None]
    if not texts or len(texts) < len(known):
        return None
    return texts[0] if len(texts) == 1 else " AND ".join(f"({text})" if " " in text else text for text in texts)
