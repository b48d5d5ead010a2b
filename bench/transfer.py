"""What it takes to hand a policy's weights to samplers as the model grows: bytes, seconds, and the memory of a rank.

    .venv/bin/python bench/transfer.py               # 10⁷ to 2·10⁸ parameters, about a minute
    .venv/bin/python bench/transfer.py --quick       # two tiny models
    .venv/bin/python bench/transfer.py --full        # also 10⁹, about three minutes
    .venv/bin/python bench/transfer.py --groups      # connections and seconds by ranks and servers, some two minutes

Each model is a mixture of experts in bf16 on two expert-parallel ranks, with initial weights and no optimizer. `write`
is the transfer by the folder up to the sealed index, with all digests; `growth` the most that a rank's memory grew
meanwhile; `check` what one server reads before it loads, in one process. `send` is the broadcast by gloo to one process
that receives and checks as a server's only worker does, with all digests on both sides and in a group that exists;
`of send` is the growth of a rank in it. Peaks are VmHWM, which counts the pages of mapped files too.

Beneath the table stand transfers at two larger sizes, computed from the measured rate of a rank or server, and from a
stated bandwidth of the shared folder, or of the network of a server's rank; a server's own loading is not in them.

`--groups` has data-parallel ranks of one model, and servers that are one process each. It counts the TCP connections
that the ranks hold more than before, with the ranks in the groups that send, and with all of them.

The last line is one JSON object. Its ratio is the limit, twice the bytes of a file and of the largest tensor, divided
by the largest growth, by folder or by broadcast: 1 or more holds it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.export import FULL, PADDED, QUICK, SIZES
from pipeline.launch.rendezvous import free_port
from pipeline.run_secret.atom_secret import sign
from stages.models.mixture import Qwen3MoeConfig

RANKS = 2
SECRET = bytes(32)
"""What the trainer and the servers share, which is no secret here."""
FOLDER_BANDWIDTH, NETWORK_BANDWIDTH = 20e9, 50e9
"""Bytes a second of a shared file system, and of the network of one GPU, for the computed sizes."""
COMPUTED = (("30B", 30.5e9, 64, 8, 4), ("235B", 235e9, 512, 16, 8))
"""(name, parameters, ranks of the trainer, servers, tensor ranks of a server)."""


@dataclass(frozen=True)
class Measured:
    """One transfer by the folder, and one by broadcast. growth: the most that a rank's memory grew; read_growth: a
    server's while it checks."""

    parameters: int
    bytes: int
    write: float
    check: float
    send: float
    held: int
    growth: int
    send_growth: int
    read_growth: int
    tensor: int


def memory(key: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    match = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


class Growth:
    """The most that this process's memory grew in a block, in `bytes`."""

    def __enter__(self) -> Growth:
        gc.collect()
        self.before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        return self

    def __exit__(self, *args: Any) -> None:
        self.bytes = memory("VmHWM") - self.before


class Receiver:
    """What a broadcast takes for a sampler: each of its servers is a process that receives as a worker of vLLM does."""

    def __init__(self, folder: Path, servers: int = 1) -> None:
        self.paths = [folder / f"broadcast-{number}.json" for number in range(servers)]
        self.join_seconds = self.end = 0.0

    def load(self, weights: Any) -> None:
        sender, start = weights.sender, time.monotonic()
        invitations = {}
        for path in self.paths:
            with socket.create_server(("127.0.0.1", 0)) as listener:  # a server's address, of which none else is asked
                server = f"http://127.0.0.1:{listener.getsockname()[1]}"
                invitations[server] = sender.invite(server, SECRET)
            path.write_text(json.dumps({**invitations[server], **sender.content, "digest": weights.digest}))
        with ExitStack() as stack:
            command = [sys.executable, "-P", __file__, "--receiver"]
            processes = [stack.enter_context(subprocess.Popen([*command, str(path)])) for path in self.paths]
            joined = sender.join(invitations)
            self.join_seconds = time.monotonic() - start
            sent = sender.send(list(joined))
            if any(process.wait(600) for process in processes) or len(sent) < len(self.paths):
                raise SystemExit("the broadcast did not arrive")
        self.end = max(float(path.with_suffix(".end").read_text()) for path in self.paths)


def connections() -> int:
    """TCP connections of this process."""
    inodes = {link[8:-1] for link in map(_target, Path("/proc/self/fd").iterdir()) if link.startswith("socket:[")}
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/self/net/{name}").read_text().splitlines()
    ]
    return sum(fields[9] in inodes and fields[3] == "01" for fields in lines)  # 01: established


