"""Checks the tensors of models and checkpoints, and that the export equals the trained model."""

from __future__ import annotations

from pathlib import Path

from release.assembly.published_tables import read_json
from release.checks.check import BuildContext, Subject
from release.checks.findings import Findings
from release.layout import models_of, when


def tensors(subject: Subject) -> Findings:
    """Checks that every tensor is readable and finite, that an index lists the tensors of its files, and that an
    optimizer has the tensors of its model."""
    import torch
    from safetensors import safe_open

    folder, problems = subject.folder, []
    files: dict[tuple[Path, str], dict[str, str]] = {}  # by folder, of model and optimizer: tensor -> its file
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        with safe_open(path, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                tensor = f.get_tensor(key)
                if not torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all():  # FP8 lacks the test
                    problems.append(f"{name}: tensor {key} is not finite")
                files.setdefault((path.parent, path.stem.split("-")[0]), {})[key] = path.name
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        index = read_json(path)
        stated = index.get("weight_map") if isinstance(index, dict) else None
        if stated != files.get((path.parent, path.name.split(".")[0])):
            problems.append(f"{path.relative_to(folder).as_posix()}: it does not list the tensors of its files")
    for (model_folder, kind), names in files.items():
        tensor_names = {name.split(".", 1)[1] for name in names}
        if kind == "optimizer" and tensor_names != files.get((model_folder, "model"), {}).keys():
            name = model_folder.relative_to(folder).as_posix()
            problems.append(f"{name}: its optimizer has other tensors than the model beside it")
    return Findings(problems)


def export_parity(build: BuildContext) -> Findings:
    """Checks that the logits of every exported model agree with the trainer's."""
    deltas, findings = {}, Findings()
    for path in sorted((build.folder / "evidence/parity").glob("*.json")):
        parity = read_json(path)
        delta, tolerance = parity["max_abs_logit_delta"], parity["tolerance"]
        deltas[path.stem] = delta
        if not delta < tolerance:
            text = f"export-{path.stem} differs by {delta:.3g}, tolerance {tolerance:g}"
            findings.problems.append(f"{text}; the export is not the trained model, do not publish it")
    missing = [name for name in models_of(build.release.nodes) if name not in deltas]
    findings.problems += [f"parity is not known for {name}; run its export again" for name in missing]
    findings.summary = ", ".join(f"{name} max |Δ| {deltas[name]:.3g}" for name in sorted(deltas, key=when))
    return findings
