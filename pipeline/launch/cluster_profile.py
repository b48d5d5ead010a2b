"""Cluster profiles: the machines and resources of a run. Pure data, never part of a key.

Options of sbatch and srun that a profile adds are written as on the command line: `--reservation=llm`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from pipeline.core.bounds import Flag, Key, Line, LongLine, Range, Text, Variable, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Accelerator, Config, Needs, TrainingTime, family
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import explain, find
from pipeline.graph.run import Prices as RunPrices
from pipeline.launch.clean_environment import is_secret

# Options that have a field in the profile by another name, and that field.
OF_PROFILE = {
    "time": "minutes",
    "ntasks-per-node": "tasks_per_node",
    "mem": "memory_gb",
    "mem-per-cpu": "memory_gb",
    "mem-per-gpu": "memory_gb",
    "signal": "signal_before_limit_seconds",
    "array": "array_size and array_tasks",
}
# And those by the same name.
_OF_PROFILE = "partition cpus-per-task gpus-per-node account qos constraint exclude exclusive"
OF_PROFILE |= {name: name.replace("-", "_") for name in _OF_PROFILE.split()}
# Options of sbatch by which a job would get GPUs that the profile does not know of, or fewer than it states.
GPU_REQUESTS = {"gpus", "gpus-per-task", "gpus-per-socket", "cpus-per-gpu", "ntasks-per-gpu", "tres-per-task"}
# Options that follow from the stage and from how atom starts, watches and stops it.
_OF_ATOM = """
chdir container-image container-mounts dependency error export export-file input jobid kill-on-bad-exit
kill-on-invalid-dep no-kill no-requeue nodes ntasks open-mode output parsable requeue test-only unbuffered wait wrap
"""
OF_ATOM = frozenset(_OF_ATOM.split())


def _addable(word: str) -> str:
    name = name_of(word)
    if name in OF_PROFILE:
        raise ValueError(f"--{name} has a field here; write {OF_PROFILE[name]} instead")
    if name in OF_ATOM:
        raise ValueError(f"--{name} follows from the stage; leave it out")
    return word


def name_of(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


def options_of(words: Iterable[str]) -> dict[str, str | bool]:
    """Returns {name: value} of options, True for one without a value.

    Of two with one name the last counts, as in Slurm.
    """
    return {name_of(word): word.partition("=")[2] if "=" in word else True for word in words}


def gpu_request(words: Iterable[str]) -> str | None:
    """Returns the first of sbatch's options that asks for GPUs, which gpus_per_node states; None without one."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name in GPU_REQUESTS or (name == "gres" and re.search(r"\bgpu\b", value)):
            return word
    return None


_FORM = "long option of Slurm, such as --nice=100, without spaces or quotes"
Option = Annotated[str, Words(1000, _FORM, r"--[a-z][a-z0-9-]*(=[^\s'\"\\`$;<>]+)?"), AfterValidator(_addable)]
Options = Annotated[tuple[Option, ...], Field(max_length=100)]


class Local(Config):
    """Use of this machine by `atom run`."""

    jobs: Annotated[int, Range(1, 4096)] = 2
    """maximum number of ranks that run at once, with one thread each"""
    stop_grace_seconds: Annotated[float, Range(0, 86_400, above=True)] = 20
    """seconds that a stopped stage has to exit before it is killed"""
    memory_gb: Annotated[float, Range(0, 1e6, above=True)] | None = None
    """memory in GiB that `atom plan` counts on; null: all of this machine"""


Watts = Annotated[float, Range(0, 1e5)]
Price = Annotated[float, Range(0, 1e6)]


class Power(Config):
    """Power for the estimates of energy and of training time."""

    watts_per_core: Watts
    """power of one busy CPU core in watts"""
    watts_per_gpu: Watts = 0.0
    """power of one busy GPU in watts, which also decides its clock in estimates"""


