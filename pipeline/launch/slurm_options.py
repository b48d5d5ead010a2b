"""Options of sbatch and srun that a cluster profile adds, written as on the command line: `--reservation=llm`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.core.bounds import Words

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
