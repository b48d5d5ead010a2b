"""Checks the chat templates of a model."""

from __future__ import annotations

from release.checks import formats
from release.checks.check import Subject
from release.checks.findings import Findings


def chat_templates(subject: Subject) -> Findings:
    """Checks that every chat template of a model renders a conversation."""
    findings = Findings()
    for model in subject.models:
        for name, template in formats.templates(model).items():
            try:
                formats.render(template)
            except MemoryError:
                raise
            except Exception as error:  # a template can raise anything
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                findings.problems.append(f"{model.name}/{name} renders no conversation: {message}")
    return findings
