"""Trains the steps of a plan again, and compares the checkpoint, the log and the environment with the published ones.

It makes the token shards and the work checkpoint to resume from, and runs the stage itself.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.core import environment, provenance
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.parts import PART_NAME
from pipeline.core.source_code import code_digests
from pipeline.core.store import Artifact, canonical, sha256_bytes, write_manifest
from pipeline.graph import registry
from release.audit.replay.plan import Plan, answer_inputs, checkpoint_files, environment_values
from release.audit.replay.report import BITWISE, CLOSE, DIFFERS, TOLERANCE, Replay
from release.audit.replay.source import Source

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]
SHARD = (".bin", ".idx")


def retrain(source: Source, phase: str, first: int, last: int, folder: Path, progress: Progress) -> Replay:
    """Trains the steps after `first` up to `last` in `folder`, and compares the result with the published checkpoint.

    Raises AtomError if they cannot be replayed, CheckFailed if files of the release are altered, contradict each other
    or do not state how the phase was trained.
    """
    try:
        plan = Plan.read(source, phase, first, last)
        inputs = answer_inputs(plan.source, plan.files, plan.checkpoints, folder)
        if plan.mix:
            progress("tokenizing the kept documents")
            inputs |= {"tokens": tokenize(plan, folder), "order": plan.order()}
        write_work_checkpoint(plan, folder / "work")
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # the evidence is untrusted
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckFailed(
            f"{source.folder} does not state how {phase} was trained up to step {last} ({reason}); verify it"
        ) from error
    progress(f"training steps {first + 1} to {last}")
    checkpoint = train(plan, inputs, folder, progress)
    # After training, as for the statements, because training adds packages to the path.
    differences, fingerprint = compare_environments(plan)
    checkpoints: dict[str, str] = {}
    for place in (plan.start, *plan.checkpoints.values()):
        checkpoints |= checkpoint_files(source, place)
    tokens = inputs.get("tokens")
    shards = {f"{tokens.key}/{row.path}": row.sha256 for row in tokens.rows} if tokens else {}
    progress("comparing")
    tensors, different = compare_checkpoints(source.folder / plan.end, checkpoint)
    state = changed_fields(plan, checkpoint)
    verdict = CLOSE if different else BITWISE
    if state or max(different.values(), default=0.0) > TOLERANCE:
        verdict = DIFFERS
    return Replay(
        phase=phase,
        first=first,
        last=last,
        verdict=verdict,
        tensors=tensors,
        different=different,
        state=state,
        diverges=first_divergence(plan, checkpoint.parent.parent / "training.jsonl"),
        ranks=plan.ranks,
        environment=differences,
        fingerprint=fingerprint,
        materials=checkpoints | source.digests(*plan.data_files) | shards,
        subject=checkpoint_files(source, plan.end),
    )


def tokenize(plan: Plan, folder: Path) -> Artifact:
    """Makes the token shards of the sources that the phase reads, from the published documents and tokenizer.

    They are written to `folder`/tokens. Raises CheckFailed if they differ from the manifest of the shards that were
    trained on.
    """
    source, key = plan.source, plan.materials["tokens"]
    node, mix = source.manifests[key].node, plan.mix
    _, body = source.statement(node)
    materials = provenance.material_keys(body)
    kept_folder, out, work = folder / "dedup" / "kept", folder / "tokens", folder / "shards"
    for directory in (kept_folder, out, work):
        directory.mkdir(parents=True)
    for name in sorted(mix):
        for path in _kept_files(source, materials["dedup"], name):
            link = kept_folder.parent / path
            link.parent.mkdir(exist_ok=True)
            # The stage reads a folder in the form of its input's artifact; links spare a copy of the corpus.
            link.symlink_to(source.kept(materials["dedup"], path))
    folders = {"dedup": kept_folder.parent, "tokenizer": source.tokenizer(materials["tokenizer"]).parent}
    inputs = {role: Artifact(materials[role], "", path, ()) for role, path in folders.items()}
    stage = registry.stage("tokenize")
    config = stage.config.model_validate(provenance.parameters_of(body)["config"])
    # No step has this number, so the stage runs to its end.
    stage.run(config, inputs, work, out, StopAtStep(-1, lambda text: None))
    shutil.copyfile(source.copy(key, "meta.json"), out / "meta.json")  # of all sources, as published
    artifact = write_manifest(out, key)
    shards = {row.path: row.sha256 for row in artifact.rows if row.path.endswith(SHARD)}
    listed = {path: digest for path, digest in source.listed(key).items() if path.endswith(SHARD)}
    # Only the sources of the phase are tokenized here, so only their shards can be compared.
    expected = {path: digest for path, digest in listed.items() if path.split("/")[1] in mix}
    if mismatches := sorted(path for path in {*shards, *expected} if shards.get(path) != expected.get(path)):
        raise CheckFailed(
            f"the kept documents do not give the token shards that were trained on: {mismatches[0]} differs from the "
            f"file in evidence/manifests/{node}.json ({len(mismatches)} of {len(expected)} shards differ); documents, "
            "tokenizer or manifest were changed"
        )
    return artifact


def _kept_files(source: Source, key: str, name: str) -> list[str]:
    """Returns the paths in the artifact of dedup of a source's kept documents, by its manifest.

    Raises CheckFailed if it lists none.
    """
    pattern = rf"kept/{re.escape(name)}/{PART_NAME}"
    files = [path for path in source.listed(key) if re.fullmatch(pattern, path)]
    if not files:
        raise CheckFailed(
            f"the manifest of {key} lists no kept documents of {name}; documents or manifest were changed"
        )
    return files


def write_work_checkpoint(plan: Plan, work: Path) -> None:
    """Writes the published checkpoint and the log up to it, like an attempt that was killed at that step.

    Writes nothing if the phase begins there with the weights of the phase before. Raises CheckFailed if tensors are
    missing or have other shapes than the config implies.
    """
    if (state := plan.start_state) is None:
        return
    from stages.mcore.model import check_tensors
    from stages.train.checkpoint import release_checkpoint, sharded_state, work_checkpoint
    from stages.train.engine import Piece

    published = plan.source.folder / plan.start
    shapes, tensors = plan.config.model.shapes(plan.config.padded_vocab_size), release_checkpoint.Tensors(published)
    if plan.config.phase.adapter:
        shapes = plan.config.phase.adapter.shapes(shapes)
    check_tensors(shapes, tensors.shapes(), plan.start)
    flat = {f"weight.{name}": tensor.flatten() for name, tensor in tensors.items()}
    # A checkpoint before the first update has no moments.
    if state["optimizer_step"]:
        moments = release_checkpoint.Tensors(published, release_checkpoint.OPTIMIZER)
        states = plan.config.phase.optimizer.state_shapes(shapes)
        check_tensors({name: shape for name, (_, _, shape) in states.items()}, moments.shapes(), plan.start)
        flat |= {name: tensor.flatten() for name, tensor in moments.items()}
    folder = work / "attempt-0001" / "checkpoints" / f"step-{plan.first:09d}"
    folder.mkdir(parents=True)
    pieces = [Piece(n, (tuple((0, size) for size in s),), 0, math.prod(s)) for n, s in shapes.items()]
    sharded_state.write(folder, 0, pieces, flat)
    lines = [json.dumps(line, sort_keys=True) + "\n" for line in plan.log if line["step"] <= plan.first]
    log = "".join(lines).encode()
    (work / "attempt-0001" / "training.jsonl").write_bytes(log)
    marker = {"step": plan.first, "state": state, "files": sharded_state.receipts(folder, 1)}
    marker |= {"product": {"training.jsonl": [len(log), sha256_bytes(log)]}}
    (folder / work_checkpoint.MARKER).write_text(json.dumps(work_checkpoint.with_digest(marker)))


def train(plan: Plan, inputs: Mapping[str, Artifact], folder: Path, progress: Progress) -> Path:
    """Resumes the stage in `folder`/work.

    Returns the sealed checkpoint of the last step, which is in there. Raises CheckFailed if the stage ends without
    one.
    """
    out_folder = folder / "out"
    out_folder.mkdir()
    try:
        plan.stage.run(plan.config, inputs, folder / "work", out_folder, StopAtStep(plan.last, progress))
    # A stage has no way to end early, so its report ends it by an exception.
    except StepSealed as sealed:
        return sealed.folder
    raise CheckFailed(f"{plan.end} is published, but its config seals no checkpoint at that step; verify the release")


class StepSealed(Exception):
    """The step is sealed, in `folder`; later steps are not trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class StopAtStep:
    """A stage's report that ends the stage with the product of a step, by StepSealed."""

    lease: int | None = None
    planned_tokens_per_s = 0.0

    def __init__(self, step: int, progress: Progress) -> None:
        self.step, self.send_progress, self.reported_tenth = step, progress, -1

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        tenth = 10 * done // max(self.step, 1)
        # A replay may train thousands of steps, so it reports at most ten times.
        if tenth != self.reported_tenth and done <= self.step:
            self.reported_tenth = tenth
            self.send_progress(
                ", ".join([f"step {done} of {self.step}", *(f"{n} {v:.4g}" for n, v in figures.items())])
            )

    def metric(self, step: int, **values: float) -> None: ...

    def note(self, text: str) -> None:
        self.send_progress(text)

    def slow_rank(self, text: str | None) -> None: ...

    def seal_checkpoint(self, step: int, folder: Path) -> None:
        if step == self.step:
            raise StepSealed(folder)

    def abandon(self, text: str) -> NoReturn:
        raise AtomError(text)