def _target(path: Path) -> str:
    with suppress(OSError):  # of this very listing
        return os.readlink(path)
    return ""


def receive(path: Path) -> None:
    """Receives a broadcast as the only worker of a server does, without loading it into a model."""
    import torch

    from stages.generation.vllm_worker.atom_group import GROUP, PATIENCE, WORKERS, Group, connect, packets, view
    from stages.generation.vllm_worker.atom_index import row_of

    invitation = json.loads(path.read_text())
    store = connect(invitation["store"], sign(SECRET, GROUP, invitation["nonce"]), invitation["seconds"])
    store.set(WORKERS, "1")
    group = Group(
        store, invitation["ranks"], invitation["ranks"] + 1, invitation["seconds"], torch.device("cpu"), PATIENCE
    )
    for together in packets(invitation["rows"], invitation["roots"]):
        buffers = [torch.empty(packet.size, dtype=torch.uint8) for packet in together]
        works = [group.start(buffer, packet.root) for packet, buffer in zip(together, buffers, strict=True)]
        for packet, buffer, work in zip(together, buffers, works, strict=True):
            group.end(work)
            for number, offset in zip(packet.numbers, packet.offsets, strict=True):
                row = invitation["rows"][number]
                if row_of(view(buffer, offset, row)) != row:
                    raise SystemExit(f"{invitation['names'][number]} arrived as another tensor")
    path.with_suffix(".end").write_text(str(time.monotonic()))  # the same clock in all processes


def child(folder: Path, config: Qwen3MoeConfig) -> None:
    """A rank: makes its part of the model, hands it over; rank 0 reads as a server and prints."""
    import torch

    from stages.generation import weights
    from stages.generation.vllm_worker import atom_index
    from stages.generation.weights import Broadcast
    from stages.mcore.model import Initial, build, named_tensors
    from stages.mcore.tensor_sharding import FullTensors, boxes, cut
    from stages.models.parallel_layout import Layout
    from stages.train import parallel

    shapes, layout = config.shapes(PADDED), Layout(ranks=RANKS, ep=RANKS)
    initial = Initial(shapes, config, 0)
    with parallel.session(0, layout) as ranks:
        local: dict[str, torch.Tensor] = {}
        for name, parameter in named_tensors(build(config, PADDED, layout, "bf16", on_meta=True)):
            local[name] = cut(initial[name], boxes(name, shapes[name])).bfloat16()
            assert local[name].shape == parameter.shape
        ranks.barrier()
        start = time.monotonic()
        with Growth() as written:
            full = FullTensors(local, shapes, config.tie_embeddings)
            digest, place = weights.write(weights.hf_tensors(full, config, PADDED), ranks, folder)
        seconds = time.monotonic() - start
        first = FullTensors(local, shapes, config.tie_embeddings, by_turns=False)
        sender = Broadcast(lambda turns: weights.hf_tensors(full if turns else first, config, PADDED), ranks)
        receiver: Any = Receiver(folder) if ranks.first else None
        ranks.barrier()
        start = time.monotonic()
        with Growth() as sent:
            assert sender.load(receiver) == digest
        send = receiver.end - start - receiver.join_seconds if ranks.first else 0.0
        held = sum(tensor.nbytes for tensor in local.values())
        growth, send_growth, held = (max(ranks.gather(n)) for n in (written.bytes, sent.bytes, held))
        sender.close()
        if ranks.first:
            start = time.monotonic()
            with Growth() as read:
                deque(atom_index.tensors(place, digest), maxlen=0)
            tensor = max(2 * int(torch.Size(shape).numel()) for shape in shapes.values())
            total = sum(path.stat().st_size for path in place.iterdir())
            check = time.monotonic() - start
            row = Measured(config.parameters(PADDED)["total"], total, seconds, check, send, held, growth,
                           send_growth, read.bytes, tensor)  # fmt: skip
            print(json.dumps(asdict(row)))


