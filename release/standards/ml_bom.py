"""bom.cdx.json: a CycloneDX 1.7 bill of materials with the model card, the sources of the data and the packages.

Specification: cyclonedx.org/docs/1.7/json. It is written as plain JSON, because the library that validates it does not
write model cards. There is no time in it; its serial number follows from the digests of the artifacts.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from pipeline.core.store import canonical
from release.facts.model_facts import ModelFacts
from release.layout import MODEL, SIZE, VARIANT, numbered
from release.standards.package_list import normalized
from release.standards.standard_facts import HUB, WEIGHTS, StandardFacts, address, energy, expression, joined, segment

Json = dict[str, Any]
MOST_LOCKED = 200
"""Files of a package whose hashes are listed."""
PROPERTY = "atom:"
LABELS = {"pretrain": "training", "midtrain": "training", "longcontext": "training", SIZE: "training"}
"""{kind of phase: the activity of CycloneDX}; other phases are fine-tuning, and other stages neither."""


def bill(facts: StandardFacts) -> Json:
    release, models = facts.release, [_model(facts, folder) for folder in facts.models]
    variants = [_variant(facts, suffix) for suffix in facts.variants]
    sources, packages = [_source(facts, name) for name in facts.data.sources], _packages(facts)
    seed = canonical([release.name, release.version, sorted(a.digest for a in release.nodes.values())])
    final, *earlier = models
    references = [component["bom-ref"] for component in (*sources, *packages)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, seed.decode())}",
        "version": 1,
        "metadata": {
            "component": final,
            "supplier": {"name": facts.provider},
            "tools": {"components": [{"type": "application", "name": "atom-release", "version": _tool(facts)}]},
            "licenses": _licenses([release.license.code]),
        },
        "components": [*earlier, *variants, *sources, *packages],
        "dependencies": [
            *({"ref": model["bom-ref"], "dependsOn": references} for model in models),
            *({"ref": variant["bom-ref"], "dependsOn": [final["bom-ref"]]} for variant in variants),
            *({"ref": reference} for reference in references),
        ],
    }


def _tool(facts: StandardFacts) -> str:
    """The version of atom that built the release: that of its package, or its commit."""
    installed = {normalized(p.name): p.version for p in facts.packages}.get("atom-release")
    return installed or facts.release.commit or "unknown"


def _licenses(licenses: list[str]) -> list[Json]:
    if expressions := joined(licenses):
        return [{"expression": expressions}]
    return [{"license": {"name": license}} for license in licenses if license]


def _model(facts: StandardFacts, folder: str) -> Json:
    release, model = facts.release, facts.models[folder]
    component: Json = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{folder}",
        "name": f"{release.name}{folder.removeprefix(MODEL)}",
        "version": release.version,
        "licenses": _licenses([model.license(release.license.weights)]),
        "externalReferences": [{"type": "distribution", "url": address(facts.model_url(folder))}],
        "components": _files(f"model:{folder}/", facts.weights(folder)),
        "pedigree": _start(model) if model.base else {},
        "modelCard": _card(facts, folder),
        "properties": [
            {"name": f"{PROPERTY}parameters", "value": str(model.parameters.total)},
            {"name": f"{PROPERTY}active_parameters", "value": str(model.parameters.active)},
        ],
    }
    return {key: value for key, value in component.items() if value}


def _files(place: str, digests: Mapping[str, str]) -> list[Json]:
    """Files as components. place: begins their references; "" for files that nothing refers to."""
    return [
        {
            "type": "file",
            **({"bom-ref": f"{place}{segment(path)}"} if place else {}),
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for path, digest in digests.items()
    ]


def _start(model: ModelFacts) -> Json:
    """The pedigree of a model whose training began with a published one."""
    base = model.base or {}
    weights = {path: digest for path, digest in sorted(base["files"].items()) if path.endswith(WEIGHTS)}
    ancestor = {
        "type": "machine-learning-model",
        "name": base["repo"],
        "version": base["digest"],
        "licenses": _licenses([base["license"]]),
        "externalReferences": [{"type": "distribution", "url": address(f"{HUB}/{base['repo']}")}],
        "components": _files("", weights),
    }
    begin = "Training began" if model.on_published else "Pre-training began"
    relation = "It is a copy of" if model.is_copy else f"{begin} with"
    notes = f"{relation} these weights and their tokenizer; the version is the digest of SHA256SUMS."
    return {"ancestors": [{key: value for key, value in ancestor.items() if value}], "notes": notes}


def _variant(facts: StandardFacts, suffix: str) -> Json:
    """The final model with its weights in another form."""
    release, loss = facts.release, facts.variants[suffix].loss
    reference = f"model:{VARIANT}{suffix}"
    original = {
        "type": "machine-learning-model",
        "name": release.name,
        "version": release.version,
        "licenses": _licenses([release.license.weights]),
        "externalReferences": [{"type": "distribution", "url": address(facts.model_url())}],
    }
    component: Json = {
        "type": "machine-learning-model",
        "bom-ref": reference,
        "name": f"{release.name}{suffix}",
        "version": release.version,
        "description": loss["title"],
        "licenses": _licenses([release.license.weights]),
        "externalReferences": [{"type": "distribution", "url": address(facts.variant_url(suffix))}],
        "components": _files(f"{reference}/", facts.variant_weights(suffix)),
        "pedigree": {
            "ancestors": [{key: value for key, value in original.items() if value}],
            "notes": "The weights follow from those of the ancestor alone.",
        },
        "modelCard": {
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": name, "value": repr(value)} for name, value in facts.variants[suffix].figures().items()
                ]
            }
        },
        "properties": [{"name": f"{PROPERTY}bytes", "value": str(loss["bytes"]["variant"])}],
    }
    return {key: value for key, value in component.items() if value}


def _card(facts: StandardFacts, folder: str) -> Json:
    model, scores = facts.models[folder], facts.models[folder].own_scores()
    metrics = [
        {
            "type": metric,
            "slice": name,
            "value": repr(row["value"]),
            "confidenceInterval": {
                "lowerBound": repr(row["value"] - 1.96 * row["se"]),
                "upperBound": repr(row["value"] + 1.96 * row["se"]),
            },
        }
        for metric, rows in (("bits per byte", scores["bits_per_byte"]), ("exact match", scores["accuracy"]))
        for name, row in sorted(rows.items())
    ]
    kinds = {numbered(phase)[0] for phase in model.training}
    approach = "reinforcement-learning" if kinds & {"rlvr", "online-rlhf"} else "self-supervised"
    considerations: Json = {
        "users": ["researchers and developers of language models"],
        "useCases": ["conversation in the trained chat template" if model.is_chat else "continuation of text"],
        "technicalLimitations": [f"context of {model.config['max_position_embeddings']} tokens"],
    }
    if folder == MODEL and facts.counted[0]:
        considerations["environmentalConsiderations"] = {"energyConsumptions": _energy(facts)}
    return {
        "modelParameters": {
            "approach": {"type": approach},
            "task": "text-generation",
            "architectureFamily": "transformer decoder",
            "modelArchitecture": model.architecture,
            "datasets": [{"ref": f"source:{name}"} for name in facts.read_by(folder)],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": metrics},
        "considerations": considerations,
    }


def _energy(facts: StandardFacts) -> list[Json]:
    totals: dict[str, list[float]] = {}
    carbon = facts.maker.carbon
    for stage, row in energy(facts)["stages"].items():
        kind = numbered(stage)[0]
        activity = LABELS.get(kind, "fine-tuning" if stage in facts.phases else "other")
        total = totals.setdefault(activity, [0.0, 0.0])
        total[0] += row["energy_kwh"]
        total[1] += row["co2_kg"] or 0.0
    return [
        {
            "activity": activity,
            "energyProviders": [
                {
                    "description": carbon.source if carbon else "the source of the electricity is not stated",
                    "organization": {"name": "not stated"},
                    "energySource": "unknown",
                    "energyProvided": {"value": kwh, "unit": "kWh"},
                }
            ],
            "activityEnergyCost": {"value": kwh, "unit": "kWh"},
            **({"co2CostEquivalent": {"value": kg / 1000, "unit": "tCO2eq"}} if carbon else {}),
        }
        for activity, (kwh, kg) in sorted(totals.items())
    ]


def _source(facts: StandardFacts, name: str) -> Json:
    row, declared, node = facts.data.sources[name], facts.declared.get(name, {}), f"acquire-{name}"
    properties: Json = {"documents_read": row.documents_in, "documents_kept": row.kept, "bytes_kept": row.bytes_kept}
    properties["tree_digest"] = declared.get("tree_digest")
    if artifact := facts.release.nodes.get(node):
        properties |= {"artifact": artifact.key, "artifact_digest": artifact.digest}
    properties["license_evidence"] = row.license_evidence
    component: Json = {
        "type": "data",
        "bom-ref": f"source:{name}",
        "name": name,
        "version": facts.release.version,
        "licenses": _licenses(row.licenses),
        "externalReferences": [{"type": "source-distribution", "url": address(row.origin)}] if row.origin else [],
        "data": [
            {
                "type": "dataset",
                "name": name,
                "contents": {"url": address(f"{facts.data_url}/tree/main/kept/{name}")},
                "classification": "public",
                "governance": {"custodians": [{"organization": {"name": facts.provider}}]},
            }
        ],
        "properties": [{"name": f"{PROPERTY}{key}", "value": str(v)} for key, v in sorted(properties.items()) if v],
    }
    return {key: value for key, value in component.items() if value}


def _packages(facts: StandardFacts) -> list[Json]:
    components = []
    for package in facts.packages:
        purl = f"pkg:pypi/{segment(normalized(package.name))}@{segment(package.version)}"
        url = f"https://pypi.org/project/{segment(normalized(package.name))}/{segment(package.version)}/"
        hashes = [{"alg": "SHA-256", "content": digest} for digest in package.hashes[:MOST_LOCKED]]
        locked = {"type": "distribution", "url": url, "comment": "a file with one of these hashes", "hashes": hashes}
        license = package.license and expression(package.license)
        licenses = [{"expression": license}] if license else _licenses([package.stated])
        component: Json = {
            "type": "library",
            "bom-ref": purl,
            "name": package.name,
            "version": package.version,
            "purl": purl,
            "licenses": licenses,
            "externalReferences": [locked] if hashes else [],
        }
        components.append({key: value for key, value in component.items() if value})
    return components
