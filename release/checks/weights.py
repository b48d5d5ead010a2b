"""Checks the tensors of a release.

These are the tensors of models and checkpoints, the parity of exports, the published base, and the variants of the
final model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from release import scratch, untrusted
from release.cards import card_tables
from release.checks.check import BuildContext, Findings
from release.facts.published_tables import read_json
from release.facts.runtimes import REFERENCE, RUNTIMES, problem_of
from release.facts.variant_facts import Original, base_of, compute_loss, read_original, read_variant_facts
from release.layout import BASE, LOSS, MERGE, MODEL, PUBLIC_KEY, RECIPE, SIGNATURE, STUDENT, SUMS, models_of, when
from release.layout import RUNTIMES as FILE
from release.opened_release import Release
from release.published_files import ADAPTER
from stages.train.imported_weights import NAME, TOKENIZER


def tensors(release: Release) -> Findings:
    """Checks that every tensor is readable and finite.

    An index must list the tensors of its files, and an optimizer must have the tensors of its model.
    """
    import torch
    from safetensors import safe_open

    folder, problems = release.root, []
    files: dict[tuple[Path, str], dict[str, str]] = {}  # by folder, of model and optimizer: tensor -> its file
    for path in sorted(folder.rglob("*.safetensors")):
        name = path.relative_to(folder).as_posix()
        with safe_open(path, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 (not a mapping)
                tensor = f.get_tensor(key)
                # `isfinite` does not take FP8.
                if tensor.itemsize == 1:
                    tensor = tensor.float()
                if not torch.isfinite(tensor).all():
                    problems.append(f"{name}: tensor {key} is not finite")
                files.setdefault((path.parent, path.stem.split("-")[0]), {})[key] = path.name

    for path in sorted(folder.rglob("*.safetensors.index.json")):
        index = read_json(path)
        stated = index.get("weight_map") if isinstance(index, dict) else None
        if stated != files.get((path.parent, path.name.split(".")[0])):
            problems.append(f"{path.relative_to(folder).as_posix()}: it does not list the tensors of its files")

    for (model_folder, kind), names in files.items():
        # The name of a moment is its kind, and after a point the name of its tensor.
        tensor_names = {name.partition(".")[2] for name in names}
        if kind == "optimizer" and tensor_names != files.get((model_folder, "model"), {}).keys():
            name = model_folder.relative_to(folder).as_posix()
            problems.append(f"{name}: its optimizer has other tensors than the model beside it")
    return Findings(problems, compared=bool(files))


def shards(release: Release) -> Findings:
    """Checks that the tensors of each model and each optimizer are in one file, or in the shards of its index.

    There must be no file more or less, and each must have the tensors that the index states.
    """
    folder, findings = release.root, Findings(compared=False)
    names_by_place: dict[str, list[str]] = {}
    for path in release.files:  # without those of a client, which has one for each file that it downloads
        place, slash, name = path.rpartition("/")
        if ".safetensors" in name:
            names_by_place.setdefault(f"{place}{slash}", []).append(name)
    for prefix, names in names_by_place.items():
        for stem in sorted({name.partition(".")[0].partition("-")[0] for name in names}):
            # With the character after the stem, so that `model` does not take the files of `models`.
            stem_files = [name for name in names if name.startswith((f"{stem}.", f"{stem}-"))]
            findings.problems += [f"{prefix}{text}" for text in _shard_problems(folder / prefix, stem, stem_files)]
            findings.compared = True
    findings.summary = "every tensor is in one file, or in the shards of an index"
    findings.problems += [f"{name}.safetensors is missing" for name in _missing(release)]
    return findings


def _missing(release: Release) -> Iterator[str]:
    """Yields the stems of weights that a folder must have and lacks.

    Every checkpoint has an optimizer that has made updates, but for an average of several.
    """
    folder = release.root
    if release.kind == "variant":
        has_other_weights = (folder / ADAPTER).is_file() or any(folder.glob("*.gguf"))
        stems = [] if has_other_weights else ["model"]
    elif release.kind == "checkpoint":
        state = read_json(folder / "state.json")
        # None has made an update at a fresh step 0 and in an average; carried states have.
        stems = ["model", "optimizer"] if state["optimizer_step"] else ["model"]
    else:
        stems = [f"{model.relative_to(folder).as_posix()}/model".removeprefix("./") for model in release.model_folders]
    yield from (stem for stem in stems if not any(folder.glob(f"{stem}*.safetensors")))


def _shard_problems(place: Path, stem: str, names: list[str]) -> Iterator[str]:
    """Yields the problems of the files of one stem, such as `model`, in a folder.

    `names` are those of all files of the stem.
    """
    files = [name for name in names if name.endswith(".safetensors")]
    headers = {name: untrusted.tensor_header(place / name, follow=True) for name in files}
    # One file needs no index; a loader that finds both could take up other tensors than were checked.
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
    findings = Findings()
    deltas: dict[str, float] = {}
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
    """Checks that the weights and the tokenizer of `model-base` have the digests of the published model.

    `evidence/base.json` states them. Nothing is compared if pre-training began with the published model, since training
    changes its weights.
    """
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


def merges(release: Release) -> Findings:
    """Checks that merged weights are the average of the last published checkpoints of their phase, bit for bit.

    These are as many as the recipe averages, and `merge.json` of each model states the same.
    """
    import torch

    from stages.train.checkpoint.release_checkpoint import Tensors, name_of
    from stages.train.merge import average

    problems, texts, wanted = list[str](), list[str](), _averaged(release.recipe)
    for row in release.checkpoints:
        if not row.phase.startswith(MERGE):
            continue
        phase, steps, stated = row.phase.removeprefix(MERGE), row.state["merge"]["steps"], row.state["merge"]["files"]
        trained = [other for other in release.checkpoints if other.phase == phase and other.step > 0]
        if len(steps) != (last := wanted.pop(phase, 0)):
            problems.append(f"{row.branch}/state.json averages {len(steps)} checkpoints, and {RECIPE} {last or 'none'}")
        for path in sorted(release.root.glob(f"{MODEL}*/training/{row.phase}.json")):
            if read_json(path) != row.state["merge"]:
                problems.append(f"{path.relative_to(release.root)} states another average than {row.branch}/state.json")
        sources = {other.step: release.root / "checkpoints" / other.branch for other in trained[-len(steps) :]}
        if list(sources) != steps or steps[-1] != row.step:
            problems.append(f"{row.branch}/state.json names other steps than those of the last checkpoints of {phase}")
            continue
        files = {name_of(step): sorted(place.glob("model*.safetensors")) for step, place in sources.items()}
        if stated != {f"{step}/{path.name}": release.digest(path) for step, paths in files.items() for path in paths}:
            problems.append(f"{row.branch}/state.json states other digests than those of the checkpoints of {phase}")
        merged = Tensors(release.root / "checkpoints" / row.branch)
        averaged = [Tensors(place) for place in sources.values()]
        names = sorted({*merged, *averaged[0]})
        for name in names:
            is_everywhere = all(name in each for each in (merged, *averaged))
            if not is_everywhere or not torch.equal(merged[name], average(averaged, name)):
                problems.append(f"{row.branch}: tensor {name} is not the average of those of steps {steps}")
        texts.append(f"{phase}: {len(names)} tensors are the averages of those of steps {', '.join(map(str, steps))}")
    problems += [f"{RECIPE} averages checkpoints of {phase}, and the release has no average" for phase in wanted]
    return Findings([escaped(line) for line in problems], detail="; ".join(texts), summary="; ".join(texts))


def _averaged(recipe: dict[str, Any]) -> dict[str, int]:
    """Returns the number of averaged checkpoints of each phase with a section `merge`."""
    sections = {phase: recipe.get(phase) for phase in ("pretrain", "midtrain", "sft")}
    sections |= {f"longcontext-{number}": section for number, section in enumerate(recipe.get("long_context", ()), 1)}
    return {phase: section["merge"]["last"] for phase, section in sections.items() if section and section.get("merge")}


WITH_VARIANT = frozenset({"README.md", "LICENSE", LOSS, SUMS, SIGNATURE, PUBLIC_KEY})
"""Files of a variant's repository beside the converted ones."""


