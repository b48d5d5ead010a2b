"""`atom replay`: trains published steps of a release again, from its published files alone, and compares every tensor.

    atom replay runs/releases/atom-smoke-0.1.0 pretrain --steps 30:60

The kept documents are tokenized again, the checkpoint after step A is laid down as a work checkpoint beside the log up
to there, and the stage that trained the phase goes on from it as after a kill, by the published order, until step B is
sealed. Learning rate, spikes and data are then those of the whole phase. Nothing of the release is unpickled: it is
read as safetensors, JSON and Parquet, and each file only if it has the digest of `SHA256SUMS`. Nothing of it is
executed either, unless today's code is another than that which trained it: then the code that it carries does all of
this, see release/audit/replay_carried.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.core import environment, provenance
from pipeline.core.code_digests import code_digests
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import Artifact, canonical, sha256_bytes, write_manifest
from pipeline.graph import registry
from release import schema, scratch
from release.audit import replay_carried
from release.audit.replay_report import BITWISE, CLOSE, DIFFERS, TOLERANCE, Replay
from release.audit.replay_source import Source
from release.layout import WITHOUT_ORDER, when

if TYPE_CHECKING:
    import torch

    from stages.train.config import TrainConfig

VARIABLES = "device variables"
"""How a replay calls the variables that steer arithmetic, among the differences of the environment."""
STAGES = ("pretrain", "midtrain", "sft")
NEEDS = ("torch", "megatron", "datatrove", "tokenizers")
PATIENCE = 7 * 86_400.0  # one process may need long for a step of many; nobody waits for a rank here


def replay(
    release: Path,
    phase: str,
    first: int | None = None,
    last: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
    unconfined: bool = False,
) -> Replay:
    """Trains the steps after `first` up to `last` again; both are steps of published checkpoints, the last two if None.

    Raises AtomError if there is no such phase or step, CheckFailed if a file is not what SHA256SUMS says, if the files
    do not say how the phase was trained, or if the kept documents do not give the token shards of the release.

    unconfined: run code that the release carries, if it comes to that, without bubblewrap.
    """
    if missing_module := next((name for name in NEEDS if importlib.util.find_spec(name) is None), None):
        raise AtomError(f"replaying trains, which needs {missing_module}; install atom-release[train,data]")
    source = Source(release)
    first, last = _steps(source, phase, first, last)
    progress("hashing checkpoints and evidence")
    code = replay_carried.find(source, phase, last)
    with scratch.folder() as temporary:
        folder = temporary.resolve()
        if code is not None:
            return _replay_by_carried_code(code, phase, first, last, folder, unconfined, progress)
        try:
            plan = Plan(source, phase, first, last)
            progress("tokenizing the kept documents")
            tokens = plan.tokens(folder)
            plan.lay_down(folder / "work")
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # evidence can be written by anyone
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise CheckFailed(
                f"{release} does not say how {phase} came to step {last} ({reason}); verify it"
            ) from error
        progress(f"training steps {first + 1} to {last}")
        retrained = _train(plan, {"tokens": tokens, "order": plan.order()}, folder, progress)
        progress("comparing")
        tensors, different = _compare(source.folder / plan.end, retrained)
        state, diverges = plan.otherwise(retrained)
    verdict = _verdict(different, state)
    materials = plan.files(plan.start) | source.digests(*plan.order_files)
    materials |= {f"{tokens.key}/{row.path}": row.sha256 for row in tokens.rows}
    outcome = (phase, first, last, verdict, tensors, different, state, diverges, plan.ranks)
    return Replay(*outcome, *plan.changes(), materials, plan.files(plan.end))


def _verdict(different: Mapping[str, float], state: Sequence[str]) -> str:
    if state or max(different.values(), default=0.0) > TOLERANCE:
        return DIFFERS
    return CLOSE if different else BITWISE


def _replay_by_carried_code(
    code: replay_carried.Code,
    phase: str,
    first: int,
    last: int,
    folder: Path,
    unconfined: bool,
    progress: Callable[[str], None],
) -> Replay:
    result = replay_carried.run(code, phase, first, last, folder, unconfined, progress)
    progress("comparing")
    end = f"checkpoints/{phase}-step-{last}"
    for path in result["subject"]:
        code.source.file(path)
    tensors, different = _compare(code.source.folder / end, result["made"])
    state = tuple(result["state"])
    outcome = (phase, first, last, _verdict(different, state), tensors, different, state, result["diverges"])
    differences = result["environment"]
    if (variables := environment.arithmetic()) and not any(text.startswith(VARIABLES) for text in differences):
        differences = [*differences, f"{VARIABLES}: absent, {variables}"]  # carried code may know nothing of them
    trained_in = (result["ranks"], tuple(differences), result["fingerprint"])
    return Replay(*outcome, *trained_in, result["materials"], result["subject"], code=f"sha256:{code.digest}")


def replay_into(release: Path, phase: str, first: int, last: int, folder: Path) -> None:
    """Replays steps as the code that a release carries, for `replay_carried.run`: trains them in `folder`, and writes
    there, as result.json, what its FIELDS names. Prints each line of progress after `ATOM`."""

    def show(text: str) -> None:
        print("ATOM " + " ".join(text.split()), flush=True)

    plan = Plan(Source(release), phase, first, last)
    show("tokenizing the kept documents")
    tokens = plan.tokens(folder)
    plan.lay_down(folder / "work")
    show(f"training steps {first + 1} to {last}")
    retrained = _train(plan, {"tokens": tokens, "order": plan.order()}, folder, show)
    state, diverges = plan.otherwise(retrained)
    differences, fingerprint = plan.changes()
    materials = plan.files(plan.start) | plan.source.digests(*plan.order_files)
    materials |= {f"{tokens.key}/{row.path}": row.sha256 for row in tokens.rows}
    result = {
        "made": str(retrained.relative_to(folder)), "state": list(state), "diverges": diverges, "ranks": plan.ranks,
        "environment": list(differences), "fingerprint": fingerprint, "materials": materials,
        "subject": plan.files(plan.end),
    }  # fmt: skip
    (folder / replay_carried.RESULT).write_text(json.dumps(result))


def _steps(source: Source, phase: str, first: int | None, last: int | None) -> tuple[int, int]:
    """The steps to go from and to. Raises AtomError with those that are there."""
    steps_by_phase: dict[str, list[int]] = {}
    for path in source.sums:
        if match := re.fullmatch(r"checkpoints/([a-z0-9-]+)-step-(0|[1-9]\d{0,11})/state\.json", path):
            steps_by_phase.setdefault(match[1], []).append(int(match[2]))
    phase_name = schema.reader(source.folder).phase
    ordered = ", ".join(
        sorted(
            (name for name in steps_by_phase if phase_name(name) not in WITHOUT_ORDER),
            key=lambda n: when(phase_name(n)),
        )
    )
    if phase_name(phase) in WITHOUT_ORDER:
        raise AtomError(f"{phase} draws what it learns from; replay covers phases with a data order: {ordered}")
    if phase not in steps_by_phase:
        raise AtomError(f"the release has no checkpoints of {phase}; replay can do {ordered}")
    steps = sorted(steps_by_phase[phase])
    end = steps[-1] if last is None else last
    start = max((step for step in steps if step < end), default=-1) if first is None else first
    if start not in steps or end not in steps or start >= end:
        requested = f"steps {start}:{end}" if start >= 0 else f"what leads to step {end}"
        published_steps = ", ".join(map(str, steps))
        raise AtomError(
            f"{requested} of {phase} cannot be replayed: its published checkpoints stand after steps "
            f"{published_steps}; give two of them, the earlier one first"
        )
    return start, end


class Plan:
    """How a phase came from one published checkpoint to another, as its state and the statements say. Raises AtomError
    or CheckFailed, and KeyError, TypeError or ValueError where a file lacks what it should have."""

    def __init__(self, source: Source, phase: str, first: int, last: int) -> None:
        from stages.data.table import ORDER, read_table
        from stages.mcore.parallel_layout import Layout
        from stages.train.config import TrainConfig

        self.source, self.phase, self.first, self.last = source, phase, first, last
        self.start, self.end = (f"checkpoints/{phase}-step-{step}" for step in (first, last))
        for path in (*self.files(self.start), *self.files(self.end)):
            source.file(path)
        self.start_state, self.end_state = (
            source.json(f"{checkpoint}/state.json") for checkpoint in (self.start, self.end)
        )
        for checkpoint, state, step in ((self.start, self.start_state, first), (self.end, self.end_state, last)):
            if (state["phase"], state["step"]) != (phase, step):
                raise CheckFailed(f"{checkpoint}/state.json is of step {state['step']} of {state['phase']}")
        (start_key, start_statement), (key, self.body) = self._statement_of(self.start), self._statement_of(self.end)
        self.materials, run = provenance.material_keys(self.body), provenance.phase_of(self.body) or key
        if run != (provenance.phase_of(start_statement) or start_key) and start_key != self.materials.get("continue"):
            raise AtomError(
                f"steps {first}:{last} of {phase} were trained by two runs, with settings of their own; replay up to "
                "the step where the second began, and then from there"
            )
        parameters = self.body["predicate"]["buildDefinition"]["externalParameters"]
        if (
            parameters["stage"] not in STAGES
            or parameters["node"].split("@")[0] != phase
            or parameters["config"] != self.end_state["config"]
        ):
            raise CheckFailed(f"{self.end}/state.json is not of the config that the statement about {key} names")
        self.stage = registry.stage(parameters["stage"])
        self.recorded = _environment_values(
            parameters["version"], provenance.code_of(self.body), provenance.environment_of(self.body)
        )
        clusters = [operation["phase"]["parallelism"] for operation in provenance.operations_of(self.body)]
        self.ranks = max(cluster["ranks"] for cluster in clusters)
        config = TrainConfig.model_validate(parameters["config"])
        overrides: dict[str, Any] = {"watchdog_timeout_seconds": PATIENCE, "checkpoint_interval": config.phase.steps}
        overrides |= {"parallelism": Layout.model_validate(clusters[-1]) if self.ranks == 1 else Layout()}
        self.config: TrainConfig = config.model_copy(update={"phase": config.phase.model_copy(update=overrides)})
        order, log = self.materials["order"], source.place(key, "training.jsonl")
        table, meta = (source.copy(order, name) for name in ("order.parquet", "meta.json"))
        read_table(table, list(ORDER), [("step", "=", last)])
        self.order_files = [path.relative_to(source.folder).as_posix() for path in (table, meta)]
        self.log = [json.loads(line) for line in source.file(log).read_text().splitlines()] if log else []
        phase_start = int(json.loads(meta.read_bytes()).get("first_step", 1)) - 1
        if log is None and first > phase_start:
            raise AtomError(
                f"the log of {run} is not in the release; replay it from step {phase_start}, where it began"
            )

    def _statement_of(self, checkpoint: str) -> tuple[str, dict[str, Any]]:
        return self.source.statement(self.source.origins[f"{checkpoint}/state.json"]["artifact"])

    def files(self, checkpoint: str) -> dict[str, str]:
        """{path: sha256} of a published checkpoint: its tensors, their index if they are split, and state.json."""
        digests = self.source.digests(checkpoint)
        return {path: digest for path, digest in digests.items() if path.endswith((".safetensors", ".json"))}

    def order(self) -> Artifact:
        """The published order, where it lies."""
        return Artifact(self.materials["order"], "", (self.source.folder / self.order_files[0]).parent, ())

    def tokens(self, folder: Path) -> Artifact:
        """The token shards of the sources that the phase reads, made again and compared with the manifest."""
        source, key = self.source, self.materials["tokens"]
        node, mix = source.manifests[key][0], self.config.phase.mix
        _, body = source.statement(node)
        materials = provenance.material_keys(body)
        digest = source.listed(materials["tokenizer"])["tokenizer.json"]  # it stands in each model's repository
        encoder = next(
            (path for path, d in source.sums.items() if d == digest and path.endswith("/tokenizer.json")),
            f"tokenizer.json of {node}",
        )
        kept_folder, out, work = folder / "dedup" / "kept", folder / "tokens", folder / "shards"
        for directory in (kept_folder, out, work):
            directory.mkdir(parents=True)
        for name in sorted(mix):
            file = source.copy(materials["dedup"], f"kept/{name}.parquet")
            (kept_folder / file.name).symlink_to(file)
        folders = {"dedup": kept_folder.parent, "tokenizer": source.file(encoder).parent}
        inputs = {role: Artifact(materials[role], "", path, ()) for role, path in folders.items()}
        stage = registry.stage("tokenize")
        config = stage.config.model_validate(body["predicate"]["buildDefinition"]["externalParameters"]["config"])
        stage.run(config, inputs, work, out, _StopAtStep(-1, lambda text: None))
        for name in ("documents.parquet", "meta.json"):  # of all sources, as published
            shutil.copyfile(source.copy(key, name), out / name)
        artifact = write_manifest(out, key)
        shards = {row.path: row.sha256 for row in artifact.rows if "/" in row.path}
        expected = {path: d for path, d in source.listed(key).items() if "/" in path and Path(path).stem in mix}
        if mismatches := sorted(path for path in {*shards, *expected} if shards.get(path) != expected.get(path)):
            raise CheckFailed(
                f"the kept documents do not give the token shards that were trained on: {mismatches[0]} is not the "
                f"file that evidence/manifests/{node}.json lists ({len(mismatches)} of {len(expected)} are not); "
                "documents, tokenizer or manifest were changed"
            )
        return artifact

    def lay_down(self, work: Path) -> None:
        """The published checkpoint and the log up to it, as an attempt leaves them that was killed there."""
        from stages.mcore.model import check_tensors
        from stages.mcore.param_names import BUFFERS
        from stages.train.checkpoint import release_checkpoint, sharded_state
        from stages.train.checkpoint import work_checkpoint as checkpoint
        from stages.train.engine import MOMENTS, Piece

        published = self.source.folder / self.start
        shapes, tensors = self.config.model.shapes(self.config.padded_vocab_size), release_checkpoint.Tensors(published)
        check_tensors(shapes, tensors.shapes(), self.start)
        flat = {f"weight.{name}": tensor.flatten() for name, tensor in tensors.items()}
        if self.start_state["optimizer_step"]:
            moments = release_checkpoint.Tensors(published, release_checkpoint.OPTIMIZER)
            moment_shapes = {
                f"{k}.{n}": shape for k in MOMENTS for n, shape in shapes.items() if not n.endswith(BUFFERS)
            }
            check_tensors(moment_shapes, moments.shapes(), self.start)
            flat |= {name: tensor.flatten() for name, tensor in moments.items()}
        folder = work / "attempt-0001" / "checkpoints" / f"step-{self.first:09d}"
        folder.mkdir(parents=True)
        pieces = [Piece(n, (tuple((0, size) for size in s),), 0, math.prod(s)) for n, s in shapes.items()]
        sharded_state.write(folder, 0, pieces, flat)
        lines = [json.dumps(line, sort_keys=True) + "\n" for line in self.log if line["step"] <= self.first]
        log = "".join(lines).encode()
        (work / "attempt-0001" / "training.jsonl").write_bytes(log)
        marker = {"step": self.first, "state": self.start_state, "files": sharded_state.receipts(folder, 1)}
        marker |= {"product": {"training.jsonl": [len(log), sha256_bytes(log)]}}
        (folder / checkpoint.MARKER).write_text(json.dumps(checkpoint.with_digest(marker)))

    def otherwise(self, retrained: Path) -> tuple[tuple[str, ...], int | None]:
        """Fields of state.json, and the first step in the log, that came out otherwise than published."""
        state = json.loads((retrained / "state.json").read_text())
        compared = sorted({*state, *self.end_state} - {"config", "rng"})  # the config was compared, `rng` is a sentence
        fields = tuple(name for name in compared if state.get(name) != self.end_state.get(name))
        if not self.log:
            return fields, None
        lines = [json.loads(line) for line in (retrained.parent.parent / "training.jsonl").read_text().splitlines()]
        replayed, published = (_by_step(log, self.first, self.last) for log in (lines, self.log))
        differ = (step for step in sorted({*replayed, *published}) if replayed.get(step) != published.get(step))
        return fields, next(differ, None)

    def changes(self) -> tuple[tuple[str, ...], str]:
        """What is another here than when the phase was trained, each `name: then, now`; and the fingerprint of the
        environment here, as statements have it. To be asked after training, as they are: that imports setuptools, which
        adds the packages that it carries to the path, so a list that was made before lacks them."""
        packages: dict[str, str] = environment.packages()
        description = environment.describe() | {"packages": packages}
        fingerprint = sha256_bytes(canonical({name: description[name] for name in ("python", "packages", "device")}))
        recorded, code = self.recorded, code_digests(registry.stages()[self.stage.name])
        current = _environment_values(self.stage.version, code, description)
        names = [
            name for name in [*recorded, *sorted({*current} - {*recorded})] if recorded.get(name) != current.get(name)
        ]
        return tuple(
            f"{name}: {recorded.get(name, 'absent')}, {current.get(name, 'absent')}" for name in names
        ), fingerprint


def _by_step(log: list[Any], first: int, last: int) -> dict[int, list[Any]]:
    """The lines of the steps after `first` up to `last`."""
    lines_by_step: dict[int, list[Any]] = {}
    for line in log:
        if first < line["step"] <= last:
            lines_by_step.setdefault(line["step"], []).append(line)
    return lines_by_step


def _environment_values(version: int, code: Mapping[str, str], description: Mapping[str, Any]) -> dict[str, str]:
    """{name: value}, what matters most first."""
    values = {"stage version": str(version), "python": description["python"]}
    values |= {f"device {name}": str(value) for name, value in sorted(description["device"].items())}
    values |= {f"code of {name}": digest[:12] for name, digest in sorted(code.items())}
    return values | dict(sorted(description["packages"].items()))


class _StepSealed(Exception):
    """The step is sealed, in `folder`; what would come after it is not trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder


