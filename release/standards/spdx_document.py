"""bom.spdx3.json: an SPDX 3.0.1 document in JSON-LD with the profiles AI, Dataset, Software and SimpleLicensing.

Specification: spdx.github.io/spdx-spec/v3.0.1. Its time of creation is the end of the run's last attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from pipeline.core.store import sha256_bytes
from release.layout import MODEL, VARIANT
from release.standards.package_list import normalized
from release.standards.standard_facts import HUB, WEIGHTS, StandardFacts, address, energy, expression, joined, segment

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
        """Adds an element and returns its id. place: unique in the document."""
        id = f"{self.base}{segment(place, '/')}"
        present = {name: value for name, value in properties.items() if value not in (None, [], "")}
        self.elements.append({"type": kind, "spdxId": id, "creationInfo": CREATION, **present})
        return id

    def relate(self, source: str, kind: str, targets: list[str]) -> None:
        if targets:
            place = f"relationship/{kind}/{source.removeprefix(self.base)}"
            self.add("Relationship", place, relationshipType=kind, to=targets, **{"from": source})

    def license(self, element: str, licenses: list[str], stated: str = "") -> None:
        """States the declared and the concluded license of an element. stated: words that are no expression."""
        text, comment = joined(licenses), None
        if text is None:
            words = stated or "; ".join(licenses)
            digest = sha256_bytes(words.encode(errors="surrogatepass"))
            text, comment = (f"LicenseRef-{digest[:12]}", words) if words else ("NOASSERTION", "")
        if text not in self.licenses:
            place = f"license/{len(self.licenses)}"
            self.licenses[text] = self.add(
                "simplelicensing_LicenseExpression", place, simplelicensing_licenseExpression=text, comment=comment
            )
        for kind in ("hasDeclaredLicense", "hasConcludedLicense"):
            self.relate(element, kind, [self.licenses[text]])


def document(facts: StandardFacts) -> Json:
    release = facts.release
    graph = _Graph(f"{facts.evidence_url}/{release.version}#")
    provider = graph.add("Organization", "provider", name=facts.provider)
    sources = {name: _source(graph, facts, name, provider) for name in facts.data.sources}
    packages = [_package(graph, facts, index) for index in range(len(facts.packages))]
    models = [_model(graph, facts, folder, provider) for folder in facts.models]
    for folder, model in zip(facts.models, models, strict=True):
        graph.relate(model, "trainedOn", [sources[name] for name in facts.read_by(folder)])
        graph.relate(model, "testedOn", list(sources.values()))
        graph.relate(model, "dependsOn", packages)
        if base := facts.models[folder].base:
            graph.relate(_base(graph, folder, base), "ancestorOf", [model])
    variants = [_variant(graph, facts, suffix, provider) for suffix in facts.variants]
    graph.relate(models[0], "hasVariant", variants)
    for variant in variants:
        graph.relate(variant, "descendantOf", models[:1])
    listed = [element["spdxId"] for element in graph.elements]
    bom = graph.add("software_Sbom", "bom", rootElement=models[:1], element=listed, profileConformance=PROFILES)
    graph.add("SpdxDocument", "document", rootElement=[bom], profileConformance=PROFILES)
    creation = {"type": "CreationInfo", "@id": CREATION, "specVersion": "3.0.1", "created": facts.ended}
    return {"@context": CONTEXT, "@graph": [{**creation, "createdBy": [provider]}, *graph.elements]}


def _model(graph: _Graph, facts: StandardFacts, folder: str, provider: str) -> str:
    release, model, scores = facts.release, facts.models[folder], facts.models[folder].own_scores()
    metrics = {f"bits per byte, {name}": row["value"] for name, row in scores["bits_per_byte"].items()}
    metrics |= {f"exact match, {name}": row["value"] for name, row in scores["accuracy"].items()}
    consumed = None
    if folder == MODEL and facts.counted[0]:
        kwh = energy(facts)["total"]["energy_kwh"]
        spent = {"type": "ai_EnergyConsumptionDescription", "ai_energyUnit": "kilowattHour"}
        consumed = {
            "type": "ai_EnergyConsumption",
            "ai_trainingEnergyConsumption": [{**spent, "ai_energyQuantity": format(Decimal(repr(kwh)), "f")}],
        }
    id = graph.add(
        "ai_AIPackage",
        folder,
        name=f"{release.name}{folder.removeprefix(MODEL)}",
        suppliedBy=provider,
        releaseTime=facts.ended,
        builtTime=facts.ended,
        software_packageVersion=release.version,
        software_primaryPurpose="model",
        software_downloadLocation=address(facts.model_url(folder)),
        ai_domain=["text generation"],
        ai_typeOfModel=["transformer decoder", model.architecture],
        ai_limitation=f"context of {model.config['max_position_embeddings']} tokens",
        ai_informationAboutTraining=f"phases: {', '.join(model.training)}",
        ai_hyperparameter=_entries({name: value for name, value in model.config.items()}),
        ai_metric=_entries(metrics),
        ai_autonomyType="noAssertion",
        ai_useSensitivePersonalInformation="noAssertion",
        ai_energyConsumption=consumed,
        verifiedUsing=[_hash(digest, path) for path, digest in facts.weights(folder).items()],
    )
    graph.license(id, [model.license(release.license.weights)])
    return id


def _base(graph: _Graph, folder: str, base: Mapping[str, Any]) -> str:
    """The published model that the training of a model began with. No AIPackage: its supplier and the time of its
    release are not known here."""
    id = graph.add(
        "software_Package",
        f"{folder}/base",
        name=base["repo"],
        software_packageVersion=base["digest"],
        software_primaryPurpose="model",
        software_downloadLocation=address(f"{HUB}/{base['repo']}"),
        verifiedUsing=[_hash(digest, path) for path, digest in sorted(base["files"].items()) if path.endswith(WEIGHTS)],
    )
    graph.license(id, [base["license"]])
    return id


def _variant(graph: _Graph, facts: StandardFacts, suffix: str, provider: str) -> str:
    release, loss = facts.release, facts.variants[suffix].loss
    model = facts.models[MODEL]
    id = graph.add(
        "ai_AIPackage",
        f"{VARIANT}{suffix}",
        name=f"{release.name}{suffix}",
        description=loss["title"],
        suppliedBy=provider,
        releaseTime=facts.ended,
        builtTime=facts.ended,
        software_packageVersion=release.version,
        software_primaryPurpose="model",
        software_downloadLocation=address(facts.variant_url(suffix)),
        ai_domain=["text generation"],
        ai_typeOfModel=["transformer decoder", model.architecture],
        ai_metric=_entries(facts.variants[suffix].figures()),
        ai_autonomyType="noAssertion",
        ai_useSensitivePersonalInformation="noAssertion",
        verifiedUsing=[_hash(digest, path) for path, digest in facts.variant_weights(suffix).items()],
    )
    graph.license(id, [release.license.weights])
    return id


def _source(graph: _Graph, facts: StandardFacts, name: str, provider: str) -> str:
    row, node = facts.data.sources[name], facts.release.nodes.get(f"acquire-{name}")
    removed = [f"removed by {rule}: {count} documents" for rule, count in row.removed.items()]
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
        dataset_dataPreprocessing=removed,
        dataset_datasetAvailability="scrapingScript" if name in facts.data.by_reference else "directDownload",
        dataset_hasSensitivePersonalInformation="noAssertion",
        verifiedUsing=[_hash(node.digest, f"digest of the artifact {node.key}")] if node else [],
    )
    graph.license(id, row.licenses)
    return id


def _package(graph: _Graph, facts: StandardFacts, index: int) -> str:
    package = facts.packages[index]
    purl = f"pkg:pypi/{segment(normalized(package.name))}@{segment(package.version)}"
    id = graph.add(
        "software_Package",
        f"package/{index}",
        name=package.name,
        software_packageVersion=package.version,
        software_packageUrl=purl,
        software_primaryPurpose="library",
    )
    graph.license(id, [package.license] if package.license and expression(package.license) else [], package.stated)
    return id


def _hash(digest: str, comment: str) -> Json:
    return {"type": "Hash", "algorithm": "sha256", "hashValue": digest, "comment": comment}


def _entries(values: dict[str, Any]) -> list[Json]:
    return [{"type": "DictionaryEntry", "key": name, "value": str(value)} for name, value in values.items()]
