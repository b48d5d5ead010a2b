"""The contract of a stage: its config, inputs and report.

A stage is one function from (config, input artifacts) to one sealed folder. It knows nothing of Slurm, MLflow or
the command line, and writes nothing but `work` (its resumable state), `out` (its product) and `report`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any, ClassVar, Generic, Literal, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypeVar

from pipeline.core.store import Artifact, Store

Inputs = Mapping[str, Artifact]


class Config(BaseModel):
    """Base of every recipe section and stage config: unknown fields are errors, values are frozen.

    The text below a field is its description in docs/configuration.md.
    """

    # A command uses few of the classes, and imports all of them.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, defer_build=True)


def operational(default: Any, **rules: Any) -> Any:
    """Returns a config field that says how to run, not what to make.

    It is left out of the key, and must not change the bytes.
    """
    return Field(default, json_schema_extra={"identity": False}, **rules)


def added(default: Any, **rules: Any) -> Any:
    """Returns a config field that was added after keys existed: with its default value it is left out of the key."""
    return Field(default, json_schema_extra={"identity": "unless default"}, **rules)


def identity(config: BaseModel) -> dict[str, Any]:
    """Returns the config as plain JSON without its operational fields: the part that enters the key."""
    fields: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        value, field_metadata = getattr(config, name), info.json_schema_extra
        is_identity = field_metadata.get("identity", True) if isinstance(field_metadata, dict) else True
        if is_identity is False or (is_identity == "unless default" and value == info.default):
            continue
        fields[name] = _to_plain(value)
    return fields


def operation(config: BaseModel) -> dict[str, Any]:
    """Returns the operational fields of the config, with their nesting.

    Only the last part of an absolute path is kept, because statements contain this and are published.
    """
    values = config.model_dump(mode="json")
    fields: dict[str, Any] = {}
    for name, info in type(config).model_fields.items():
        field_metadata, value = info.json_schema_extra, getattr(config, name)
        if isinstance(field_metadata, dict) and field_metadata.get("identity") is False:
            fields[name] = _portable(values[name])
        elif isinstance(value, BaseModel) and (inner := operation(value)):
            fields[name] = inner
    return fields


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_portable(v) for v in value]
    return f"…/{PurePath(value).name}" if isinstance(value, str) and value.startswith("/") else value


def _to_plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return identity(value)
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_plain(v) for v in value]
    return value


class Report(Protocol):
    """Receives the progress of a stage. Timed and machine-dependent figures go here, never into the artifact."""

    # The number of the attempt's lease, equal on every rank: a later attempt at the key has a larger one. None if the
    # caller holds no lease, and so makes one attempt at a time.
    lease: int | None
    # Tokens a second that the plan expects of a stage that trains on GPUs; 0: not planned, or not known to this rank.
    planned_tokens_per_s: float

    def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
        """Reports the progress of the stage with `figures` (loss, tokens_per_s, ...). Cheap: call it freely."""

    def metric(self, step: int, **values: float) -> None:
        """Records one point of each named curve: always in metrics.jsonl, and in MLflow in batches."""

    def note(self, text: str) -> None:
        """Prints one line to the log."""

    def slow_rank(self, text: str | None) -> None:
        """Reports the rank for which the others wait, in one sentence with its node; None: there is no longer one."""

    def seal_checkpoint(self, step: int, folder: Path) -> None:
        """Seals a copy of `folder` as an artifact of its own before the stage is finished: the checkpoint after `step`.

        A checkpoint that is sealed already is compared and kept. Any thread of rank 0 may call it. Raises AtomError if
        the bytes differ from the sealed ones, or if another worker has taken over.
        """

    def abandon(self, text: str) -> NoReturn:
        """Ends the attempt with that sentence, from any thread, while the main thread hangs in a collective.

        The attempt is recorded as failed and the process exits. If the attempt is already ending, only the calling
        thread ends.
        """


@dataclass(frozen=True)
class TrainingEstimate:
    """The resources of a training phase, in tokens and bytes, for each rank and disk.

    If ranks differ, those of the fullest.
    """

    # Steps still to be trained.
    steps: int
    # Tokens of a step, as the batch grows.
    batch_tokens: tuple[int, ...]
    sequence_length: int
    precision: str
    # The layout in words: TP4 PP2 EP32 DP64.
    layout: str
    # FLOPs with those that the backward pass computes again, beside the model's; 1: none.
    recomputed: float
    # Training FLOPs of the model, without recomputation.
    gflop_per_token: float
    # Weights, gradients and optimizer of a rank.
    state_bytes: int
    # Maximum that a rank keeps for the backward pass.
    activation_bytes: int
    # Bytes of one checkpoint, all ranks together.
    checkpoint_bytes: int
    # The number of sealed checkpoints, and of kept work checkpoints.
    release_checkpoints: int
    work_checkpoints: int
    # Steps between work checkpoints.
    checkpoint_interval: int
    order_rows: int
    # Order, and token shards if each is read once.
    data_bytes: int


@dataclass(frozen=True)
class Published:
    """Files of about one size that a release holds in one folder of a repository."""

    # The stages of a recipe share `dataset`.
    repository: Literal["dataset", "model", "checkpoint"]
    folder: str
    files: int
    # Bytes of all of them.
    bytes: int
    # The setting to change if a file is too large; `{files}` stands for the number of files that would do.
    remedy: str = ""


@dataclass(frozen=True)
class ServedWork:
    """The part of a stage's FLOPs that servers in jobs of their own take over.

    Without such servers rank 0 does it, on its GPU or core.
    """

    flops: float
    # FLOP/s of one server GPU.
    gpu_flops: float
    # FLOP/s of one server core.
    cpu_flops: float
    # The ranks compute meanwhile.
    overlaps: bool
    # (bytes of each GPU, bytes of the host) of a server on so many GPUs; without a GPU the first is 0.
    memory: Callable[[int], tuple[int, int]]
    # The basis of gpu_flops, as a clause.
    assumed: str
    # Servers that others run in rank 0's place, each taken for one GPU or core.
    places: int = 1
    # Servers in jobs of their own that do something else for the stage.
    scorers: int = 0


@dataclass(frozen=True)
class Estimate:
    """The resources that a stage needs. None means: not estimated."""

    cpu_seconds: float | None = None
    # The part of cpu_seconds that one process must do; None: all of it, the stage has no shards.
    serial_seconds: float | None = None
    # Seconds of all GPUs together, for a stage that asks for some without training.
    gpu_seconds: float | None = None
    # The basis of gpu_seconds, as a clause.
    assumed: str = ""
    # True if cpu_seconds is that of a small corpus, for a corpus of any size.
    fixed: bool = False
    tokens: int | None = None
    flops: float | None = None
    # Memory of one process, on its GPU if it has one; if several differ, of the fullest.
    memory_bytes: int | None = None
    # Memory of one process beside its GPU.
    host_bytes: int = 0
    # Bytes and files of the artifact.
    disk_bytes: int | None = None
    # At most, beside the artifact, while the stage runs.
    work_bytes: int = 0
    files: int | None = None
    # The files of the artifact that a release holds.
    published: tuple[Published, ...] = ()
    parameters: dict[str, int] = field(default_factory=dict)
    training: TrainingEstimate | None = None
    # The part of flops and cpu_seconds that servers take over.
    served: ServedWork | None = None

    @property
    def published_bytes(self) -> int:
        return sum(files.bytes for files in self.published)


# Compute of a step whose backward pass computes layers again, beside that without: one further forward pass beside
# three units.
RECOMPUTED = 4 / 3


def family(precision: str) -> str:
    """Returns the precisions of equal speed: that of a precision in a cluster profile and an accelerator."""
    return next((name for name in ("fp8", "fp4") if name in precision), precision)


@dataclass(frozen=True)
class Accelerator:
    """The performance of a GPU and its links, as their makers state it.

    Bandwidths in bytes/s; of links, in one direction.
    """

    # FLOP/s of dense matrix products, by family of precisions: fp32, bf16, fp8, fp4.
    peaks: Mapping[str, float]
    memory: float
    nvlink: float
    # GPUs of one domain.
    nvlink_gpus: int
    # Bandwidth for each GPU.
    network: float
    # 0: not stated.
    watts: float = 0.0


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of a training phase by a model, whose relative error on runs that it was not fitted to is known."""

    seconds: float
    median_error: float
    largest_error: float