class Prices(Config):
    """Prices per hour: `atom status` shows the cost so far, `atom plan` the expected cost."""

    gpu_hour: Price = 0.0
    """price of one GPU hour"""
    core_hour: Price = 0.0
    """price of one hour of a busy CPU core"""
    currency: Annotated[str, Words(16)] = "USD"
    """currency of the prices"""


class Rate(Config):
    """Speed of a GPU in one precision."""

    peak_tflops: Annotated[float, Range(1e-3, 1e6, "H100 in bf16: 989")]
    """dense peak in TFLOP/s, as the manufacturer states it"""
    utilization: Annotated[float, Range(1e-4, 1, "usual: 0.2 to 0.6")] | None = None
    """measured model FLOPs utilization (MFU), as a share of the peak; null: estimated"""

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU."""
        return self.peak_tflops * 1e12


Bandwidth = Annotated[float, Range(1e-3, 1e6)]


class Gpu(Config):
    """Speed and memory of the GPUs, which `atom plan --cluster` uses; `atom submit` refuses what does not fit."""

    name: Line
    """name of the GPU, shown in plans"""
    memory_gb: Annotated[float, Range(0, 1e5, "H100: 79.6, of which CUDA and NCCL take about 3", above=True)] | None = (
        None
    )
    """memory of one GPU in GiB, without what CUDA and NCCL take; null: not limited"""
    fp32: Rate | None = None
    """speed in fp32; null: no estimate"""
    bf16: Rate | None = None
    """speed in bf16; null: no estimate"""
    fp8: Rate | None = None
    """speed in all FP8 precisions; null: no estimate"""
    fp4: Rate | None = None
    """speed in NVFP4; null: the GPU does not have it"""
    memory_tb_s: Bandwidth | None = None
    """bandwidth of the memory in TB/s; H100: 3.35"""
    nvlink_gb_s: Bandwidth | None = None
    """bandwidth of NVLink per GPU in one direction in GB/s; H100: 450"""
    nvlink_gpus: Annotated[int, Range(1, 4096)] = 8
    """GPUs that NVLink connects, of one domain"""
    network_gb_s: Bandwidth | None = None
    """bandwidth of the network per GPU in one direction in GB/s; 400 Gb/s: 50"""
    source: Text
    """where the figures come from, shown in plans"""

    def rate(self, precision: str) -> Rate | None:
        rate: Rate | None = getattr(self, family(precision), None)
        return rate


class Container(Config):
    """Container of the stages, with Python and the packages. The code comes from a snapshot in $ATOM_HOME."""

    kind: Literal["pyxis", "apptainer", "bubblewrap"]
    """container runtime"""
    image: LongLine
    """image or .sqsh file for pyxis, .sif file for apptainer, unpacked folder for bubblewrap"""
    mounts: tuple[LongLine, ...] = Field((), max_length=100)
    """mounts as from:to, or one path for both; $ATOM_HOME and scratch are added"""
    python: LongLine = "python3"
    """Python interpreter in the container"""


SlurmName = Annotated[
    str, Words(200, "name of Slurm, or several with commas between", r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")
]
Value = Annotated[str, Words(4096, empty=True)]
StagePattern = Annotated[str, Words(100, "name of a stage, or a pattern with * and ?", r"[A-Za-z0-9_.*?\[\]-]+")]
SlurmExpression = Annotated[
    str, Words(1000, "expression of Slurm: no spaces or quotes", r"[A-Za-z0-9_\[(][^\s'\"\\`$;<>]*")
]


class Resources(Config):
    """Resources that jobs of one kind request from Slurm."""

    partition: SlurmName
    """Slurm partition, or several"""
    minutes: Annotated[int, Range(1, 525_600, "525600 are a year")]
    """time limit of one start in minutes; a stage that needs more is restarted"""
    gpus_per_node: Annotated[int, Range(0, 1024)] = 0
    """GPUs per node; 0: none"""
    gpu_type: SlurmName | None = None
    """type of the GPUs, as gpu_type:number of --gpus-per-node; null: any"""
    cpus_per_task: Annotated[int, Range(1, 4096)] = 1
    """CPU cores per rank or server"""
    memory_gb: Annotated[float, Range(0, 1e6)] | None = None
    """memory per node in GiB; 0: all of the node; null: all of the node for a job that has the node alone or all of
    its GPUs, else the default of the partition"""
    account: SlurmName | None = None
    """Slurm account; null: the default of the user"""
    qos: SlurmName | None = None
    """Slurm quality of service; null: the default of Slurm"""
    constraint: SlurmExpression | None = None
    """required node features, as for sbatch --constraint"""
    exclude: SlurmExpression | None = None
    """nodes to avoid, as for sbatch --exclude"""
    exclusive: Flag = False
    """do not share nodes with other jobs"""
    whole_nodes: Flag = False
    """request all GPUs of a node, also for fewer ranks, where the site gives nodes whole"""
    sbatch: Options = ()
    """further options of sbatch, such as --reservation=llm, --switches=1 or --licenses=lustre:2"""
    srun: Options = ()
    """further options of srun, such as --cpu-bind=cores or --mem-bind=local"""
    environment: dict[Variable, Value] = Field({}, max_length=1000)
    """environment variables of these jobs, beside those of all"""

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        _require_one_gpu_request(self.sbatch)
        if self.gpu_type is not None and not self.gpus_per_node:
            raise ValueError(f"gpu_type = {self.gpu_type} needs gpus_per_node, which is 0; set it, or remove gpu_type")
        return self


def _require_one_gpu_request(sbatch: Iterable[str]) -> None:
    if word := gpu_request(sbatch):
        raise ValueError(
            f"{word} of sbatch asks for GPUs beside gpus_per_node, by which atom counts them; set gpus_per_node and "
            "gpu_type instead, which Slurm takes for the same request"
        )


class Jobs(Resources):
    """Resources that the jobs of stages request from Slurm."""

    tasks_per_node: Annotated[int, Range(1, 1024)] = 1
    """maximum number of ranks per node; on GPU nodes, one per GPU"""
    ranks_per_numa_node: Annotated[int, Range(1, 1024, "two sockets with four GPUs each: 4")] | None = None
    """binds the cores and memory of so many ranks after another to one NUMA node by numactl, which the nodes need, or
    the image of pyxis; null: no binding"""
    spare_nodes: Annotated[int, Range(0, 1024)] = 0
    """additional idle nodes of a job with several nodes; one replaces a node that is lost; a job that loses its
    first node is requeued"""
    nodes: Annotated[int, Range(1, 1e6)] | None = None
    """nodes of the partition that your jobs can have at once; null: not limited"""
    array_tasks: Annotated[int, Range(1, 1e6)] | None = None
    """maximum number of tasks of a job array that run at once; null: slurm.array_tasks"""


class Changes(Jobs):
    """Other requests for the jobs of some stages; what is left out is as for the jobs of their kind.

    Options and variables are added to those of the kind.
    """

    partition: SlurmName | None = None  # type: ignore[assignment]  # here it may be left out
    """Slurm partition, or several"""
    minutes: Annotated[int, Range(1, 525_600)] | None = None  # type: ignore[assignment]
    """time limit of one start in minutes"""

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        _require_one_gpu_request(self.sbatch)
        return self

    def apply(self, jobs: Jobs) -> Jobs:
        """Returns the jobs with these changes."""
        changed = {name: getattr(self, name) for name in self.model_fields_set}
        added = {name: getattr(jobs, name) + getattr(self, name) for name in ("sbatch", "srun")}
        return jobs.model_copy(update={**changed, **added, "environment": {**jobs.environment, **self.environment}})


class Servers(Resources):
    """Servers for the stages that sample with them, such as vLLM's: a job on one node each, beside the stage's job."""

    count: Annotated[int, Range(1, 10_000)]
    """number of servers"""
    wait_minutes: Annotated[int, Range(1, 525_600)] = 15
    """minutes that the stage waits while there is no server; it works with any number of servers"""


@dataclass(frozen=True)
class Allocation:
    """The nodes of one job, and the ranks on each of them."""

    section: str  # of the profile, in which `jobs` stands
    jobs: Jobs
    nodes: int
    ranks_per_node: int
    gpus_per_rank: int = 1

    @property
    def spare_nodes(self) -> int:
        """Nodes of the job without ranks."""
        return self.jobs.spare_nodes if self.nodes > 1 else 0

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.spare_nodes

    @property
    def gpus_per_node(self) -> int:
        """GPUs that the ranks of a node use."""
        return min(self.ranks_per_node * self.gpus_per_rank, self.jobs.gpus_per_node)

    @property
    def requested_gpus_per_node(self) -> int:
        return self.jobs.gpus_per_node if self.jobs.whole_nodes else self.gpus_per_node

    @property
    def cpus_per_task(self) -> int:
        """Cores of a rank. A rank with several GPUs has those of as many."""
        return self.jobs.cpus_per_task * self.gpus_per_rank

    @property
    def gpus(self) -> int:
        """GPUs of the ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def all_gpus(self) -> int:
        """GPUs of the job, unused ones and those of spare nodes included."""
        return self.all_nodes * self.requested_gpus_per_node

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