class _StopAtStep:
    """A report that ends the stage with the product of a step."""

    lease: int | None = None

    def __init__(self, step: int, progress: Callable[[str], None]) -> None:
        self.step, self.send_progress, self.shown = step, progress, -1

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        tenth = 10 * done // max(self.step, 1)
        if tenth != self.shown and done <= self.step:
            self.shown = tenth
            self.send_progress(
                ", ".join([f"step {done} of {self.step}", *(f"{n} {v:.4g}" for n, v in figures.items())])
            )

    def metric(self, step: int, **values: float) -> None: ...

    def note(self, text: str) -> None:
        self.send_progress(text)

    def seal_checkpoint(self, step: int, folder: Path) -> None:
        if step == self.step:
            raise _StepSealed(folder)

    def abandon(self, text: str) -> NoReturn:
        raise AtomError(text)


def _train(plan: Plan, inputs: Mapping[str, Artifact], folder: Path, progress: Callable[[str], None]) -> Path:
    """Goes on in `folder`/work. Returns the sealed checkpoint of the plan's last step, which lies there."""
    out_folder = folder / "out"
    out_folder.mkdir()
    try:
        plan.stage.run(plan.config, inputs, folder / "work", out_folder, _StopAtStep(plan.last, progress))
    except _StepSealed as sealed:
        return sealed.folder
    raise CheckFailed(f"{plan.end} is published, but by its config no checkpoint is sealed there; verify the release")


