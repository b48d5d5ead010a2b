"""A cluster profile of one's own: a packaged one with the partitions, nodes and account that Slurm names here."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from pipeline.core.errors import AtomError
from pipeline.core.process import user_name
from pipeline.core.text import escaped
from pipeline.core.yaml_text import parse_yaml, read_file
from pipeline.graph.recipe import explain, find
from pipeline.launch import slurm_client
from pipeline.launch.cluster_profile import Profile

HEAD = """\
# Written by `atom init` from {like} and from what Slurm says of its partitions. `gpu`, `power`, `prices` and `storage`
# are those of {like}: change them if yours differ. docs/configuration.md explains every setting, and
# docs/tutorials/cluster.md what a site may need beside these: modules, mounts, network interfaces, further options.
"""
KIND = "cluster profile"
# Partition, nodes, CPUs and MB of a node, time limit, generic resources.
FORMAT = "%R|%D|%c|%m|%l|%G"
# What a packaged profile has of the site that it describes.
OF_SITE = ("account", "qos", "constraint", "exclude")
OF_SITE_SLURM = ("scratch", "modules", "setup")
OF_SITE_NETWORK = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "NCCL_IB_HCA")
# Memory that the system of a node needs, as a share.
SYSTEM_SHARE = 0.05


@dataclass(frozen=True)
class Partition:
    """The equal nodes of a partition.

    Attributes:
        name: Name of the partition.
        nodes: Number of its nodes.
        cpus: CPUs of a node.
        memory_gb: Memory of a node in GiB.
        minutes: Longest time limit; None: unlimited.
        gpus: GPUs of a node.
    """

    name: str
    nodes: int
    cpus: int
    memory_gb: float
    minutes: int | None
    gpus: int


def partitions() -> list[Partition]:
    """Returns the partitions that Slurm names. Raises NoAnswer."""
    rows = []
    for line in slurm_client.run_command("sinfo", "-h", "-o", FORMAT).splitlines():
        name, nodes, cpus, megabytes, limit, resources = line.strip().split("|", 5)
        # Of nodes that differ, Slurm shows the least with a plus.
        numbers = [int(text.rstrip("+")) for text in (nodes, cpus, megabytes)]
        gpus = sum(int(number) for number in re.findall(r"\bgpu:(?:[^:,(]+:)?(\d+)", resources))
        rows.append(Partition(name, numbers[0], numbers[1], numbers[2] / 1024, _minutes(limit), gpus))
    return rows


def _minutes(limit: str) -> int | None:
    """Returns a time limit of Slurm, [days-]hours:minutes:seconds or minutes:seconds, in minutes."""
    if not limit[:1].isdigit():
        return None
    days, _, rest = limit.rpartition("-")
    hours, minutes, _ = ["0", *rest.split(":")][-3:]
    return (int(days or 0) * 24 + int(hours)) * 60 + int(minutes)


def write_profile(path: Path, like: str, image: str | None, sampling_ranks: int) -> Path:
    """Writes a profile for this cluster. Returns its path.

    Args:
        path: The file, which must not exist.
        like: The packaged profile to begin with.
        image: The container's image; None: that of the packaged profile.
        sampling_ranks: Most ranks of a phase beside which servers run; 0: none.

    Raises:
        AtomError: Slurm does not answer, has no GPUs, or too few nodes; or the file exists or cannot be written.
    """
    body = parse_yaml(read_file(find(like, "pipeline.clusters", KIND), KIND), KIND)
    if "servers" not in body.get("slurm", {}):
        raise AtomError(
            f"{escaped(like, 80)} is a profile without servers on Slurm; begin with h100-pyxis, for example"
        )
    known = partitions()
    train = max(known, key=lambda row: row.gpus * row.nodes, default=None)
    if train is None or not train.gpus:
        raise AtomError("sinfo shows no partition with GPUs; ask your site for its name, and copy a packaged profile")
    plain = max((row for row in known if not row.gpus), key=lambda row: row.nodes, default=train)
    left = train.nodes - -(-sampling_ranks // train.gpus)
    if sampling_ranks and left < 1:
        raise AtomError(
            f"{sampling_ranks} ranks take all {train.nodes} nodes of partition {train.name}, and the servers that "
            f"sample beside them need one; use at most --ranks {(train.nodes - 1) * train.gpus}"
        )
    body["name"] = path.stem
    slurm, account = body["slurm"], _account()
    for section, row in (("cpu", plain), ("train", train), ("gpu", train), ("servers", train)):
        jobs = slurm[section]
        for name in OF_SITE:
            jobs.pop(name, None)
        jobs |= {"partition": row.name, "minutes": min(jobs["minutes"], row.minutes or jobs["minutes"])}
        jobs |= {"account": account} if account else {}
        if "memory_gb" in jobs:
            jobs["memory_gb"] = int(min(jobs["memory_gb"], row.memory_gb * (1 - SYSTEM_SHARE)))
    slurm["cpu"]["cpus_per_task"] = min(slurm["cpu"]["cpus_per_task"], plain.cpus)
    each = max(1, train.cpus // train.gpus)
    slurm["train"] |= {"tasks_per_node": train.gpus, "nodes": train.nodes}
    for section, cpus in (("train", each), ("gpu", each), ("servers", train.cpus)):
        slurm[section] |= {"gpus_per_node": train.gpus, "cpus_per_task": cpus}
    slurm["servers"]["count"] = max(1, min(slurm["servers"]["count"], left))
    for name in OF_SITE_SLURM:
        slurm.pop(name, None)
    for name in OF_SITE_NETWORK:
        slurm["environment"].pop(name, None)
    if container := slurm.get("container"):
        container.pop("mounts", None)
        container["image"] = image or container["image"]
    try:
        Profile.model_validate(body)
    except ValidationError as error:
        raise explain(error, Profile, f"{KIND} {escaped(path.stem, 80)}") from None
    text = HEAD.format(like=like) + yaml.safe_dump(body, sort_keys=False)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise AtomError(f"{escaped(str(path))} exists, and is not overwritten; choose another name") from None
    except OSError as error:
        raise AtomError(f"{escaped(str(path))} cannot be written ({error.strerror}); go to another folder") from None
    return path


def _account() -> str:
    """Returns the default account of the user; empty if Slurm names none."""
    try:
        answer = slurm_client.run_command(
            "sacctmgr", "-nP", "show", "user", user_name(os.getuid()), "format=defaultaccount"
        )
    # Without accounting there is none.
    except slurm_client.NoAnswer:
        return ""
    return answer.strip().partition("\n")[0]