class Slurm(Config):
    """Use of a Slurm cluster by `atom submit`."""

    cpu: Jobs
    """jobs of data, export and evaluation stages"""
    train: Jobs
    """jobs of training and reinforcement-learning stages, one rank per GPU"""
    servers: Servers | None = None
    """jobs of servers for stages that sample with vLLM; null: such a stage starts one itself"""
    gpu: Jobs | None = None
    """jobs of other stages that ask for GPUs, such as evaluation by vLLM; null: those of `train`"""
    stages: dict[StagePattern, Changes] = Field({}, max_length=1000)
    """other requests for the jobs of some stages, by the stage's name or a pattern such as evaluate-*"""
    container: Container | None = None
    """container of the stages; null: none"""
    python: LongLine | None = None
    """Python interpreter without a container; null: that of `atom submit`"""
    modules: tuple[Line, ...] = Field((), max_length=100)
    """environment modules to load"""
    setup: tuple[Text, ...] = Field((), max_length=100)
    """shell lines that run before the stage"""
    environment: dict[Variable, Value] = Field({}, max_length=1000)
    """environment variables of the stages, such as NCCL_SOCKET_IFNAME"""
    forward: tuple[Variable, ...] = Field((), max_length=1000)
    """environment variables that jobs inherit from `atom submit`"""
    scratch: LongLine | None = None
    """folder on each node for temporary files; null: the default of the system"""
    free_gb: Annotated[float, Range(0, 1e9)] = 1.0
    """free space in GB that $ATOM_HOME and scratch must have"""
    device_test_share: Annotated[float, Range(0, 1)] = 0.4
    """before training on GPUs: minimum share of the peak in bf16 that a product of matrices must reach on each GPU;
    0: no test of products and collectives"""
    signal_before_limit_seconds: Annotated[int, Range(10, 65_535, "Slurm takes no more than 65535")] = 120
    """seconds before the time limit at which a stage is signaled to save"""
    array_size: Annotated[int, Range(2, 4_000_001, "Slurm's MaxArraySize is at most 4000001")] = 1000
    """maximum number of tasks of a job array; a task may run several shards"""
    array_tasks: Annotated[int, Range(1, 1e6)] = 256
    """maximum number of tasks of a job array that run at once"""
    restarts: Annotated[int, Range(0, 10_000)] = 3
    """maximum number of restarts without progress"""
    restarts_in_allocation: Annotated[int, Range(0, 1000)] = 3
    """of these, those in one allocation without queueing, after a lost rank or node; 0: none"""
    avoid_hours: Annotated[float, Range(0, 8760, "8760 are a year")] = 24.0
    """hours for which a node at which a start failed is avoided; 0: never"""

    @model_validator(mode="after")
    def _no_secret(self) -> Slurm:
        values = [pair for environment in self._environments for pair in environment.items()]
        for name, value in (*((name, "") for name in self.forward), *values):
            if is_secret(name, value):
                raise ValueError(
                    f"{name} looks like a secret, and no secret reaches a job; leave it out, and give MLflow its user "
                    "and password in ~/.mlflow/credentials"
                )
        return self

    @property
    def _environments(self) -> list[dict[str, str]]:
        kinds = [jobs for jobs in (self.cpu, self.train, self.servers, self.gpu) if jobs is not None]
        return [section.environment for section in (self, *kinds, *self.stages.values())]

    @model_validator(mode="after")
    def _signal_within_limit(self) -> Slurm:
        sections = {name: getattr(self, name) for name in ("cpu", "train", "servers", "gpu")}
        sections |= {f"stages.{pattern}": changes for pattern, changes in self.stages.items()}
        for name, jobs in sections.items():
            if jobs and jobs.minutes and 60 * jobs.minutes <= self.signal_before_limit_seconds:
                raise ValueError(
                    f"{name}.minutes = {jobs.minutes} is no longer than signal_before_limit_seconds = "
                    f"{self.signal_before_limit_seconds}, so a job would be stopped as it begins; change one of them"
                )
        return self

    @property
    def avoid_seconds(self) -> int:
        return round(3600 * self.avoid_hours)

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of the variables that jobs inherit or get."""
        return (*self.forward, *(name for environment in self._environments for name in environment))

    def allocation(self, stage: str, needs: Needs) -> Allocation:
        """Returns the allocation of a stage's job. On jobs without GPUs a stage that asks for some runs on cores.

        Raises RecipeError if the ranks do not fill nodes equally, or if a node has too few GPUs for its ranks.
        """
        section = "gpu" if needs.gpus else "cpu"
        if needs.trains or (needs.gpus and self.gpu is None):
            section = "train"
        jobs: Jobs = getattr(self, section)
        for pattern, changes in self.stages.items():
            jobs = changes.apply(jobs) if fnmatchcase(stage, pattern) else jobs
        ranks, ranks_per_node = needs.ranks, min(needs.ranks, jobs.tasks_per_node)
        if ranks % ranks_per_node:
            raise RecipeError(
                f"stage {stage} has {ranks} ranks, which do not fill nodes of {ranks_per_node} alike; change its "
                "parallelism.ranks, or tasks_per_node of the cluster profile"
            )
        if needs.trains and 0 < jobs.gpus_per_node < ranks_per_node:
            raise RecipeError(
                f"stage {stage} has {ranks_per_node} ranks on a node, and slurm.{section}.gpus_per_node is "
                f"{jobs.gpus_per_node}; a rank takes one GPU, so set tasks_per_node of the cluster profile to "
                f"{jobs.gpus_per_node}"
            )
        if 0 < jobs.gpus_per_node < needs.gpus * ranks_per_node:
            raise RecipeError(
                f"stage {stage} asks for {needs.gpus * ranks_per_node} GPUs of one node, and slurm.{section}."
                f"gpus_per_node is {jobs.gpus_per_node}; ask for fewer in the recipe, or correct the cluster profile"
            )
        return Allocation(section, jobs, ranks // ranks_per_node, ranks_per_node, needs.gpus or 1)


class Storage(Config):
    """Space of the storage that the stages may take.

    `atom plan --cluster` compares them with what the stages need, and `atom submit` refuses what does not fit.
    """

    home_gb: Annotated[float, Range(0, 1e9, above=True)] | None = None
    """GB that $ATOM_HOME may hold; null: not limited"""
    home_files: Annotated[int, Range(1, 1e12)] | None = None
    """files that $ATOM_HOME may hold (inodes); null: not limited"""


class Profile(Config):
    """A cluster profile: one file of `pipeline/clusters/`."""

    name: Key
    """name of the profile"""
    local: Local = Local()
    """use of this machine by `atom run`"""
    power: Power
    """power for the estimates of energy and of training time"""
    prices: Prices | None = None
    """prices per hour; null: costs are not shown"""
    gpu: Gpu | None = None
    """speed and memory of the GPUs; null: no estimate of training time, and no limit of memory"""
    storage: Storage = Storage()
    """space of $ATOM_HOME"""
    slurm: Slurm | None = None
    """Slurm cluster, required by `atom submit`"""

    @property
    def accelerator(self) -> Accelerator | None:
        """The figures for a model of the time of a step; None if the profile does not state all of them."""
        gpu = self.gpu
        if gpu is None or gpu.bf16 is None or not (gpu.memory_tb_s and gpu.nvlink_gb_s and gpu.network_gb_s):
            return None
        return Accelerator(
            peaks=self.peaks(),
            memory=gpu.memory_tb_s * 1e12,
            nvlink=gpu.nvlink_gb_s * 1e9,
            nvlink_gpus=gpu.nvlink_gpus,
            network=gpu.network_gb_s * 1e9,
            watts=self.power.watts_per_gpu,
        )

    def training_rate(
        self, precision: str, time: Callable[[Accelerator], TrainingTime] | None
    ) -> Rate | TrainingTime | str:
        """Returns the source of the time of a training phase: a measured rate, or the model of training time, `time`.

        Without either, returns the reason.
        """
        gpu, name = self.gpu, f"cluster profile {self.name}"
        if gpu is None:
            return f"{name} has no section gpu, with peaks and bandwidths"
        if (rate := gpu.rate(precision)) is None:
            return f"{name} has no rate for {precision} in its section gpu"
        if rate.utilization is not None:
            return rate
        without = f"{name} has no utilization for {precision} in its section gpu, and the model of training time"
        if time is None or precision == "fp32":
            return f"{without} knows bf16, FP8 and NVFP4 alone"
        if (accelerator := self.accelerator) is None:
            return f"{without} needs bf16, memory_tb_s, nvlink_gb_s and network_gb_s"
        return time(accelerator)

    @property
    def other_python(self) -> bool:
        """True if jobs run with another Python than the process that submits them."""
        slurm = self.slurm
        return slurm is not None and (slurm.container is not None or slurm.python not in (None, sys.executable))

    def peaks(self) -> dict[str, float]:
        """Returns the FLOP/s of one GPU, by family of precisions; empty if the profile states none."""
        rates = {name: getattr(self.gpu, name, None) for name in ("fp32", "bf16", "fp8", "fp4")}
        return {name: rate.peak for name, rate in rates.items() if rate}

    def costs(self) -> RunPrices | None:
        """Returns the prices as plain values, for the files of a run."""
        p = self.prices
        return {"gpu_hour": p.gpu_hour, "core_hour": p.core_hour, "currency": p.currency} if p else None

    def cluster(self) -> Slurm:
        """Returns the part for Slurm. Raises RecipeError if there is none."""
        if self.slurm is None:
            raise RecipeError(f"cluster profile {self.name} has no section slurm; `atom run` is for this machine")
        return self.slurm


def load(reference: str) -> Profile:
    """Loads a profile by its name (its file name without `.yaml`) or by its path. Raises RecipeError.

    Names are looked up in pipeline/clusters.
    """
    path = find(reference, "pipeline.clusters", "cluster profile")
    title = f"cluster profile {escaped(path.stem, 80)}"
    raw = parse_yaml(read_file(path, title), title)
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Profile, title, raw) from None