def _compare(published: Path, retrained: Path) -> tuple[int, dict[str, float]]:
    """How many tensors two checkpoints have, and the relative differences of those whose bits differ."""
    from stages.train.checkpoint import release_checkpoint

    count, different = 0, {}
    for stem in (release_checkpoint.MODEL, release_checkpoint.OPTIMIZER):
        folders = (published, retrained)  # without an optimizer if no step has moved a weight
        published_tensors, retrained_tensors = (
            release_checkpoint.Tensors(f, stem) if any(f.glob(f"{stem}*.safetensors")) else {} for f in folders
        )
        count += len({*published_tensors, *retrained_tensors})
        for name in sorted({*published_tensors, *retrained_tensors}):
            difference: float | None = math.inf
            if name in published_tensors and name in retrained_tensors:
                difference = _relative_difference(published_tensors[name], retrained_tensors[name])
            if difference is not None:
                different[name] = difference
    return count, different


def _relative_difference(published: torch.Tensor, retrained: torch.Tensor) -> float | None:
    """The largest difference over the published largest absolute value, inf for another shape or what is no number;
    None if the bits are the same."""
    import torch

    if published.dtype != retrained.dtype or published.shape != retrained.shape:
        return math.inf
    flat = [tensor.contiguous().flatten() for tensor in (published, retrained)]
    if torch.equal(*(tensor.view(torch.uint8) for tensor in flat)):
        return None
    a, b = (tensor.double() for tensor in flat)
    largest, scale = float((a - b).abs().max()), float(a.abs().max())
    difference = largest / scale if scale else math.inf
    return difference if math.isfinite(difference) else math.inf
