"""Checks what other programs made of the final model and its variants when the release was built."""

from __future__ import annotations

from release.assembly.published_tables import read_json
from release.assembly.runtimes import REFERENCE, RUNTIMES, problem_of
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import MODEL
from release.layout import RUNTIMES as FILE
from release.repositories import variant_folders


def runtimes(subject: Subject) -> Findings:
    """Checks that each run of evidence/runtimes.json passed by its own figures or was skipped for a reason, and that no
    program that reads the final model or a variant is left out."""
    folder, findings = subject.folder, Findings()
    runs = read_json(folder / FILE)
    for run in runs:
        name = f"{FILE}: {run['folder']} in {run['runtime']}"
        if run["status"] == "skipped":
            findings.problems += [] if run.get("reason") else [f"{name} was skipped without a reason"]
        elif run["status"] == "reference":
            findings.problems += [] if run["runtime"] == REFERENCE else [f"{name} is not the reference"]
        elif problem := problem_of(run) if "bound" in run else run.get("reason", "it has no figures"):
            findings.problems.append(f"{name}: {problem}")
        elif run["status"] != "passed":
            findings.problems.append(f"{name} is called {run['status']}, and its figures keep their bound")
    present = {run["folder"] for run in runs}
    if subject.kind == "release":
        missing = [name for name in (MODEL, *variant_folders(folder)) if name not in present]
        findings.problems += [f"{FILE} has no run of {name}" for name in missing]
    stated = {run["runtime"] for run in runs if run["folder"] == MODEL}
    readers = [name for name, runtime in RUNTIMES.items() if "safetensors" in runtime.writers]
    findings.problems += [f"{FILE} does not say what {name} makes of {MODEL}" for name in readers if name not in stated]
    counts = {status: sum(run["status"] == status for run in runs) for status in ("passed", "skipped")}
    findings.compared = counts["passed"] > 0
    findings.summary = f"{counts['passed']} runs passed, {counts['skipped']} skipped"
    findings.detail = findings.summary
    return findings