def group_child(folder: Path, servers: int, everyone: bool, config: Qwen3MoeConfig) -> None:
    """A data rank, which all hold the whole model: forms the groups and sends twice; rank 0 prints what it took."""
    from stages.generation import weights
    from stages.generation.weights import Broadcast
    from stages.mcore.model import Initial
    from stages.mcore.tensor_sharding import FullTensors
    from stages.models.parallel_layout import Layout
    from stages.train import parallel

    class All(Broadcast):
        def _choose_senders(self) -> None:
            super()._choose_senders()
            self.roots = [self.senders[root] for root in self.roots]
            self.senders = list(range(self.ranks.world))

    shapes, world = config.shapes(PADDED), int(os.environ["WORLD_SIZE"])
    initial = Initial(shapes, config, 0)
    local = {name: initial[name].bfloat16() for name in shapes}
    with parallel.session(0, Layout(ranks=world)) as ranks:
        sides = {turns: FullTensors(local, shapes, config.tie_embeddings, turns) for turns in (True, False)}
        sender = (All if everyone else Broadcast)(lambda turns: weights.hf_tensors(sides[turns], config, PADDED), ranks)
        receiver: Any = Receiver(folder, servers) if ranks.first else None
        ranks.barrier()
        before, start = connections(), time.monotonic()
        grown = 0
        run = sender._run

        def counted(action: str, argument: Any) -> set[str]:
            nonlocal grown
            done = run(action, argument)
            grown = max(grown, connections() - before)
            return done

        sender._run = counted  # type: ignore[method-assign]
        sender.load(receiver)
        held = ranks.gather(grown)
        sender.close()
        if ranks.first:
            send = receiver.end - start - receiver.join_seconds
            print(json.dumps([len(sender.senders), sum(held), max(held), receiver.join_seconds, send]))


