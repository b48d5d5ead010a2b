"""The facts that the documents of standards are made from, read from the published files of a release.

Among them is packages.json: the installed packages of every environment of a release, with licenses and hashes. Their
names and versions are those of the published statements. Licenses and hashes are looked up when the release is built:
in the metadata of the package, if that version is installed, and in the lock files of the checkout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
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
from stages.data.acquire.licenses.expressions import load_map
from stages.data.acquire.packages.python_metadata import parse
from stages.recipe import Category, Maker

NOT_STATED = "not stated"
HUB = "https://huggingface.co"
PACKAGES = "packages.json"
"""In the folder of the standards, the packages of all environments."""
WEIGHTS = (".safetensors", ".gguf")
"""The ends of the names of files with weights."""
LEFT_OUT = "making of the machines, network, storage, experiments before this run, and use of the model"
"""The uses of energy that the figures of a release leave out."""
PROCEDURAL = ("problems", "chat-problems", "courtesies", "passkeys")
"""Readers whose documents a program of this project wrote."""
MOST_STATED = 200
"""Characters of a license in a package's own words."""
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
"""A hash in an entry of a lock file."""
ENTRY = re.compile(r"([A-Za-z0-9][\w.-]*)==([^\s;\\]+)")
"""The name and the version at the beginning of an entry of a lock file."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?!//[^/?]*(%5[BD]|:[0-9]*[^0-9/?]))")
"""Begins an address with a scheme, whose host has no bracket and whose port is a number."""
LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
"""A percent sign that begins no escape."""


@dataclass(frozen=True)
class Package:
    """A package of Python.

    Attributes:
        name: As its metadata has it.
        version: As installed.
        license: An SPDX expression; None if none is known.
        stated: The license in the package's own words, if they are no expression; else "".
        hashes: SHA-256 of the files that the lock allows for this version.
    """

    name: str
    version: str
    license: str | None
    stated: str
    hashes: list[str]

    @property
    def url(self) -> str:
        """The package's purl."""
        return f"pkg:pypi/{segment(normalized_package(self.name))}@{segment(self.version)}"


def package_versions(release: Release) -> list[tuple[str, str]]:
    """Returns (name, version) of the packages in a release's statements and in the environment of its build."""
    pairs = set[tuple[str, str]]()
    environments = map(provenance.environment_of, release.statements.values())
    for environment in (read_json(release.root / "evidence/environment.json"), *environments):
        pairs |= {(str(name), str(version)) for name, version in environment.get("packages", {}).items()}
    return sorted(pairs)


def describe_packages(pairs: list[tuple[str, str]], root: Path) -> list[dict[str, Any]]:
    """Returns the content of packages.json. `root` is a checkout, whose `requirements/*.lock` are read."""
    hashes: dict[tuple[str, str], set[str]] = {}
    for path in root.glob("requirements/*.lock"):
        # An entry ends where the next line begins without a space.
        for entry in re.split(r"\n(?=\S)", path.read_text()):
            if match := ENTRY.match(entry):
                pin = normalized_package(match[1]), match[2]
                hashes.setdefault(pin, set()).update(HASH.findall(entry))

    rows = []
    for name, version in pairs:
        license, stated = _package_license(name, version)
        # A lock that pins another version says nothing of this one.
        digests = sorted(hashes.get((normalized_package(name), version), ()))
        rows.append(asdict(Package(name, version, license, stated, digests)))
    return rows


def normalized_package(name: str) -> str:
    """Returns the name of a package as PyPI compares names (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _package_license(name: str, version: str) -> tuple[str | None, str]:
    """Returns the expression and the words of a package's license, if this version of it is installed."""
    try:
        distribution = metadata.distribution(name)
    except (metadata.PackageNotFoundError, ValueError):
        return None, ""
    # Another version may have another license.
    if distribution.version != version:
        return None, ""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    declared = parse([("PKG-INFO", text)], load_map("pep639")).license
    if declared.expression:
        return declared.expression, ""
    return None, " ".join(declared.name.split())[:MOST_STATED]