def compare_checkpoints(published: Path, retrained: Path) -> tuple[int, dict[str, float]]:
    """Compares weights and optimizer of two folders of safetensors.

    Returns the number of tensors, and {name: relative difference} of those whose bits differ. The difference is
    infinite for another shape or type, a tensor that one of them lacks, or what is not a number.
    """
    from stages.train.checkpoint import release_checkpoint

    count, different = 0, {}
    for stem in (release_checkpoint.MODEL, release_checkpoint.OPTIMIZER):
        folders = (published, retrained)  # without an optimizer if no step has moved a weight
        published_tensors, retrained_tensors = (
            release_checkpoint.Tensors(f, stem) if any(f.glob(f"{stem}*.safetensors")) else {} for f in folders
        )
        # A tensor that only one of them has is a difference, too.
        names = sorted({*published_tensors, *retrained_tensors})
        count += len(names)
        for name in names:
            difference: float | None = math.inf
            if name in published_tensors and name in retrained_tensors:
                difference = _relative_difference(published_tensors[name], retrained_tensors[name])
            if difference is not None:
                different[name] = difference
    return count, different


def _relative_difference(published: torch.Tensor, retrained: torch.Tensor) -> float | None:
    """Returns the largest difference of two tensors, divided by the largest absolute value of the published one.

    None if the bits are the same; infinite for another shape or type, and for what is not a number.
    """
    import torch

    if published.dtype != retrained.dtype or published.shape != retrained.shape:
        return math.inf
    flat = [tensor.contiguous().flatten() for tensor in (published, retrained)]
    # Bytes, because two zeros of different sign are equal as numbers, and not a number is not equal to itself.
    if torch.equal(*(tensor.view(torch.uint8) for tensor in flat)):
        return None
    a, b = (tensor.double() for tensor in flat)
    largest, scale = float((a - b).abs().max()), float(a.abs().max())
    difference = largest / scale if scale else math.inf
    return difference if math.isfinite(difference) else math.inf


