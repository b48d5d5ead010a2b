"""Whether the chat templates of a model can be used."""

from __future__ import annotations

from release.checks import formats
from release.checks.check import Subject
from release.checks.findings import Findings


def chat_templates(subject: Subject) -> Findings:
    """Every chat template of a model renders a conversation."""
    findings = Findings()
    for model in subject.models:
        for name, template in formats.templates(model).items():
            try:
                formats.render(template)
            except MemoryError:
                raise
            except Exception as error:  # whatever a template does
                message = f"{type(error).__name__}: {' '.join(str(error).split())}"
                findings.problems.append(f"{model.name}/{name} renders no conversation: {message}")
    return findings