@dataclass(frozen=True, eq=False)
class StandardFacts:
    """The facts of a whole release.

    They are compared by identity, so that what is expensive is computed once for each object.

    Attributes:
        folder: The release.
        release: Its own statement.
        data: The facts of its data.
        models: The facts of its models by folder, the final one first.
        costs: The cost of each stage.
        maker: The maker's statements.
        packages: The packages of all environments.
        ended: The end of the last attempt, as `provenance.clock` writes it; "" without one.
        acquired: The end of the last acquisition, in the same form.
        methods: The methods by which energy was estimated.
        counted: Number of attempts with an estimate, and of all.
        declared: source.json of each source.
        manifests: The manifests of the artifacts by node.
        variants: The variants of the final model, by the end of their repository's name.
    """

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
        """Returns the address of a path of the release on the Hub."""
        # The first folder of a path decides the repository.
        top, _, rest = path.partition("/")
        if top == "dataset":
            return address(f"{self.data_url}/tree/main/{rest}")
        if top == "checkpoints":
            return address(f"{HUB}/{self.release.repository}-checkpoints/tree/main/{rest}".rstrip("/"))
        if top.partition("-")[0] == MODEL:
            return address(f"{self.model_url(top)}/tree/main/{rest}".rstrip("/"))
        return address(f"{self.evidence_url}/tree/main/{path}")

    def weights(self, folder: str) -> dict[str, str]:
        """Returns {path in the model's folder: SHA-256} of its weights, by the manifest of its export."""
        return self._weights(f"export-{self.models[folder].name()}")

    def variant_weights(self, suffix: str) -> dict[str, str]:
        """Returns {path in the variant's folder: SHA-256} of its weights, by the manifest of its stage."""
        return self._weights(f"{VARIANT}{suffix}")

    def _weights(self, node: str) -> dict[str, str]:
        # The export of an earlier run has its manifest under another name.
        digests = self.manifests[node].digests if node in self.manifests else {}
        paths = {path.removeprefix("model/"): digest for path, digest in digests.items() if path.startswith("model/")}
        return weights_only(paths)

    def category(self, source: str) -> tuple[Category, str]:
        """Returns the category of a source, and its basis: the maker's statement, or the reader and the origin."""
        # The maker knows contracts and crawlers, of which no file tells.
        if source in self.maker.sources:
            return self.maker.sources[source], "maker"
        reader = self.declared.get(source, {}).get("reader")
        # A generator's text is synthetic, wherever its sources come from.
        if self.data.sources[source].generated is not None:
            return "synthetic", "computed"
        if reader in PROCEDURAL:
            return "other", "computed"
        if reader == "hub" or self.data.sources[source].origin.startswith(("https://", "http://")):
            return "public", "computed"
        return "other", "computed"

    def read_by(self, folder: str) -> list[str]:
        """Returns the sources that the phases of a model read, in the order of the data."""
        read: set[str] = set()
        for phase in self.models[folder].training:
            read.update(self.data.sources_read(phase))
        return [name for name in self.data.sources if name in read]

    def of_category(self, category: Category) -> list[str]:
        """Returns the sources of a category."""
        return [name for name in self.data.sources if self.category(name)[0] == category]


def weights_only(digests: Mapping[str, str]) -> dict[str, str]:
    """Returns the files with weights among {path: SHA-256}, sorted."""
    return {path: digest for path, digest in sorted(digests.items()) if path.endswith(WEIGHTS)}


def read_facts(release: Release) -> StandardFacts:
    """Returns the facts of a release, with what its statements and the declarations of its sources say."""
    ended = acquired = ""
    # Statements are read one by one, since a long run has very many.
    methods = set[str]()
    attempts = counted = 0
    for body in release.statements.values():
        finished = str(body["predicate"]["runDetails"]["metadata"]["finishedOn"])
        # Times of one format in UTC sort as texts.
        ended = max(ended, finished)
        if provenance.parameters_of(body)["node"].startswith("acquire-"):
            acquired = max(acquired, finished)
        usage = provenance.usage(body)
        # The statement of a checkpoint is about the attempt that wrote it, which has a statement of its own.
        if provenance.phase_of(body) is None:
            attempts += 1
            if "energy_joules_estimate" in usage:
                counted += 1
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
    carbon = facts.maker.carbon
    counted, attempts = facts.counted

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
    """Returns a text as the reference of a URI (RFC 3986): what no URI has is escaped, and escapes are kept."""
    escaped = quote(text, safe="/:?@!$&'()*+,;=-._~%#", errors="surrogatepass")
    resource, sign, fragment = escaped.partition("#")
    # Without a scheme, a colon in the first segment would be read as the end of one.
    if not SCHEME.match(resource):
        resource = resource.replace(":", "%3A")
    # A fragment has no second sign.
    fragment = fragment.replace("#", "%23")
    return LONE_PERCENT.sub("%25", f"{resource}{sign}{fragment}")


def segment(text: str, safe: str = "") -> str:
    """Returns a text as one segment of the path of a URI; different texts give different segments."""
    return quote(text, safe=safe, errors="surrogatepass")


def expression(license: str) -> str | None:
    """Returns an SPDX expression in the spelling of SPDX; None for a text that is none."""
    try:
        return spdx(license)
    except (ValueError, RecursionError):
        return None


def joined(licenses: list[str]) -> str | None:
    """Returns the expression of licenses that all apply, each to its part; None if one is no expression."""
    texts = [text for text in map(expression, licenses) if text is not None]
    if not texts or len(texts) < len(licenses):
        return None
    if len(texts) == 1:
        return texts[0]
    # An OR inside of an expression would bind less than this AND.
    return " AND ".join(f"({text})" if " " in text else text for text in texts)
