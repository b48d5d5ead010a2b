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
from release.layout import MODEL, VARIANT, numbered
from release.standards.standard_facts import (
    HUB,
    StandardFacts,
    address,
    expression,
    joined,
    normalized_package,
    segment,
    weights_only,
)
from stages.confidence import half_width

Json = dict[str, Any]
MOST_LOCKED = 200
"""Files of a package whose hashes are listed."""
PROPERTY = "atom:"
"""The prefix of this project's own properties."""


def bill(facts: StandardFacts) -> Json:
    """Returns the content of bom.cdx.json."""
    release = facts.release
    final, *earlier = [_model(facts, folder) for folder in facts.models]
    variants = [_variant(facts, suffix) for suffix in facts.variants]
    materials = [_source(facts, name) for name in facts.data.sources] + _packages(facts)
    # Every model depends on all sources and packages; a variant on the final model alone.
    references = [component["bom-ref"] for component in materials]
    dependencies: list[Json] = [{"ref": model["bom-ref"], "dependsOn": references} for model in (final, *earlier)]
    dependencies += [{"ref": variant["bom-ref"], "dependsOn": [final["bom-ref"]]} for variant in variants]
    dependencies += [{"ref": reference} for reference in references]
    # No clock and no random number: equal artifacts give an equal serial number.
    seed = canonical([release.name, release.version, sorted(a.digest for a in release.nodes.values())])
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
        "components": [*earlier, *variants, *materials],
        "dependencies": dependencies,
    }


def _present(component: Json) -> Json:
    """Leaves out empty fields, which the schema does not allow everywhere."""
    return {key: value for key, value in component.items() if value}


def _properties(values: Mapping[str, Any]) -> list[Json]:
    return [{"name": f"{PROPERTY}{name}", "value": str(value)} for name, value in values.items() if value]


def _tool(facts: StandardFacts) -> str:
    """Returns the version of atom that built the release: that of its package, or its commit."""
    installed = {normalized_package(package.name): package.version for package in facts.packages}
    return installed.get("atom-release") or facts.release.commit or "unknown"


def _licenses(licenses: list[str]) -> list[Json]:
    if expressions := joined(licenses):
        return [{"expression": expressions}]
    return [{"license": {"name": license}} for license in licenses if license]


def _machine_learning_model(name: str, version: str, license: str, url: str, **fields: Any) -> Json:
    """Returns a model as a component, with further fields."""
    return _present(
        {
            "type": "machine-learning-model",
            "name": name,
            "version": version,
            "licenses": _licenses([license]),
            "externalReferences": [{"type": "distribution", "url": address(url)}],
            **fields,
        }
    )


def _model(facts: StandardFacts, folder: str) -> Json:
    release, model, reference = facts.release, facts.models[folder], f"model:{folder}"
    component = _machine_learning_model(
        f"{release.name}{folder.removeprefix(MODEL)}",
        release.version,
        model.license(release.license.weights),
        facts.model_url(folder),
        components=_files(facts.weights(folder), f"{reference}/"),
        pedigree=_pedigree_of_base(model) if model.base else {},
        modelCard=_model_card(facts, folder),
        properties=_properties(
            {
                "parameters": model.parameters.total,
                "active_parameters": str(model.parameters.active),
            }
        ),
    )
    return component | {"bom-ref": reference}


def _files(digests: Mapping[str, str], place: str = "") -> list[Json]:
    """Returns files as components.

    Args:
        digests: {path: SHA-256}.
        place: The beginning of their references; files that nothing refers to have none.
    """
    rows = []
    for path, digest in digests.items():
        reference = f"{place}{segment(path)}" if place else ""
        hashes = [{"alg": "SHA-256", "content": digest}]
        rows.append(_present({"type": "file", "bom-ref": reference, "name": path, "hashes": hashes}))
    return rows


def _pedigree_of_base(model: ModelFacts) -> Json:
    """Returns the pedigree of a model whose training began with a published one."""
    base = model.base or {}
    url, weights = f"{HUB}/{base['repo']}", _files(weights_only(base["files"]))
    ancestor = _machine_learning_model(base["repo"], base["digest"], base["license"], url, components=weights)
    begin = "Training began" if model.on_published else "Pre-training began"
    relation = "It is a copy of" if model.is_copy else f"{begin} with"
    notes = f"{relation} these weights and their tokenizer; the version is the digest of SHA256SUMS."
    return {"ancestors": [ancestor], "notes": notes}


