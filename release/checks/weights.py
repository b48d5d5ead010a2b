"""Checks the tensors of models and checkpoints, that the export equals the trained model, and the published base."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipeline.core.text import escaped
from release import untrusted
from release.checks.check import BuildContext
from release.checks.findings import Findings
from release.facts.published_tables import read_json
from release.layout import BASE, models_of, when
from release.opened_release import Release
from release.published_files import ADAPTER
from stages.train.imported_weights import NAME, TOKENIZER


def tensors(release: Release) -> Findings:
    """Checks that every tensor is readable and finite, that an index lists the tensors of its files, and that an
    optimizer has the tensors of its model."""
    import torch
    from safetensors import safe_open

    folder, problems = release.root, []
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
    return Findings(problems, compared=bool(files))


def shards(release: Release) -> Findings:
    """Checks that the tensors of each model and each optimizer are in one file, or in the shards of its index: no file
    more or less, and in each the tensors that the index states."""
    folder, findings = release.root, Findings(compared=False)
    names_by_place: dict[str, list[str]] = {}
    for path in release.files:  # without those of a client, which has one for each file that it downloads
        place, slash, name = path.rpartition("/")
        if ".safetensors" in name:
            names_by_place.setdefault(f"{place}{slash}", []).append(name)
    for prefix, names in names_by_place.items():
        for stem in sorted({name.partition(".")[0].partition("-")[0] for name in names}):
            own = [name for name in names if re.match(f"{stem}[.-]", name)]
            findings.problems += [f"{prefix}{text}" for text in _shard_problems(folder / prefix, stem, own)]
            findings.compared = True
    findings.summary = "every tensor is in one file, or in the shards of an index"
    findings.problems += [f"{name}.safetensors is missing" for name in _missing(release)]
    return findings


def _missing(release: Release) -> Iterator[str]:
    """The stems of weights that a folder must have and lacks: a checkpoint has an optimizer but at step 0."""
    folder = release.root
    stems = [f"{model.relative_to(folder).as_posix()}/model".removeprefix("./") for model in release.model_folders]
    if release.kind == "variant":
        stems = [] if (folder / ADAPTER).is_file() or any(folder.glob("*.gguf")) else ["model"]
    elif release.kind == "checkpoint":
        stems = ["model", "optimizer"] if read_json(folder / "state.json")["step"] else ["model"]
    yield from (stem for stem in stems if not any(folder.glob(f"{stem}*.safetensors")))


def _shard_problems(place: Path, stem: str, names: list[str]) -> Iterator[str]:
    """Problems of the files of one stem, such as `model`, in a folder. names: of all of them."""
    files = [name for name in names if name.endswith(".safetensors")]
    headers = {name: untrusted.tensor_header(place / name, follow=True) for name in files}
    if names == [f"{stem}.safetensors"]:
        return
    index = f"{stem}.safetensors.index.json"
    expected = [f"{stem}-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    if names != [*expected, index] or len(files) < 2:
        yield f"{names[0]}: {', '.join(names)} are not one file or the shards of one index"
        return
    tensors = {tensor: name for name, header in headers.items() for tensor in header}
    spans = [entry["data_offsets"] for header in headers.values() for entry in header.values()]
    size = sum(end - begin for begin, end in spans)
    if read_json(place / index) != {"metadata": {"total_size": size}, "weight_map": tensors}:
        yield f"{index} does not list the tensors of its files, and these alone"


def export_parity(build: BuildContext) -> Findings:
    """Checks that the logits of every exported model agree with the trainer's."""
    deltas, findings = {}, Findings()
    for path in sorted((build.release.root / "evidence/parity").glob("*.json")):
        parity = read_json(path)
        delta, tolerance = parity["max_abs_logit_delta"], parity["tolerance"]
        deltas[path.stem] = delta
        if not delta < tolerance:
            text = f"export-{path.stem} differs by {delta:.3g}, tolerance {tolerance:g}"
            findings.problems.append(f"{text}; the export is not the trained model, do not publish it")
    missing = [name for name in models_of(build.release.info.nodes) if name not in deltas]
    findings.problems += [f"parity is not known for {name}; run its export again" for name in missing]
    findings.summary = ", ".join(f"{name} max |Δ| {deltas[name]:.3g}" for name in sorted(deltas, key=when))
    return findings


def published_base(release: Release) -> Findings:
    """Checks that the weights and the tokenizer of `model-base` have the digests of the published model, which
    `evidence/base.json` states. Nothing to compare if pre-training began with it."""
    folder, base = release.root, read_json(release.root / "evidence" / NAME)
    if "pretrain" in release.info.nodes:
        reason = f"pre-training changed the weights of {escaped(base['repo'])}"
        return Findings(detail=reason, compared=False, summary=reason)
    stated = {path: digest for path, digest in base["files"].items() if path == TOKENIZER or path.startswith("model")}
    present = {path.name for path in (folder / BASE).glob("model*.safetensors*")} | {TOKENIZER}
    problems = [f"{BASE}/{path} is no file of {base['repo']}; remove it" for path in sorted(present - stated.keys())]
    for path, digest in sorted(stated.items()):
        if path not in present or release.digest(folder / BASE / path) != digest:
            problems.append(
                f"{BASE}/{path} is not that of {base['repo']}; a release holds the published model bit for bit, so "
                "train it in the precision in which it was published"
            )
    text = f"{len(stated)} files of {base['repo']}, {base['digest']}"
    return Findings([escaped(line) for line in problems], detail=escaped(text), summary=escaped(text))
