"""The script of a Slurm job: `batch.sh.jinja` with the values of a stage, a run and a cluster profile.

It sets up the environment of the profile, runs the stage by srun, and acts on the decision of rank 0 (`Decision` in
rendezvous.py).
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import jinja2

from pipeline.core.errors import Kind
from pipeline.core.lease import RELAUNCH_VARIABLE
from pipeline.core.stage import ServerSearch
from pipeline.core.store import Store
from pipeline.graph.dag import Node
from pipeline.graph.run import RunFolder
from pipeline.launch import bad_nodes, clean_environment, diagnoses, preflight
from pipeline.launch.cluster_profile import Allocation, Resources, Servers, Slurm, options_of
from pipeline.launch.local import JOB_ENVIRONMENT
from pipeline.launch.rendezvous import Decision
from pipeline.launch.slurm_client import Owner

# Seconds before the second relaunch of launches that end within a minute; the third one waits twice as long.
RELAUNCH_PAUSE_SECONDS = 30
# How much earlier than asked for Slurm may signal a job before its time limit.
EARLY_SIGNAL_SECONDS = 60


# Shell that runs a command on the NUMA node of its rank. What it says is quoted by the script's probe of Python.
_BIND = (
    "command -v numactl > /dev/null || { echo 'ranks_per_numa_node of the cluster profile needs numactl, which is not "
    "installed; install it, or leave the setting out' >&2; exit 1; }; "
    'node=$((SLURM_LOCALID / $0)); exec numactl --cpunodebind=$node --membind=$node "$@"'
)


@dataclass(frozen=True)
class BatchScript:
    """The values of the template."""

    # The id of the run, and the name of the stage.
    run: str
    stage: str
    # The options of sbatch by their names without dashes; True for one that takes no value.
    sbatch_options: Mapping[str, str | int | bool]
    # Variables of the process that submits, which are set before the modules.
    forwarded_variables: Mapping[str, str]
    modules: tuple[str, ...]
    # Variables that are set after the modules.
    variables: Mapping[str, str]
    # Lines of shell that the profile runs before the stage.
    setup: tuple[str, ...]
    srun_options: str
    # The shell command for Python, perhaps in a container.
    python: str
    # The folder of the job's pickle and logs, and that of the launches.
    submitit_folder: Path
    launches_folder: Path
    is_array: bool
    # The most restarts without progress.
    restarts: int
    # The folder of the bad nodes, each of which is avoided for so many seconds.
    nodes_folder: Path
    avoid_seconds: int
    # A file of the run; a node that lacks it does not see the home folder.
    run_file: Path
    # True if the container has an image whose variables would take precedence over the job's.
    has_image: bool
    # Variables that the stage needs, unless a module has set them.
    stage_variables: Mapping[str, str] = field(default_factory=dict)
    # The most launches in one allocation after the first, and the seconds that the job must have left for one.
    relaunches: int = 0
    relaunch_seconds: int = 0
    # The number of nodes on which srun runs.
    step_nodes: int = 1
    # The options of srun for nodes and ranks, in a job with spare nodes.
    step_size: str = ""
    # For servers: the folder of the script of the stage's job, with which they end, and the comment of that job.
    served_folder: str = ""
    served_comment: str = ""
    # For servers: the seconds after which each of them asks Slurm for that job again.
    poll_seconds: int = 10
    # For a stage with servers: the job of the first one, which must have started, and the folder of their script.
    server_job: str = ""
    servers_folder: str = ""

    def text(self) -> str:
        """Returns the script, as sbatch takes it."""
        container_variables: tuple[str, ...] = ()
        if self.has_image:
            forwarded = [name for name in self.forwarded_variables if name not in clean_environment.TAKEN_OVER]
            container_variables = (*self.stage_variables, *self.variables, *forwarded)
        return _template().render(
            vars(self),
            non_secret_parts=clean_environment.NON_SECRET_PARTS,
            secret_names=clean_environment.SECRET_NAMES,
            allowed_names=tuple(dict.fromkeys((*clean_environment.ALLOWED, *self.forwarded_variables))),
            container_variables=container_variables,
            decisions={name: Decision[name.upper()] for name in ("sealed", "done", "restart", "relaunch", "failed")},
            relaunch_variable=RELAUNCH_VARIABLE,
            open_files=preflight.OPEN_FILES,
            diagnoses=diagnoses.FAILURES,
            no_home_exit_code=diagnoses.NO_HOME_CODE,
            with_home=shlex.join(
                ["sh", "-c", f'[ -e "$0" ] || exit {diagnoses.NO_HOME_CODE}; exec "$@"', str(self.run_file)]
            ),
            pause_seconds=RELAUNCH_PAUSE_SECONDS,
            check_failed={"kind": Kind.CHECK, "exit_code": Kind.CHECK.exit_code},
            failed_exit_code=Kind.USER.exit_code,
            stopped=Kind.STOPPED,
            moving=Kind.RESTART,
        )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # a script of bash, not HTML: every value is quoted in the template
        loader=jinja2.PackageLoader("pipeline", "launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    return environment.get_template("batch.sh.jinja")


def servers_of(slurm: Slurm, node: Node) -> Servers | None:
    """Returns the servers that are submitted with a node; None without any."""
    return slurm.servers if node.stage.serve is not None and node.stage.takes_servers(node.config) else None


@dataclass(frozen=True)
class RunScripts:
    """Makes the scripts of the jobs of a run.

    Attributes:
        store: The home.
        run: The run.
        slurm: The cluster.
        code: The snapshot of the code to run from.
    """

    store: Store
    run: RunFolder
    slurm: Slurm
    code: Path

    def of_stage(
        self,
        node: Node,
        dependencies: list[str],
        tasks: int = 0,
        server_job: str = "",
    ) -> BatchScript:
        """Returns the script of a node's job, or of the array for its shards.

        Args:
            node: The node.
            dependencies: Ids of the jobs that must succeed before.
            tasks: The number of tasks of the array; 0: the job of the stage.
            server_job: Id of the job of its first server, which must have started.

        Raises:
            RecipeError: The ranks do not fill nodes equally, or a variable to forward looks like a secret.
        """
        needs = node.stage.needs(node.config)
        allocation = self.slurm.allocation(node.name, needs)

        options = _sbatch_options(
            self.slurm,
            allocation.jobs,
            allocation.all_nodes,
            allocation.ranks_per_node,
            allocation.cpus_per_task,
            allocation.requested_gpus_per_node,
        )
        # In Slurm, `afterok` waits for a success, and `after` for a start.
        conditions = [f"afterok:{':'.join(dependencies)}"] if dependencies else []
        conditions += [f"after:{server_job}"] if server_job else []
        if conditions:
            options["dependency"] = ",".join(conditions)
        if tasks:
            options["array"] = f"0-{tasks - 1}%{min(tasks, allocation.jobs.array_tasks or self.slurm.array_tasks)}"
        if allocation.spare_nodes:
            options["no-kill"] = True  # Slurm takes a lost node out of the job, and leaves the job its other nodes

        script = self._script(node, allocation.jobs, "shards" if tasks else "", options)
        # Each task of an array is rank 0 of its own, and would have the first NUMA node.
        if (ranks := allocation.jobs.ranks_per_numa_node) and not tasks:
            script = replace(script, python=f"{shlex.join(['sh', '-c', _BIND, str(ranks)])} {script.python}")
        script = replace(script, stage_variables=needs.environment)
        if not tasks:
            script = self._with_relaunches(script, allocation)
        if not tasks and (servers := servers_of(self.slurm, node)):
            announced = self.run.node_folder(node.name) / "servers" / "announced"
            search = ServerSearch(str(announced), self.run.id, 60.0 * servers.wait_minutes)
            script = replace(
                script,
                variables={**script.variables, **search.variable()},
                server_job=server_job,
                servers_folder=f"/logs/{self.run.id}/{node.name}/servers/submitit/",
            )
        return script

    def of_servers(self, node: Node, servers: Servers, numbers: str, conditions: list[str]) -> BatchScript:
        """Returns the script of an array of a node's servers with these numbers, which end with the stage's job.

        The first server starts before the stage's job, which then finds one and holds no nodes while it waits; the
        others start once the stage's job has started.

        Args:
            node: The node.
            servers: The section of the profile.
            numbers: The numbers, as sbatch takes them.
            conditions: Dependencies in Slurm's notation.
        """
        options = _sbatch_options(self.slurm, servers, 1, 1, servers.cpus_per_task, servers.gpus_per_node)
        options["array"] = numbers
        if conditions:
            options["dependency"] = ",".join(conditions)
        return replace(
            self._script(node, servers, "servers", options),
            served_folder=f"/logs/{self.run.id}/{node.name}/submitit/",
            served_comment=Owner(self.run.id, node.name).comment(node.key),
            poll_seconds=max(10, servers.count),  # all of them together ask Slurm at most once a second
        )

    def _with_relaunches(self, script: BatchScript, allocation: Allocation) -> BatchScript:
        """Returns the script of a stage's job, which may launch its ranks again, with spare nodes beside theirs."""
        if allocation.spare_nodes:
            script = replace(script, step_size=f"--nodes={allocation.nodes} --ntasks={allocation.ranks}")
        seconds = self.slurm.signal_before_limit_seconds + EARLY_SIGNAL_SECONDS
        relaunches = self.slurm.restarts_in_allocation
        return replace(script, relaunches=relaunches, relaunch_seconds=seconds, step_nodes=allocation.nodes)

    def _script(self, node: Node, jobs: Resources, part: str, options: dict[str, str | int | bool]) -> BatchScript:
        """Returns the script of a job.

        Args:
            node: The stage.
            jobs: The resources that the profile gives its jobs.
            part: The part of its Owner: `shards`, `servers`, or empty for the stage's job.
            options: Options of sbatch, beside those that each job has.
        """
        run, store, slurm = self.run, self.store, self.slurm
        variables = {**JOB_ENVIRONMENT, "PYTHONPATH": str(self.code), "PYTHONSAFEPATH": "1"}
        variables["ATOM_HOME"] = str(store.home)
        if slurm.scratch:
            variables["TMPDIR"] = slurm.scratch
        folder = run.node_folder(node.name) / part
        log = folder / "submitit" / ("%A_%a_%t_log.out" if part else "%j_%t_log.out")
        options = {
            "job-name": f"atom-{node.name}" + (f"-{part}" if part else ""),
            "comment": Owner(run.id, node.name, part).comment(node.key),
            **options,
            "output": str(log).replace("%t", "0"),
            "chdir": str(store.home),
        }

        # Not every version of srun takes the cores from sbatch.
        srun = ["--unbuffered", "--output", str(log), "--export=ALL", "--mpi=none", f"--job-name={options['job-name']}"]
        srun += [f"--cpus-per-task={options['cpus-per-task']}", "--kill-on-bad-exit=1"]
        srun += [*_container_options(slurm, store, jobs.srun), *jobs.srun]

        return BatchScript(
            run=run.id,
            stage=node.name,
            sbatch_options=dict(sorted(options.items())),
            forwarded_variables=clean_environment.forwarded_variables(os.environ, slurm.forward),
            modules=slurm.modules,
            variables={**variables, **slurm.environment, **jobs.environment},
            setup=slurm.setup,
            srun_options=shlex.join(srun),
            python=_python(slurm, store),
            submitit_folder=folder / "submitit",
            launches_folder=folder / "ranks",
            is_array=bool(part),
            restarts=slurm.restarts,
            nodes_folder=bad_nodes.folder(store),
            avoid_seconds=slurm.avoid_seconds,
            run_file=run.folder / "run.json",
            # pyxis and Apptainer prefer the variables of an image to the job's.
            has_image=slurm.container is not None and slurm.container.kind != "bubblewrap",
        )


