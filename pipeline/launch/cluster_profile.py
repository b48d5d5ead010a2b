"""Cluster profiles: where and with what a run runs. Pure data, never part of a key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.core.bounds import Flag, Key, Line, LongLine, Range, Text, Variable, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Renamed
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import explain, find
from pipeline.launch.clean_environment import is_secret


class Local(Config):
    """How `atom run` uses this machine."""

    jobs: Annotated[int, Range(1, 4096)] = Field(
        default=2, description="ranks that may run at once; each computes with one thread"
    )
    stop_grace_seconds: Annotated[float, Range(0, 86_400, above=True)] = Field(
        default=20, description="time that a stopped stage gets to leave a clean folder"
    )


Watts = Annotated[float, Range(0, 1e5)]
Price = Annotated[float, Range(0, 1e6)]


class Power(Config):
    """What the energy estimate is made of."""

    watts_per_core: Watts = Field(description="power of one busy core")
    watts_per_gpu: Watts = Field(0.0, description="power of one busy GPU")


class Prices(Config):
    """What an hour costs, for `atom status` to say what a run has cost so far, and `atom plan` what it will."""

    gpu_hour: Price = 0.0
    core_hour: Price = Field(0.0, description="of a busy core")
    currency: Annotated[str, Words(16)] = "USD"


class Rate(Config):
    """How fast a GPU trains in one precision."""

    peak_tflops: Annotated[float, Range(1e-3, 1e6, "H100 in bf16: 989")] = Field(
        description="dense TFLOP/s that the maker states"
    )
    utilisation: Annotated[float, Range(1e-4, 1, "usual: 0.2 to 0.6")] = Field(
        description="share of the peak that a model's FLOPs are assumed to reach"
    )

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.peak_tflops * 1e12 * self.utilisation


class Gpu(Config):
    """What `atom plan --cluster` estimates the time of training from; nothing else reads it."""

    name: Line
    fp32: Rate | None = None
    bf16: Rate | None = None
    fp8: Rate | None = Field(None, description="of every kind of FP8")
    source: Text = Field(description="where the figures come from, for whoever reads a plan")

    def rate(self, precision: str) -> Rate | None:
        rate: Rate | None = getattr(self, _family(precision), None)
        return rate

    def told(self, precision: str) -> str:
        """The rate in words. It must be there."""
        rate = self.rate(precision)
        assert rate is not None
        return f"{rate.utilisation:g} of {rate.peak_tflops:g} TFLOP/s in {_family(precision)}"


def _family(precision: str) -> str:
    return "fp8" if "fp8" in precision else precision


class Container(Config):
    """What the stages run in. The image holds Python and the packages; our code comes from the frozen snapshot."""

    kind: Literal["pyxis", "apptainer"]
    image: LongLine = Field(description="pyxis: an image or a .sqsh file; apptainer: a .sif file")
    mounts: tuple[LongLine, ...] = Field(
        (), max_length=100, description="from:to, or one path for both; $ATOM_HOME is added"
    )
    python: LongLine = Field("python3", description="the interpreter inside")


SlurmName = Annotated[
    str, Words(200, "name of Slurm, or several with commas between", r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")
]
SlurmExpression = Annotated[
    str, Words(1000, "expression of Slurm: no spaces or quotes", r"[A-Za-z0-9_\[(][^\s'\"\\`$;<>]*")
]


class Jobs(Config):
    """What jobs of one kind ask Slurm for."""

    partition: SlurmName
    minutes: Annotated[int, Range(1, 525_600, "525600 are a year")] = Field(
        description="time limit of one start; a stage that needs more is started again"
    )
    tasks_per_node: Annotated[int, Range(1, 1024)] = Field(1, description="ranks on one node: as many as it has GPUs")
    gpus_per_node: Annotated[int, Range(0, 1024)] = Field(0, description="0: none is asked for")
    cpus_per_task: Annotated[int, Range(1, 4096)] = 1
    memory_gb: Annotated[float, Range(0, 1e6, above=True)] | None = Field(
        None, description="of a node; null: what the partition gives"
    )
    account: SlurmName | None = None
    qos: SlurmName | None = None
    constraint: SlurmExpression | None = Field(None, description="features that a node must have")
    exclude: SlurmExpression | None = Field(None, description="nodes to stay away from, as Slurm writes lists of them")
    exclusive: Flag = False


Value = Annotated[str, Words(4096, empty=True)]


class Slurm(Config):
    """How `atom submit` uses a cluster."""

    cpu: Jobs = Field(description="data, export and evaluation")
    train: Jobs = Field(description="training and reinforcement learning: a rank for each GPU")
    container: Container | None = None
    python: LongLine | None = Field(
        None, description="the interpreter on the nodes, without a container; null: this one"
    )
    modules: tuple[Line, ...] = Field((), max_length=100, description="environment modules to load")
    setup: tuple[Text, ...] = Field((), max_length=100, description="lines of shell before the stage starts")
    environment: dict[Variable, Value] = Field(
        {}, max_length=1000, description="variables for the stages, such as NCCL_SOCKET_IFNAME"
    )
    forward: tuple[Variable, ...] = Field(
        (), max_length=1000, description="variables that a job takes over from whoever submits"
    )
    scratch: LongLine | None = Field(None, description="a folder on each node for temporary files")
    free_gb: Annotated[float, Range(0, 1e9)] = Field(
        1.0, description="space that must be free under $ATOM_HOME and in scratch"
    )
    signal_before_limit_seconds: Annotated[
        int, Range(10, 65_535, "Slurm takes no more than 65535"), Renamed("signal_lead_seconds")
    ] = Field(120, description="how long before the time limit a stage is told to save")
    array_size: Annotated[int, Range(2, 4_000_001, "Slurm's MaxArraySize is at most 4000001")] = Field(
        1000, description="tasks of a job array; each does several shards if there are more"
    )
    array_tasks: Annotated[int, Range(1, 1e6)] = Field(256, description="tasks of one job array that may run at once")
    restarts: Annotated[int, Range(0, 10_000)] = Field(
        3, description="attempts that may follow each other without progress"
    )
    notify: LongLine | None = Field(
        None,
        description="command when a stage fails or the last one is done; ATOM_RUN, ATOM_STAGE, ATOM_OUTCOME say what",
    )

    @model_validator(mode="after")
    def _no_secret(self) -> Slurm:
        for name, value in (*((name, "") for name in self.forward), *self.environment.items()):
            if is_secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, and no secret reaches a job; leave it out, and give MLflow its user "
                    "and password in ~/.mlflow/credentials"
                )
        return self

    def shape(self, stage: str, ranks: int, trains: bool) -> tuple[Jobs, int, int]:
        """(what its job asks for, nodes, ranks on each). Raises RecipeError if the ranks do not fill nodes alike."""
        jobs = self.train if trains else self.cpu
        ranks_per_node = min(ranks, jobs.tasks_per_node)
        if ranks % ranks_per_node:
            raise RecipeError(
                f"stage {stage} has {ranks} ranks, which do not fill nodes of {ranks_per_node} alike; change its "
                "parallelism.ranks, or tasks_per_node of the cluster profile"
            )
        return jobs, ranks // ranks_per_node, ranks_per_node


class Profile(Config):
    """One file of `pipeline/clusters/`."""

    name: Key
    local: Local = Local()
    power: Power
    prices: Prices | None = None
    gpu: Gpu | None = None
    slurm: Slurm | None = None

    def costs(self) -> dict[str, Any] | None:
        """The prices as plain values, for a run to keep."""
        return None if self.prices is None else self.prices.model_dump()

    def cluster(self) -> Slurm:
        """The part for Slurm. Raises RecipeError if there is none."""
        if self.slurm is None:
            raise RecipeError(f"cluster profile {self.name} has no section slurm; `atom run` is for this machine")
        return self.slurm


def load(reference: str) -> Profile:
    """A packaged profile by name, or a file by path. Raises RecipeError in one sentence."""
    path = find(reference, "pipeline.clusters", "cluster profile")
    title = f"cluster profile {escaped(path.stem, 80)}"
    raw = parse_yaml(read_file(path, title), title)
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Profile, title, raw) from None
