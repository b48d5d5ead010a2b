"""bom.spdx3.json: an SPDX 3.0.1 document in JSON-LD with the profiles AI, Dataset, Software and SimpleLicensing.

Specification: spdx.github.io/spdx-spec/v3.0.1. Its time of creation is the end of the run's last attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from pipeline.core.store import sha256_bytes
from release.layout import MODEL, VARIANT
from release.standards.standard_facts import (
    HUB,
    Package,
    StandardFacts,
    address,
    energy,
    expression,
    joined,
    segment,
    weights_only,
)

Json = dict[str, Any]
CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
PROFILES = ["core", "software", "ai", "dataset", "simpleLicensing"]
CREATION = "_:creation"


class _Graph:
    """The elements of a document."""

    def __init__(self, base: str) -> None:
        self.base = base
        self.elements: list[Json] = []
        self.licenses: dict[str, str] = {}

    def add(self, kind: str, place: str, **properties: Any) -> str:
        """Adds an element and returns its id. `place` is unique in the document."""
        id = f"{self.base}{segment(place, '/')}"
        present = {name: value for name, value in properties.items() if value not in (None, [], "")}
        self.elements.append({"type": kind, "spdxId": id, "creationInfo": CREATION, **present})
        return id

    def relate(self, source: str, kind: str, targets: list[str]) -> None:
        """Adds a relationship, unless there are no targets."""
        if targets:
            # Unique, since an element has one relationship of each kind.
            place = f"relationship/{kind}/{source.removeprefix(self.base)}"
            self.add("Relationship", place, relationshipType=kind, to=targets, **{"from": source})

    def license(self, element: str, licenses: list[str], stated: str = "") -> None:
        """States the declared and the concluded license of an element. `stated` are words that are no expression."""
        text, comment = joined(licenses), None
        if text is None:
            # Words are no expression: they get an own reference, whose comment has them.
            words = stated or "; ".join(licenses)
            digest = sha256_bytes(words.encode(errors="surrogatepass"))
            text, comment = (f"LicenseRef-{digest[:12]}", words) if words else ("NOASSERTION", "")
        # Many elements share a license, which is one element of the document.
        if text not in self.licenses:
            place = f"license/{len(self.licenses)}"
            self.licenses[text] = self.add(
                "simplelicensing_LicenseExpression", place, simplelicensing_licenseExpression=text, comment=comment
            )
        for kind in ("hasDeclaredLicense", "hasConcludedLicense"):
            self.relate(element, kind, [self.licenses[text]])


def document(facts: StandardFacts) -> Json:
    """Returns the content of bom.spdx3.json."""
    release = facts.release
    graph = _Graph(f"{facts.evidence_url}/{release.version}#")
    # The order of these calls is that of the elements, which is published.
    provider = graph.add("Organization", "provider", name=facts.provider)
    sources = {name: _source(graph, facts, name, provider) for name in facts.data.sources}
    packages = [_package(graph, package, index) for index, package in enumerate(facts.packages)]
    models = {folder: _model(graph, facts, folder, provider) for folder in facts.models}
    for folder, model in models.items():
        graph.relate(model, "trainedOn", [sources[name] for name in facts.read_by(folder)])
        graph.relate(model, "testedOn", list(sources.values()))
        graph.relate(model, "dependsOn", packages)
        if base := facts.models[folder].base:
            graph.relate(_base(graph, folder, base), "ancestorOf", [model])
    final = [models[MODEL]]
    variants = [_variant(graph, facts, suffix, provider) for suffix in facts.variants]
    graph.relate(models[MODEL], "hasVariant", variants)
    for variant in variants:
        graph.relate(variant, "descendantOf", final)

    # Taken before the bill is added, which does not list itself.
    listed = [element["spdxId"] for element in graph.elements]
    bom = graph.add("software_Sbom", "bom", rootElement=final, element=listed, profileConformance=PROFILES)
    graph.add("SpdxDocument", "document", rootElement=[bom], profileConformance=PROFILES)
    creation = {"type": "CreationInfo", "@id": CREATION, "specVersion": "3.0.1", "created": facts.ended}
    return {"@context": CONTEXT, "@graph": [{**creation, "createdBy": [provider]}, *graph.elements]}


def _add_model(
    graph: _Graph, facts: StandardFacts, place: str, provider: str, url: str, weights: Mapping[str, str], **fields: Any
) -> str:
    """Adds a model or a variant of it.

    `weights` is {path: SHA-256}, and `fields` are those that only a model or only a variant has.
    """
    return graph.add(
        "ai_AIPackage",
        place,
        suppliedBy=provider,
        releaseTime=facts.ended,
        builtTime=facts.ended,
        software_packageVersion=facts.release.version,
        software_primaryPurpose="model",
        software_downloadLocation=address(url),
        ai_domain=["text generation"],
        # No file of a release can tell.
        ai_autonomyType="noAssertion",
        ai_useSensitivePersonalInformation="noAssertion",
        verifiedUsing=_hashes(weights),
        **fields,
    )


def _model(graph: _Graph, facts: StandardFacts, folder: str, provider: str) -> str:
    release, model, scores = facts.release, facts.models[folder], facts.models[folder].own_scores()
    metrics = {f"bits per byte, {name}": row["value"] for name, row in scores["bits_per_byte"].items()}
    metrics |= {f"exact match, {name}": row["value"] for name, row in scores["accuracy"].items()}
    id = _add_model(
        graph,
        facts,
        folder,
        provider,
        facts.model_url(folder),
        facts.weights(folder),
        name=f"{release.name}{folder.removeprefix(MODEL)}",
        ai_typeOfModel=["transformer decoder", model.architecture],
        ai_limitation=f"context of {model.config['max_position_embeddings']} tokens",
        ai_informationAboutTraining=f"phases: {', '.join(model.training)}",
        ai_hyperparameter=_entries(model.config),
        ai_metric=_entries(metrics),
        ai_energyConsumption=_energy(facts) if folder == MODEL and facts.counted[0] else None,
    )
    graph.license(id, [model.license(release.license.weights)])
    return id


def _energy(facts: StandardFacts) -> Json:
    """Returns the energy of the whole release, as a decimal without an exponent."""
    # A decimal in XML Schema has no exponent, which Python writes for small numbers.
    quantity = format(Decimal(repr(energy(facts)["total"]["energy_kwh"])), "f")
    spent = {"type": "ai_EnergyConsumptionDescription", "ai_energyUnit": "kilowattHour", "ai_energyQuantity": quantity}
    return {"type": "ai_EnergyConsumption", "ai_trainingEnergyConsumption": [spent]}


def _base(graph: _Graph, folder: str, base: Mapping[str, Any]) -> str:
    """Adds the published model that the training of a model began with."""
    # No AIPackage: its supplier and the time of its release are not known here.
    id = graph.add(
        "software_Package",
        f"{folder}/base",
        name=base["repo"],
        software_packageVersion=base["digest"],
        software_primaryPurpose="model",
        software_downloadLocation=address(f"{HUB}/{base['repo']}"),
        verifiedUsing=_hashes(weights_only(base["files"])),
    )
    graph.license(id, [base["license"]])
    return id


def _variant(graph: _Graph, facts: StandardFacts, suffix: str, provider: str) -> str:
    variant, place = facts.variants[suffix], f"{VARIANT}{suffix}"
    id = _add_model(
        graph,
        facts,
        place,
        provider,
        facts.variant_url(suffix),
        facts.variant_weights(suffix),
        name=f"{facts.release.name}{suffix}",
        description=variant.loss["title"],
        ai_typeOfModel=["transformer decoder", facts.models[MODEL].architecture],
        ai_metric=_entries(variant.figures()),
    )
    graph.license(id, [facts.release.license.weights])
    return id


def _source(graph: _Graph, facts: StandardFacts, name: str, provider: str) -> str:
    row, node = facts.data.sources[name], facts.release.nodes.get(f"acquire-{name}")
    id = graph.add(
        "dataset_DatasetPackage",
        f"source/{name}",
        name=name,
        originatedBy=[provider],
        builtTime=facts.ended,
        releaseTime=facts.ended,
        software_packageVersion=facts.release.version,
        software_primaryPurpose="data",
        software_downloadLocation=address(f"{facts.data_url}/tree/main/kept/{name}"),
        software_sourceInfo=row.origin,
        dataset_datasetType=["text"],
        dataset_datasetSize=row.bytes_kept,
        dataset_dataCollectionProcess=f"{row.documents_in} documents were read, {row.kept} were kept",
        dataset_dataPreprocessing=[f"removed by {rule}: {count} documents" for rule, count in row.removed.items()],
        dataset_datasetAvailability="scrapingScript" if name in facts.data.by_reference else "directDownload",
        dataset_hasSensitivePersonalInformation="noAssertion",
        verifiedUsing=_hashes({f"digest of the artifact {node.key}": node.digest}) if node else [],
    )
    graph.license(id, row.licenses)
    return id


def _package(graph: _Graph, package: Package, index: int) -> str:
    id = graph.add(
        "software_Package",
        f"package/{index}",
        name=package.name,
        software_packageVersion=package.version,
        software_packageUrl=package.url,
        software_primaryPurpose="library",
    )
    graph.license(id, [package.license] if package.license and expression(package.license) else [], package.stated)
    return id


def _hashes(digests: Mapping[str, str]) -> list[Json]:
    """Returns digests, {comment: SHA-256}, as elements."""
    return [
        {"type": "Hash", "algorithm": "sha256", "hashValue": digest, "comment": comment}
        for comment, digest in digests.items()
    ]


def _entries(values: Mapping[str, Any]) -> list[Json]:
    return [{"type": "DictionaryEntry", "key": name, "value": str(value)} for name, value in values.items()]