def changed_fields(plan: Plan, retrained: Path) -> tuple[str, ...]:
    """Returns fields of a retrained checkpoint's state.json that differ from the published one."""
    state = json.loads((retrained / "state.json").read_text())
    # The config was compared, `rng` is a sentence, and one token that goes to another expert by rounding changes the
    # shares in `expert_load`, of which the tensors tell more.
    compared = sorted({*state, *plan.end_state} - {"config", "rng", "expert_load"})
    return tuple(name for name in compared if state.get(name) != plan.end_state.get(name))


def first_divergence(plan: Plan, log: Path) -> int | None:
    """Returns the first step whose lines in a retrained log differ from the published log.

    None if none differ, or if no log is published.
    """
    if not plan.log:
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    replayed, published = (_lines_by_step(part, plan) for part in (lines, plan.log))
    steps = sorted({*replayed, *published})
    return next((step for step in steps if replayed.get(step) != published.get(step)), None)


def _lines_by_step(log: Iterable[Mapping[str, Any]], plan: Plan) -> dict[int, list[Mapping[str, Any]]]:
    """Returns {step: its lines} of the steps of a plan.

    Lines in which a phase of post-training sampled answers to measure itself are left out.
    """
    lines: dict[int, list[Mapping[str, Any]]] = {}
    for line in log:
        if plan.first < line["step"] <= plan.last and "validation" not in line:
            lines.setdefault(line["step"], []).append(line)
    return lines


def compare_environments(plan: Plan) -> tuple[tuple[str, ...], str]:
    """Compares the environment here with the one in which the phase was trained.

    Returns a line `name: then, now` for each value that differs, and the fingerprint of the environment here in the
    form that statements have.

    Call it after training, as statements are written: training imports setuptools, which adds the packages that it
    carries to the path, so an earlier list lacks them.
    """
    packages: dict[str, str] = environment.packages()
    description = environment.describe() | {"packages": packages}
    fingerprint = sha256_bytes(canonical({name: description[name] for name in ("python", "packages", "device")}))
    code = code_digests(registry.stages()[plan.stage.name])
    then, now = plan.environment, environment_values(plan.stage.version, code, description)
    names = [name for name in [*then, *sorted({*now} - {*then})] if then.get(name) != now.get(name)]
    return tuple(f"{name}: {then.get(name, 'absent')}, {now.get(name, 'absent')}" for name in names), fingerprint