@dataclass(frozen=True)
class Traffic:
    """Equal collectives of a rank in one step."""

    operation: str
    # The role of the group, and its ranks.
    group: str
    ranks: int
    # Bytes of one call.
    bytes: int
    calls: int


@dataclass(frozen=True)
class RankSimulation:
    """One rank of a training phase, simulated at full size, beside the estimate of it."""

    rank: int
    ranks: int
    # Micro-batches of a step on this rank, and those of the step whose memory and sequence these are.
    micro_batches: int
    simulated_micro_batches: int
    parameters: int
    planned_parameters: int
    state_bytes: int
    planned_state_bytes: int
    # Bytes at the peak, with the state.
    peak_bytes: int
    planned_peak_bytes: int
    # Weights on the host at the peak: the reference of a KL term.
    copies_bytes: int
    planned_copies_bytes: int
    # The traffic of a step with all micro-batches.
    traffic: tuple[Traffic, ...]
    # (operation, group, ranks, bytes, number in a row), in the order of the simulated step.
    sequence: tuple[tuple[str, str, int, int, int], ...]


@dataclass(frozen=True)
class Needs:
    """The demands of a stage on a cluster profile and on a launcher."""

    # Processes.
    ranks: int = 1
    # GPUs of each rank of a stage that does not train, on one node. A rank that trains has one if the profile has any.
    gpus: int = 0
    trains: bool = False
    # Variables that its processes have from their start, unless they are set already.
    environment: Mapping[str, str] = field(default_factory=dict)