def measure_groups(config: Qwen3MoeConfig, worlds: Sequence[int], counts: Sequence[int]) -> dict[str, Any]:
    """Prints a line for each number of ranks and of servers; returns the last line."""
    print(f"{'ranks':>6}{'servers':>9}" + "".join(f"{head:>34}" for head in ("ranks that send", "all ranks")))
    print(f"{'':>15}" + 2 * f"{'connections':>14}{'join':>10}{'send':>10}")
    ratio = 1.0
    for world in worlds:
        for servers in counts:
            rows = [run_group(config, world, servers, everyone) for everyone in (False, True)]
            ratio = max(1, rows[1][1]) / max(1, rows[0][1])
            print(f"{world:>6}{servers:>9}" + "".join(f"{held:>14}{join:>8.2f} s{send:>8.2f} s"
                                                      for _, held, _, join, send in rows), flush=True)  # fmt: skip
    return {"name": "transfer", "ratio": ratio, "low": ratio, "high": ratio, "target": 1.0,
            "unit": "connections with all ranks in the groups / with those that send, of the last line",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"}  # fmt: skip


def run_group(config: Qwen3MoeConfig, world: int, servers: int, everyone: bool) -> list[Any]:
    """[ranks in a group, connections of all ranks, the most of one, seconds to form the groups, seconds to send]."""
    row: list[Any] = run_ranks(world, config, "--group", str(servers), str(int(everyone)))
    return row


def run_ranks(world: int, config: Qwen3MoeConfig, kind: str, *arguments: str) -> Any:
    """What rank 0 prints last, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port())}  # fmt: skip
        command = [sys.executable, "-P", __file__, kind, folder, *arguments, config.model_dump_json()]
        processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            ) for rank in range(world)
        ]  # fmt: skip
        outputs = [process.communicate() for process in processes]
        for process, (_, errors) in zip(processes, outputs, strict=True):
            if process.returncode:
                raise SystemExit(f"{config.describe()}:\n{errors[-3000:]}")
    return json.loads(outputs[0][0].splitlines()[-1])


def measure(config: Qwen3MoeConfig) -> Measured:
    row = Measured(**run_ranks(RANKS, config, "--child"))
    sizes = (row.bytes, row.held, row.growth, row.send_growth, row.read_growth, row.tensor)
    print(f"{row.parameters:>13,}{row.write:8.2f} s{row.check:8.2f} s{row.send:8.2f} s"
          + "".join(f"{size / 1e6:9.0f} MB" for size in sizes), flush=True)  # fmt: skip
    return row


def summarize(rows: list[Measured]) -> dict[str, Any]:
    """Prints the computed sizes; returns the last line."""
    from stages.generation.weights import FILE_BYTES

    last = rows[-1]
    wrote, checked = last.bytes / RANKS / last.write, last.bytes / last.check
    print(f"a rank wrote {wrote / 1e9:.2f} GB/s, a server checked {checked / 1e9:.2f} GB/s; with a folder of "
          f"{FOLDER_BANDWIDTH / 1e9:.0f} GB/s:")  # fmt: skip
    for name, parameters, ranks, servers, tensor_ranks in COMPUTED:
        total = 2 * parameters
        write = max(total / ranks / wrote, total / FOLDER_BANDWIDTH)
        check = max(total / tensor_ranks / checked, servers * total / FOLDER_BANDWIDTH)
        # each rank hashes what it sends, each of a server's ranks its share, and each receives all
        send = total / ranks / checked + max(total / tensor_ranks / checked, total / NETWORK_BANDWIDTH)
        print(f"{name}: {total / 1e9:.0f} GB; {ranks} ranks write for {write:.1f} s, {servers} servers of "
              f"{tensor_ranks} ranks check for {check:.1f} s; by broadcast at {NETWORK_BANDWIDTH / 1e9:.0f} GB/s for "
              f"each rank {send:.1f} s together")  # fmt: skip
    ratio = round(min(2 * (FILE_BYTES + row.tensor) / max(row.growth, row.send_growth) for row in rows), 4)
    return {
        "name": "transfer", "ratio": ratio, "low": ratio, "high": ratio, "target": 1.0,
        "unit": f"limit / growth of a rank, up to {last.parameters / 1e9:.2g} billion parameters",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny models")
    parser.add_argument("--full", action="store_true", help="up to 10⁹ parameters: about three minutes")
    parser.add_argument("--receiver", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--groups", action="store_true", help="connections and seconds by ranks and servers")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "MODEL"), help=argparse.SUPPRESS)
    parser.add_argument("--group", nargs=4, metavar=("FOLDER", "SERVERS", "ALL", "MODEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child[0]), Qwen3MoeConfig.model_validate_json(arguments.child[1]))
    elif arguments.group:
        place, count, all_ranks, model = arguments.group
        group_child(Path(place), int(count), all_ranks == "1", Qwen3MoeConfig.model_validate_json(model))
    elif arguments.groups:
        few = (QUICK[0], (2,), (1,)) if arguments.quick else (SIZES[0], (1, 2, 4), (1, 2, 3))
        print(json.dumps(measure_groups(*few)))
    elif arguments.receiver:
        receive(arguments.receiver)
    else:
        heads = ("bytes", "held", "growth", "of send", "reader", "tensor")
        print(f"{'parameters':>13}{'write':>10}{'check':>10}{'send':>10}" + "".join(f"{head:>12}" for head in heads))
        chosen = QUICK if arguments.quick else SIZES + FULL * arguments.full
        print(json.dumps(summarize([measure(size) for size in chosen])))
