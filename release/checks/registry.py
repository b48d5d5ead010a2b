"""All checks of a release, one line each: the gates of `atom build`, and the checks of `atom verify`.

Both run them in this order. Before these, `atom verify` checks the bytes: files, checksums, signatures, kinds of files;
it runs no further check on a folder with altered bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial

from release.checks import (
    cards,
    documents,
    evidence,
    learning,
    loading,
    order,
    scores,
    source_code,
    tool_files,
    weights,
    withheld,
)
from release.checks.check import (
    BuildCheck,
    BuildContext,
    Check,
    GateResult,
    Reads,
    Scope,
    names_of_gates,
    result_of_gate,
    waive,
)
from release.facts.forecast import FILE, FOLDER
from release.facts.message_tables import FOLDER as MESSAGES
from release.facts.published_tables import to_json
from release.facts.run_facts import TRAINING
from release.layout import BASE as MODEL_BASE
from release.layout import (
    GATES,
    GATES_STATED,
    LOSS,
    MERGE,
    OPT_OUTS,
    REFERENCES,
    REHEARSALS,
    RUNTIMES,
    SITE,
    SIZE,
    STANDARDS,
    VARIANT,
)
from release.opened_release import Release
from release.standards import attestations
from stages.evaluation.gates import RULES
from stages.train.imported_weights import NAME as BASE

RELEASE = Scope(("release",))
EVIDENCE = Scope(("release", "evidence"))
DATASET = Scope(("release", "dataset"), "dataset")
MODELS = Scope(("release", "model"))
TENSORS = Scope(("release", "model", "variant", "checkpoint"))
VARIANTS = Scope(("variant",))
CARDS = Scope(("release", "evidence", "dataset", "model", "variant", "repository"))
ALL = Scope((*CARDS.kinds, "checkpoint"))
ALONE = Scope(tuple(kind for kind in CARDS.kinds if kind != "release"))

MERGES = f"checkpoints/{MERGE}*"
SIZES = f"{TRAINING}/{SIZE}-*"
REHEARSED = f"{REHEARSALS}/*.json"
FORECAST = f"{FOLDER}/{FILE}"
EVERYTHING = Reads(("",))
WEIGHTS = Reads(("",), weights=True)
EVIDENCED = Reads((f"{STANDARDS}/",))
PROVENANCE = Reads(("evidence/", "code/"))
STATEMENTS = Reads(("evidence/", "dataset/"))
FATES = Reads(("dispositions", "kept/"))
REFERENCED = Reads((REFERENCES, "kept/", "sources/"))
RECEIPTS = Reads(("dataset/dispositions", f"dataset/{OPT_OUTS}", "evidence/opt_out/"))
BASE_FILES = Reads(("evidence/", f"{MODEL_BASE}/"))
SCORED = Reads(("evaluation/",))
LOSSES = Reads((f"{VARIANT}-", "dataset/evaluation/"))
CONVERTED = Reads((f"{VARIANT}-", "model"), weights=True)
RENDERED = Reads(("model", "goldens", "tokenizer"))
MERGED = Reads(("checkpoints/",), weights=True)
FRESH = Reads(("dataset/evaluation/fresh/", "model/"), weights=True)

VALIDATORS = ("cyclonedx.validation.json", "jsonschema", "rdflib", "spdx_python_model.v3_0_1")
CARD_WRITERS = ("huggingface_hub.repocard", "jinja2.ext")
TENSOR_READERS = ("safetensors.torch", "torch")

EXPORT = "fix the export or tokenizer stage and run again"
PREDICT = "a prediction counts if it is sealed before the first start: `atom predict`, then `atom run`"
REHEARSE = "run the rehearsal again, or train the phase that was rehearsed"
SMALLER = "change the recipe's section sizes and run again"
LICENSE, CURATION = "name it in the data recipe", "curation is at fault"
STATE = "run the stage again so that it is stated, then build"
DRAW = "run the stage fresh again"
AGAIN = "run the variant again"
MERGE_AGAIN = "run the merge again"
RUNTIME = "fix the export or the variant, or take another version of the program"

CHECKS: tuple[Check | BuildCheck, ...] = (
    Check("versions", cards.same_versions, CARDS),
    BuildCheck("export_parity", weights.export_parity),
    BuildCheck("reload_in_transformers", loading.loads_as_exported, EXPORT, private=True),
    BuildCheck("chat_template_round_trip", loading.chat_template_round_trips, EXPORT, private=True),
    Check("manifests", evidence.manifest_digests, EVIDENCE, PROVENANCE, gate="ledger_closed", remedy=STATE),
    Check("origins", evidence.origins, EVIDENCE, PROVENANCE, gate="ledger_closed", remedy=STATE),
    Check("statements", evidence.statements, EVIDENCE, STATEMENTS, gate="ledger_closed", remedy=STATE),
    Check("prediction", learning.prediction, EVIDENCE, PROVENANCE, needs=FORECAST, gate="prediction", remedy=PREDICT),
    Check("sizes", learning.sizes, EVIDENCE, PROVENANCE, needs=SIZES, gate="sizes", remedy=SMALLER),
    Check("rehearsals", learning.rehearsals, EVIDENCE, PROVENANCE, needs=REHEARSED, gate="rehearsals", remedy=REHEARSE),
    Check("gates", partial(evidence.passed_gates, lambda: CHECKS), EVIDENCE, EVERYTHING),
    Check("attestations", evidence.attestations, EVIDENCE, EVERYTHING),
    Check("code", source_code.source_files, EVIDENCE, PROVENANCE),
    Check("tool_files", tool_files.tool_files, ALL, EVERYTHING, gate="tool_files", remedy="build again"),
    Check("licenses", documents.licenses, DATASET, FATES, gate="licenses_known", remedy=LICENSE),
    Check("dispositions_balance", documents.dispositions, DATASET, FATES, gate="counts_balance", remedy=CURATION),
    Check("references", withheld.by_reference, DATASET, REFERENCED, needs=REFERENCES, gate="references"),
    Check("receipts", withheld.receipts, RELEASE, RECEIPTS, needs=f"dataset/{OPT_OUTS}", gate="receipts"),
    Check("scores", scores.scores, DATASET, SCORED),
    Check("data_card", cards.data_card, DATASET, EVERYTHING),
    Check("merkle_roots", documents.merkle_roots, DATASET, EVERYTHING),
    Check("documents", documents.content_hashes, DATASET, EVERYTHING, deep=True),
    Check("messages", documents.messages, DATASET, EVERYTHING, deep=True, needs=MESSAGES, gate="messages"),
    Check("order", order.segments, DATASET, EVERYTHING, deep=True),
    Check("answers", scores.rescored_answers, DATASET, EVERYTHING, deep=True),
    BuildCheck("checkpoints_and_order", order.checkpoints_and_order),
    *(BuildCheck(gate, partial(learning.judged_by, rule), rule.remedy) for gate, rule in RULES.items()),
    BuildCheck("contamination_report", scores.contamination_report),
    Check("card_metadata", cards.card_metadata, ALONE, EVERYTHING),
    Check("cards", cards.cards, MODELS, EVERYTHING, gate="card_numbers", remedy="build again", libraries=CARD_WRITERS),
    Check(
        "plots",
        cards.drawn_plots,
        MODELS,
        EVERYTHING,
        deep=True,
        gate="card_numbers",
        remedy="build again",
        libraries=("matplotlib.figure",),
    ),
    Check("croissant", cards.described_data, RELEASE, EVERYTHING),
    BuildCheck("croissant", cards.valid_croissant, "fix release/cards/croissant.py", private=True),
    Check("standards", evidence.standard_documents, RELEASE, EVERYTHING, gate="standards", remedy="build again"),
    Check(
        "standards_valid",
        evidence.valid_standards,
        EVIDENCE,
        EVIDENCED,
        gate="standards",
        remedy="fix release/standards",
        libraries=VALIDATORS,
    ),
    Check("shards", weights.shards, TENSORS, EVERYTHING, gate="shards", remedy="run the export again"),
    Check("weights", weights.tensors, TENSORS, WEIGHTS, deep=True, libraries=TENSOR_READERS),
    Check("base", weights.published_base, RELEASE, BASE_FILES, needs=f"evidence/{BASE}", gate="base"),
    Check("merges", weights.merges, RELEASE, MERGED, deep=True, needs=MERGES, gate="merges", remedy=MERGE_AGAIN),
    Check("variants", weights.losses, RELEASE, LOSSES, needs=f"{VARIANT}-*/{LOSS}", gate="variants", remedy=AGAIN),
    Check("variant", weights.loss, VARIANTS, EVERYTHING),
    Check("variant_weights", weights.conversions, RELEASE, CONVERTED, deep=True, needs=f"{VARIANT}-*/{LOSS}"),
    Check("runtimes", weights.runtimes, EVIDENCE, PROVENANCE, needs=RUNTIMES, gate="runtimes", remedy=RUNTIME),
    BuildCheck("fresh_set", scores.fresh_set_of_conversations, DRAW),
    Check(
        "fresh_set",
        scores.fresh_set,
        RELEASE,
        FRESH,
        deep=True,
        needs="dataset/evaluation/fresh",
        gate="fresh_set",
        remedy=DRAW,
    ),
    Check(
        "chat_templates",
        loading.chat_templates,
        MODELS,
        RENDERED,
        gate="chat_template_round_trip",
        remedy=EXPORT,
    ),
    Check("reload_in_transformers", loading.loads_with_goldens, MODELS, deep=True, confined=False),
    Check("page", cards.whole_page, EVIDENCE, EVERYTHING, needs=f"{SITE}/*"),
    BuildCheck("no_secrets", source_code.no_secrets, "remove it at its source and run again", private=True),
)


def verifiers(release: Release, deep: bool) -> Iterator[Check]:
    """Lists the checks of `atom verify` that apply to a folder."""
    for check in CHECKS:
        if isinstance(check, Check) and (deep or not check.deep) and check.applies_to(release):
            yield check


def gate_names() -> list[str]:
    """Returns the names of all gates, in the order of the registry."""
    return names_of_gates(CHECKS)


def run_gate(name: str, build: BuildContext) -> GateResult | None:
    """Runs all checks of one gate; the first problem counts. None if none of them applies to the release."""
    return result_of_gate(CHECKS, name, build)


def run_gates(build: BuildContext) -> list[GateResult]:
    """Returns the results of all gates that apply to the release."""
    results = [result for name in gate_names() if (result := run_gate(name, build)) is not None]
    return [waive(result, build.evaluation.get("waived_gates", {})) for result in results]


def write_gates(release: Release, results: list[GateResult]) -> None:
    """Writes the results as a table, and as a statement about all artifacts."""
    rows = {result.name: {"ok": result.ok, "detail": result.detail} for result in results}
    (release.root / GATES).write_text(json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    stated = attestations.gates(release, {result.name: result.ok for result in results})
    (release.root / GATES_STATED).write_bytes(to_json(stated))