def losses(release: Release) -> Findings:
    """Checks the figures and cards of all variants of a release against their tables and the original's."""
    folder = release.root
    final = models_of(release.info.nodes)[-1]
    original = read_original(folder / MODEL, release.dataset / "evaluation" / final)
    findings, texts = Findings(compared=False), []
    for name in release.variant_names:
        findings.add(_loss(folder / name, original), f"{name}/")
        texts.append(f"{name} {read_json(folder / name / LOSS)['divergence']['value']:.3g}")
    findings.summary = f"mean divergence in nats: {', '.join(texts)}"
    return findings


def loss(release: Release) -> Findings:
    """Checks the figures and the card of one variant against its tables. The original's figures are as stated."""
    return _loss(release.root, None)


def _loss(folder: Path, original: Original | None) -> Findings:
    """Checks a variant in a folder. Without the original, its figures count as the variant states them."""
    facts, findings = read_variant_facts(folder), Findings()
    if json.loads(json.dumps(compute_loss(folder, facts.loss, original))) != facts.loss:
        findings.problems.append(f"{LOSS} is not what the tables give")
    findings.compare_tables((folder / "README.md").read_text(), card_tables.VARIANT_TABLES, facts)
    return findings


def conversions(release: Release) -> Findings:
    """Checks that the files of each variant are those that the weights of the final model give, byte for byte.

    An adapter on its base in the release must be the final model, up to rounding, and a student its last checkpoint.
    """
    from stages.export.variants import conversion

    folder, problems, texts = release.root, list[str](), list[str]()
    for name in release.variant_names:
        facts = read_variant_facts(folder / name)
        variant = facts.loss["variant"]
        if facts.base:
            texts.append(_sum(folder, name, problems))
            continue
        if facts.is_student:
            texts.append(_student(release, name, problems))
            continue
        published = {path.name for path in (folder / name).iterdir() if path.is_file()} - WITH_VARIANT
        with scratch.folder() as place:
            conversion.write(variant, folder / MODEL, place / "again")  # type: ignore[arg-type]
            written = {path.name: path for path in (place / "again").iterdir()}
            problems += [f"{name}/{file} does not follow from {MODEL}" for file in sorted(published - written.keys())]
            problems += [f"{name}/{file} is missing" for file in sorted(written.keys() - published)]
            problems += [
                f"{name}/{file} is not what {MODEL} gives"
                for file in sorted(written.keys() & published)
                if sha256_file(written[file]) != release.digest(folder / name / file)
            ]
    return Findings(problems, detail="; ".join(filter(None, texts)) or "holds")


