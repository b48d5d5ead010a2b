"""Checks that plain transformers loads the models of a release, and compares their outputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from release.checks import confine
from release.checks.check import BuildContext
from release.checks.confine import Budget
from release.checks.findings import Absent, Findings, require_file
from release.checks.load_report import (
    BYTES_PER_SECOND,
    CHAT_TEMPLATE,
    MODEL,
    LoadReport,
    load_models,
    weight_bytes,
)
from release.facts.published_tables import read_json
from release.layout import GOLDENS
from release.opened_release import Release
from stages.formats.chat_templates import INFERENCE_FILE
from stages.formats.tokenizer import THINK_END, THINK_START

GOLDEN_BOUND = 1e-3
"""The tolerance for logits in fp32, which another processor adds up in another order."""
MEMORY, SECONDS = 400 << 20, 10
"""The limits for loading a model in transformers, beyond the needs of its weights."""


def loads_with_goldens(release: Release) -> Findings:
    """Checks that each model loads within limits, that its chat template round-trips, and that fixed inputs give the
    outputs of the build."""
    if lacking := confine.missing():
        raise Absent(f"not checked, because loading a model within limits needs {lacking}")
    for name in ("torch", "transformers"):  # the fresh interpreter would report their absence as a fault of the model
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    models = release.model_folders
    size = weight_bytes(models)
    budget = Budget(MEMORY + 8 * size, SECONDS * len(models) + size // BYTES_PER_SECOND)
    findings = Findings()
    for model, report in zip(models, load_models(models, budget), strict=True):
        messages = [problem.text for problem in report.problems] or _compare_with_goldens(model, report)
        findings.problems += [f"{model.name}: {text}" for text in messages]
    return findings


def _compare_with_goldens(model: Path, report: LoadReport) -> list[str]:
    """Compares the outputs of tokenizer, template and weights with those of the build; logits within GOLDEN_BOUND."""
    golden = read_json(require_file(model, GOLDENS))
    problems = []
    for expected, actual in zip(golden["rows"], report.goldens["rows"], strict=True):
        for field in ("text", "ids", "greedy"):
            if expected[field] != actual[field]:
                problems.append(f"{GOLDENS}: the {field} of {expected['text']!r} are {actual[field]!r} here")
        if not all(abs(a - b) <= GOLDEN_BOUND for a, b in zip(expected["logits"], actual["logits"], strict=True)):
            problems.append(f"{GOLDENS}: logits after {expected['text']!r} differ by more than {GOLDEN_BOUND:g}")
    conversations = golden.get("conversations", []), report.goldens.get("conversations", [])
    for number, (expected, actual) in enumerate(zip(*conversations, strict=True), 1):
        problems += [
            f"{GOLDENS}: transformers gives conversation {number} another {field}"
            for field in ("text", "ids")
            if expected[field] != actual[field]
        ]
    return problems


def loads_as_exported(build: BuildContext) -> Findings:
    """Checks that every model loads with all its tensors and the number of parameters in its files, and has finite
    logits."""
    findings = Findings(summary="every model loads, finite logits")
    for folder, report in build.load_reports.items():
        findings.problems += [f"{folder}: {text}" for text in report.of_part(MODEL)]
        if report.parameters not in (None, build.release.models[folder].parameters.total):
            findings.problems.append(
                f"{folder}: transformers counts {report.parameters} parameters, the file holds others"
            )
    return findings


def chat_template_round_trips(build: BuildContext) -> Findings:
    """Checks that the output of the chat template survives the tokenizer, with every marker as one token, and that the
    files have the form that runtimes read."""
    findings = Findings(summary="text, tokens and markers survive")
    for folder, report in build.load_reports.items():
        texts = [*report.of_part(CHAT_TEMPLATE), *_form_problems(build.release.root / folder)]
        findings.problems += [f"{folder}: {text}" for text in texts]
    return findings


def _form_problems(model: Path) -> list[str]:
    """Lists what runtimes other than the present transformers would stumble over."""
    config = read_json(model / "tokenizer_config.json")
    template = (model / INFERENCE_FILE).read_text("utf-8")
    added_tokens = {token["content"]: token for token in read_json(model / "tokenizer.json")["added_tokens"]}
    faults = {
        "tokenizer_config.json lists extra_special_tokens, which transformers 4 refuses": isinstance(
            config.get("extra_special_tokens"), list
        ),
        "tokenizer_config.json has no model_max_length": not config.get("model_max_length"),
        f"{INFERENCE_FILE} has generation blocks, which runtimes refuse": "generation -%}" in template,
        "the markers of reasoning are special tokens, which default decoding drops": any(
            added_tokens[marker]["special"] for marker in (THINK_START, THINK_END) if marker in added_tokens
        ),
    }
    return [text for text, is_wrong in faults.items() if is_wrong]