def _variant(facts: StandardFacts, suffix: str) -> Json:
    """Returns the final model with its weights in another form."""
    release, variant, reference = facts.release, facts.variants[suffix], f"model:{VARIANT}{suffix}"
    license = release.license.weights
    original = _machine_learning_model(release.name, release.version, license, facts.model_url())
    metrics = [{"type": name, "value": repr(value)} for name, value in variant.figures().items()]
    component = _machine_learning_model(
        f"{release.name}{suffix}",
        release.version,
        license,
        facts.variant_url(suffix),
        description=variant.loss["title"],
        components=_files(facts.variant_weights(suffix), f"{reference}/"),
        pedigree={"ancestors": [original], "notes": "The weights follow from those of the ancestor alone."},
        modelCard={"quantitativeAnalysis": {"performanceMetrics": metrics}},
        properties=_properties({"bytes": str(variant.loss["bytes"]["variant"])}),
    )
    return component | {"bom-ref": reference}


def _model_card(facts: StandardFacts, folder: str) -> Json:
    model, scores = facts.models[folder], facts.models[folder].own_scores()
    metrics = []
    for metric, rows in (("bits per byte", scores["bits_per_byte"]), ("exact match", scores["accuracy"])):
        for name, row in sorted(rows.items()):
            # The interval covers 95 %.
            low, high = row["value"] - half_width(row), row["value"] + half_width(row)
            interval = {"lowerBound": repr(low), "upperBound": repr(high)}
            metrics.append({"type": metric, "slice": name, "value": repr(row["value"]), "confidenceInterval": interval})
    # CycloneDX has one approach for a model.
    kinds = {numbered(phase)[0] for phase in model.training}
    approach = "reinforcement-learning" if kinds & {"rlvr", "online-rlhf"} else "self-supervised"
    considerations = {
        "users": ["researchers and developers of language models"],
        "useCases": ["conversation in the trained chat template" if model.is_chat else "continuation of text"],
        "technicalLimitations": [f"context of {model.config['max_position_embeddings']} tokens"],
    }
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


def _source(facts: StandardFacts, name: str) -> Json:
    row = facts.data.sources[name]
    properties: Json = {
        "documents_read": row.documents_in,
        "documents_kept": row.kept,
        "bytes_kept": row.bytes_kept,
        "tree_digest": facts.declared.get(name, {}).get("tree_digest"),
        "license_evidence": row.license_evidence,
    }
    if artifact := facts.release.nodes.get(f"acquire-{name}"):
        properties |= {"artifact": artifact.key, "artifact_digest": artifact.digest}
    content = {
        "type": "dataset",
        "name": name,
        "contents": {"url": address(f"{facts.data_url}/tree/main/kept/{name}")},
        # Required by the schema; a release hides no data.
        "classification": "public",
        "governance": {"custodians": [{"organization": {"name": facts.provider}}]},
    }
    return _present(
        {
            "type": "data",
            "bom-ref": f"source:{name}",
            "name": name,
            "version": facts.release.version,
            "licenses": _licenses(row.licenses),
            "externalReferences": [{"type": "source-distribution", "url": address(row.origin)}] if row.origin else [],
            "data": [content],
            "properties": _properties(dict(sorted(properties.items()))),
        }
    )


def _packages(facts: StandardFacts) -> list[Json]:
    components = []
    for package in facts.packages:
        name, version = segment(normalized_package(package.name)), segment(package.version)
        locked = {
            "type": "distribution",
            "url": f"https://pypi.org/project/{name}/{version}/",
            "comment": "a file with one of these hashes",
            "hashes": [{"alg": "SHA-256", "content": digest} for digest in package.hashes[:MOST_LOCKED]],
        }
        # A package's own words are no expression: they become the name of a license.
        license = package.license and expression(package.license)
        component: Json = {
            "type": "library",
            "bom-ref": package.url,
            "name": package.name,
            "version": package.version,
            "purl": package.url,
            "licenses": [{"expression": license}] if license else _licenses([package.stated]),
            "externalReferences": [locked] if package.hashes else [],
        }
        components.append(_present(component))
    return components