# What Megatron imports of torch, and what it takes to load an exported model.
TORCH = ("torch", "torch.distributed._tensor", "torch.distributed.checkpoint")
TRANSFORMERS = (*TORCH, "transformers.modeling_utils", "transformers.models.auto.modeling_auto")

# The guarantee for two attempts at one key: equal bytes, in one environment on CPU; or equal values within a tolerance.
Promise = Literal["bitwise", "numeric"]


@dataclass(frozen=True)
class ServerPlace:
    """One of the servers of a stage, in a job of its own.

    Attributes:
        store: The home.
        key: The key of the stage.
        run: The id of the run.
        launch: The folder of this launch of the job.
        number: The number of the server. A job that is started again has the same one.
    """

    store: Store
    key: str
    run: str
    launch: Path
    number: int

    @property
    def folder(self) -> Path:
        """The folder that all servers of the stage and the stage itself see."""
        return self.launch.parent.parent / "announced"

    @property
    def log(self) -> Path:
        return self.launch / "server.log"

    def ended(self) -> bool:
        """Returns True if the stage has ended, so that nobody will ask for more. Cheap: call it freely."""
        # the job's script creates the file
        return self.store.sealed(self.key) or (self.launch / "ended").exists()

    def ready(self) -> None:
        """Reports that the server answers: a job that got this far is started again however often it dies."""
        (self.launch / "further").touch()