def _student(release: Release, name: str, problems: list[str]) -> str:
    """Returns a sentence on the weights of a student and its last checkpoint, which are equal; problems are added."""
    import torch

    from stages.export.hf import Rounded
    from stages.mcore.hf_mapping import to_hf
    from stages.models.registry import parse
    from stages.train.checkpoint.release_checkpoint import Tensors

    rows = [row for row in release.checkpoints if row.phase == STUDENT[-1]]
    if not rows:
        problems.append(f"{name} has no checkpoint of {STUDENT[-1]}, whose weights it must have")
        return ""
    config, stated = read_json(release.root / name / "config.json"), rows[-1].state["config"]["model"]
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config["dtype"]]
    trained = Rounded(Tensors(release.root / "checkpoints" / rows[-1].branch), dtype)
    expected = dict(to_hf(trained, parse(stated), config["vocab_size"]))
    published = Tensors(release.root / name)
    problems += [f"{name}: tensor {tensor} is missing or of no checkpoint" for tensor in published.keys() ^ expected]
    differ = (tensor for tensor in published.keys() & expected if not torch.equal(published[tensor], expected[tensor]))
    problems += [f"{name}: tensor {tensor} is not that of {rows[-1].branch}" for tensor in sorted(differ)]
    return f"{len(expected)} tensors of {name} are compared with those of {rows[-1].branch}"


def _sum(release: Path, name: str, problems: list[str]) -> str:
    """Returns a sentence on how far an adapter on its base is the final model.

    If it is not, that is a problem, and the sentence is "".
    """
    from stages.export.variants import adapter_files

    try:
        return adapter_files.require_sum(base_of(release, release / name), release / name, release / MODEL)
    except (AtomError, KeyError, ValueError, RuntimeError) as error:
        problems.append(f"{name} is no adapter of {MODEL}: {error}")
        return ""


def runtimes(release: Release) -> Findings:
    """Checks that each run of evidence/runtimes.json passed by its own figures or was skipped for a reason.

    No program that reads the final model or a variant may be left out.
    """
    folder, findings = release.root, Findings()
    runs = read_json(folder / FILE)
    for run in runs:
        name = f"{FILE}: {run['folder']} in {run['runtime']}"
        if run["status"] == "skipped":
            if not run.get("reason"):
                findings.problems.append(f"{name} was skipped without a reason")
            continue
        if run["status"] == "reference":
            if run["runtime"] != REFERENCE:
                findings.problems.append(f"{name} is not the reference")
            continue

        problem = problem_of(run) if "bound" in run else run.get("reason") or "it has no figures"
        if problem:
            findings.problems.append(f"{name}: {problem}")
        elif run["status"] != "passed":
            findings.problems.append(f"{name} is called {run['status']}, and its figures keep their bound")

    present = {run["folder"] for run in runs}
    if release.is_whole:
        missing = [name for name in (MODEL, *release.variant_names) if name not in present]
        findings.problems += [f"{FILE} has no run of {name}" for name in missing]
    stated = {run["runtime"] for run in runs if run["folder"] == MODEL}
    readers = [name for name, runtime in RUNTIMES.items() if "safetensors" in runtime.writers]
    findings.problems += [f"{FILE} does not say what {name} makes of {MODEL}" for name in readers if name not in stated]

    statuses = [run["status"] for run in runs]
    findings.compared = "passed" in statuses
    findings.summary = f"{statuses.count('passed')} runs passed, {statuses.count('skipped')} skipped"
    findings.detail = findings.summary
    return findings
