"""Checks the chat templates of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.errors import installing
from release import untrusted
from release.checks import formats
from release.checks.findings import Findings
from release.layout import GOLDENS
from release.opened_release import Release
from stages.formats.chat_templates import INFERENCE_FILE, TRAINING_FILE

ARGUMENTS = ("messages", "tools", "add_generation_prompt")


def chat_templates(release: Release) -> Findings:
    """Checks that every chat template of a model renders a conversation, and that sandboxed Jinja renders the recorded
    conversations with both templates as transformers did at the build; `tokenizers` must give its token ids."""
    findings = Findings(compared=False, summary="Jinja and transformers render the recorded conversations alike")
    for model in release.model_folders:
        templates = formats.templates(model)
        findings.compared = findings.compared or bool(templates)
        for name, template in templates.items():
            try:
                formats.render(template)
            except MemoryError:
                raise
            except Exception as error:  # a template can raise anything
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                findings.problems.append(f"{model.name}/{name} renders no conversation: {message}")
        if not findings.problems and (model / GOLDENS).is_file():
            _compare(model, {name: templates[name] for name in (INFERENCE_FILE, TRAINING_FILE) if name in templates},
                     findings)  # fmt: skip
    return findings


def _compare(model: Path, templates: dict[str, str], findings: Findings) -> None:
    """Compares the recorded conversations of a model. templates: {file: text}."""
    rows = untrusted.read_json(model / GOLDENS, follow=True).get("conversations")
    if rows is None:
        findings.problems.append(f"{model.name}/{GOLDENS} records no conversations")
        return
    for name, template in templates.items():
        compiled = formats.compile_template(template)
        for number, row in enumerate(rows, 1):
            arguments = {argument: row[argument] for argument in ARGUMENTS}
            if row["enable_thinking"] is not None:
                arguments["enable_thinking"] = row["enable_thinking"]
            if compiled.render(**arguments) != row["text"]:
                findings.problems.append(f"{model.name}/{name} renders conversation {number} of {GOLDENS} otherwise")
    findings.problems += [f"{model.name}: {text}" for text in _id_problems(model, rows, findings)]


def _id_problems(model: Path, rows: list[dict[str, Any]], findings: Findings) -> list[str]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        reason = f"token ids of conversations: tokenizers is not installed; {installing('train')}"
        findings.skipped["token ids"] = reason
        return []
    content = untrusted.read(model / "tokenizer.json", formats.TEXT_BYTES, follow=True)
    tokenizer = Tokenizer.from_str(content.decode())
    return [
        f"tokenizer.json encodes conversation {number} of {GOLDENS} otherwise"
        for number, row in enumerate(rows, 1)
        if tokenizer.encode(row["text"], add_special_tokens=False).ids != row["ids"]
    ]