def _sbatch_options(
    slurm: Slurm, jobs: Resources, nodes: int, tasks_per_node: int, cpus_per_task: int, gpus_per_node: int
) -> dict[str, str | int | bool]:
    """Returns the sbatch options of every job of the profile."""
    gpus = f"{jobs.gpu_type}:{gpus_per_node}" if jobs.gpu_type and gpus_per_node else gpus_per_node
    is_exclusive = jobs.exclusive or jobs.whole_nodes
    takes_whole_node = is_exclusive or 0 < gpus_per_node == jobs.gpus_per_node
    memory = f"{round(jobs.memory_gb * 1024)}M" if jobs.memory_gb else None
    if jobs.memory_gb == 0 or (jobs.memory_gb is None and takes_whole_node):
        memory = "0"  # all of the node: Slurm gives even an exclusive job no more than DefMemPerCPU by itself

    options: dict[str, str | int | bool | None] = {
        "partition": jobs.partition,
        "time": jobs.minutes,
        "nodes": nodes,
        "ntasks-per-node": tasks_per_node,
        "cpus-per-task": cpus_per_task,
        "gpus-per-node": gpus or None,
        "mem": memory,
        "exclusive": is_exclusive or None,
        "account": jobs.account,
        "qos": jobs.qos,
        "constraint": jobs.constraint,
        "exclude": jobs.exclude,
        # The processes of the steps get this signal. The script would get it with `B:` before it.
        "signal": f"USR2@{slurm.signal_before_limit_seconds}",
        "export": "NIL",  # a list of names would make Slurm load the login environment, tokens and all
        # Without it, a job whose dependency has failed may stay in the queue for good.
        "kill-on-invalid-dep": "yes",
        # Without it, a job that Slurm starts again may overwrite its log.
        "open-mode": "append",
        "requeue": True,
    }
    return {name: value for name, value in options.items() if value is not None} | options_of(jobs.sbatch)