@dataclass(frozen=True)
class ServerSearch:
    """The variable by which a stage finds its servers in jobs of their own, as JSON."""

    folder: str
    run: str
    seconds: float  # that the stage waits while no server is there
    VARIABLE: ClassVar = "ATOM_SERVERS"

    def variable(self) -> dict[str, str]:
        return {self.VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def of_environment(cls) -> ServerSearch | None:
        """Returns the search of this process's environment; None for a stage without such servers."""
        text = os.environ.get(cls.VARIABLE)
        return cls(**json.loads(text)) if text else None


C = TypeVar("C", bound=Config, default=Any)


@dataclass(frozen=True)
class Alternative(Generic[C]):
    """A stage with another layout.

    Attributes:
        config: The config with that layout.
        settings: The settings that a search varies, by their field in the section of the recipe.
        package: A package that it needs and that the project's image lacks.
    """

    config: C
    settings: Mapping[str, Any]
    package: str | None = None


@dataclass(frozen=True)
class Stage(Generic[C]):
    """A registered stage: its name and version are part of every key, so bump `version` when the bytes change.

    Attributes:
        config: The class of its configs, C, which all of its functions take. The engine has a plain `Stage`.
        promise: The guarantee for two attempts at one key.
        obstacle: The reason why a config can be planned but not run, in one sentence; checked before anything starts.
        lack: Anything that this machine lacks to run it, in one sentence; checked likewise, unless jobs run in a
            container.
        ranks: The processes that run it together. Each calls `run` with the same arguments, with RANK, WORLD_SIZE,
            LOCAL_RANK, MASTER_ADDR and MASTER_PORT in its environment (absent for one); rank 0 alone writes `out`.
        trains: True if it updates weights and needs a GPU for each rank.
        gpus: The GPUs that a rank of a stage that does not train needs on its node, as for a server that it starts.
        environment: Variables that libraries read when they start to use a GPU, and that a launcher must therefore set
            before Python starts; one that the profile or the user has set takes precedence.
        libraries: Installed modules that its processes import and that take seconds. A launcher on one machine without
            GPUs imports them once for several stages.
        time: The time of a training phase on GPUs; None: there is no model of it.
        alternatives: The config itself, and then in each layout that fits so many bytes of a GPU, fastest first by that
            model; None: there is no search.
        simulate: Walks a rank's steps on this machine without the memory that they need; None: it cannot be simulated.
        shards: Pieces of work that may run beforehand and in parallel, by `run_shard(config, inputs, work, shard)`.
            Each leaves complete files in `work`; `run` does the missing ones, and makes the same bytes for any number.
        takes_servers: True if servers in jobs of their own can work for it.
        serve: Runs such a server until the stage has ended.
        inspect: Imports what the config names, which planning does not, and returns notes for `atom validate`; raises
            RecipeError for a config that cannot run. It is called before a run, too.
        code: {registry of modules: the modules in it that the config uses}; the registry and the other modules are no
            part of the stage's code.
    """

    name: str
    version: int
    config: type[C]
    run: Callable[[C, Inputs, Path, Path, Report], None]
    promise: Callable[[C], Promise] = lambda config: "bitwise"
    estimate: Callable[[C], Estimate] = lambda config: Estimate()
    obstacle: Callable[[C], str | None] = lambda config: None
    lack: Callable[[C], str | None] = lambda config: None
    ranks: Callable[[C], int] = lambda config: 1
    trains: bool = False
    gpus: Callable[[C], int] = lambda config: 0
    environment: Callable[[C], Mapping[str, str]] = lambda config: {}
    libraries: Sequence[str] = ()
    time: Callable[[C, Accelerator], TrainingTime] | None = None
    alternatives: Callable[[C, Accelerator, float], Iterator[Alternative[C]]] | None = None
    simulate: Callable[[C, int], RankSimulation] | None = None
    shards: Callable[[C], int] = lambda config: 1
    run_shard: Callable[[C, Inputs, Path, int], None] | None = None
    takes_servers: Callable[[C], bool] = lambda config: False
    serve: Callable[[C, ServerPlace], None] | None = None
    inspect: Callable[[C], Sequence[str]] = lambda config: ()
    code: Callable[[C], Mapping[str, Sequence[str]]] = lambda config: {}

    def needs(self, config: C) -> Needs:
        """Returns the demands of a stage of this config."""
        return Needs(self.ranks(config), self.gpus(config), self.trains, self.environment(config))
