"""Cluster profiles: where and with what a run runs. Pure data, never part of a key."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import RecipeError
from pipeline.launch.clean_environment import secret
from pipeline.recipe import explain, find, parse_yaml
from pipeline.stage import Config


class Local(Config):
    """How `atom run` uses this machine."""

    jobs: int = Field(default=2, ge=1, description="ranks that may run at once; each computes with one thread")
    stop_grace_seconds: float = Field(
        default=20, gt=0, description="time that a stopped stage gets to leave a clean folder"
    )


class Power(Config):
    """What the energy estimate is made of."""

    watts_per_core: float = Field(ge=0, description="power of one busy core")
    watts_per_gpu: float = Field(0.0, ge=0, description="power of one busy GPU")


class Prices(Config):
    """What an hour costs, for `atom status` to say what a run has cost so far, and `atom plan` what it will."""

    gpu_hour: float = Field(0.0, ge=0)
    core_hour: float = Field(0.0, ge=0, description="of a busy core")
    currency: str = Field("USD", min_length=1)


class Rate(Config):
    """How fast a GPU trains in one precision."""

    peak_tflops: float = Field(gt=0, description="dense TFLOP/s that the maker states")
    utilisation: float = Field(gt=0, le=1, description="share of the peak that a model's FLOPs are assumed to reach")

    @property
    def flops(self) -> float:
        """FLOP/s of one GPU."""
        return self.peak_tflops * 1e12 * self.utilisation


class Gpu(Config):
    """What `atom plan --cluster` estimates the time of training from; nothing else reads it."""

    name: str = Field(min_length=1)
    fp32: Rate | None = None
    bf16: Rate | None = None
    fp8: Rate | None = Field(None, description="of every kind of FP8")
    source: str = Field(min_length=1, description="where the figures come from, for whoever reads a plan")

    def rate(self, precision: str) -> Rate | None:
        found: Rate | None = getattr(self, _family(precision), None)
        return found

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
    image: str = Field(min_length=1, description="pyxis: an image or a .sqsh file; apptainer: a .sif file")
    mounts: tuple[str, ...] = Field((), description="from:to, or one path for both; $ATOM_HOME is added")
    python: str = Field("python3", description="the interpreter inside")


class Jobs(Config):
    """What jobs of one kind ask Slurm for."""

    partition: str = Field(min_length=1)
    minutes: int = Field(ge=1, description="time limit of one start; a stage that needs more is started again")
    tasks_per_node: int = Field(1, ge=1, description="ranks on one node: as many as it has GPUs")
    gpus_per_node: int = Field(0, ge=0, description="0: none is asked for")
    cpus_per_task: int = Field(1, ge=1)
    memory_gb: float | None = Field(None, gt=0, description="of a node; null: what the partition gives")
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="features that a node must have")
    exclude: str | None = Field(None, description="nodes to stay away from, as Slurm writes lists of them")
    exclusive: bool = False


class Slurm(Config):
    """How `atom submit` uses a cluster."""

    cpu: Jobs = Field(description="data, export and evaluation")
    train: Jobs = Field(description="training and reinforcement learning: a rank for each GPU")
    container: Container | None = None
    python: str | None = Field(None, description="the interpreter on the nodes, without a container; null: this one")
    modules: tuple[str, ...] = Field((), description="environment modules to load")
    setup: tuple[str, ...] = Field((), description="lines of shell before the stage starts")
    environment: dict[str, str] = Field({}, description="variables for the stages, such as NCCL_SOCKET_IFNAME")
    forward: tuple[str, ...] = Field((), description="variables that a job takes over from whoever submits")
    scratch: str | None = Field(None, description="a folder on each node for temporary files")
    free_gb: float = Field(1.0, ge=0, description="space that must be free under $ATOM_HOME and in scratch")
    signal_lead_seconds: int = Field(120, ge=10, description="how long before the time limit a stage is told to save")
    array_size: int = Field(1000, ge=2, description="tasks of a job array; each does several shards if there are more")
    array_tasks: int = Field(256, ge=1, description="tasks of one job array that may run at once")
    restarts: int = Field(3, ge=0, description="attempts that may follow each other without progress")
    notify: str | None = Field(
        None,
        description="command when a stage fails or the last one is done; ATOM_RUN, ATOM_STAGE, ATOM_OUTCOME say what",
    )

    @model_validator(mode="after")
    def _no_secret(self) -> Slurm:
        for name, value in (*((name, "") for name in self.forward), *self.environment.items()):
            if secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, and no secret reaches a job; leave it out, and give MLflow its user "
                    "and password in ~/.mlflow/credentials"
                )
        return self

    def shape(self, stage: str, ranks: int, trains: bool) -> tuple[Jobs, int, int]:
        """(what its job asks for, nodes, ranks on each). Raises RecipeError if the ranks do not fill nodes alike."""
        jobs = self.train if trains else self.cpu
        each = min(ranks, jobs.tasks_per_node)
        if ranks % each:
            raise RecipeError(
                f"stage {stage} has {ranks} ranks, which do not fill nodes of {each} alike; change its cluster.ranks, "
                "or tasks_per_node of the cluster profile"
            )
        return jobs, ranks // each, each


class Profile(Config):
    """One file of `pipeline/clusters/`."""

    name: str
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
    title = f"cluster profile {path.stem}"
    try:
        return Profile.model_validate(parse_yaml(path.read_bytes(), title))
    except ValidationError as error:
        raise explain(error, Profile, title) from None