def _python(slurm: Slurm, store: Store) -> str:
    """Returns the shell command for Python, in the container if there is one."""
    container = slurm.container
    if container is None:
        return shlex.quote(slurm.python or sys.executable)
    if container.kind == "pyxis":
        return f'env "${{job_variables[@]}}" {shlex.quote(container.python)}'
    if container.kind == "apptainer":
        start = shlex.join(["apptainer", "exec", "--nv", "--bind", ",".join(_mounts(slurm, store)), container.image])
        return f'{start} env "${{job_variables[@]}}" {shlex.quote(container.python)}'

    binds: list[str] = []
    for mount in (*_HOST_MOUNTS, *_mounts(slurm, store)):
        source, _, target = mount.partition(":")
        binds += ["--dev-bind", source, target or source]
    return shlex.join([*_BUBBLEWRAP, "--overlay-src", container.image, "--tmp-overlay", "/", *binds, container.python])


# Slurm signals every process of a task: the one that waits for the stage must not end before it. The stage itself sets
# handlers.
_BUBBLEWRAP = ("env", "--ignore-signal=TERM", "--ignore-signal=USR2", "bwrap")
# What Apptainer and enroot take from the host by themselves.
_HOST_MOUNTS = ("/proc", "/sys", "/dev", "/tmp", "/etc/hosts", "/etc/resolv.conf")


def _mounts(slurm: Slurm, store: Store) -> list[str]:
    """Returns the paths of the host that the container sees, as from:to or one path."""
    assert slurm.container is not None, "only a container has mounts"
    mounts = [f"{store.home}:{store.home}"]
    if slurm.scratch:
        mounts.append(f"{slurm.scratch}:{slurm.scratch}")
    return [*mounts, *slurm.container.mounts]


def _container_options(slurm: Slurm, store: Store, profile_options: Iterable[str]) -> list[str]:
    """Returns srun's options for a container by pyxis.

    Args:
        slurm: The profile's section, with the container.
        store: The home, which is mounted.
        profile_options: The profile's own options of srun, which take precedence.
    """
    container = slurm.container
    if container is None or container.kind != "pyxis":
        return []
    options = [f"--container-image={container.image}", f"--container-mounts={','.join(_mounts(slurm, store))}"]
    # Without these, pyxis mounts the user's home folder and runs the entry point of the image, where the site has
    # configured that.
    stated = {name.removeprefix("no-") for name in options_of(profile_options)}
    return options + [f"--no-{name}" for name in ("container-mount-home", "container-entrypoint") if name not in stated]
