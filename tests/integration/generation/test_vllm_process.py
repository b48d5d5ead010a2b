"""The process of a vLLM server: its start, its end with all that it started, and its place in a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from pipeline.run_secret import atom_secret
from stages.generation import server_jobs, vllm_server
from stages.generation.server_jobs import Announced
from stages.generation.vllm_server import ServerLost
from stages.rl.config import Sampling
from tests.fixtures import ROOT


def pids(log: Path) -> list[int]:
    for _ in range(200):
        if log.exists() and (text := log.read_text()).endswith("\n"):
            return [int(x) for x in text.split()]
        time.sleep(0.05)
    raise AssertionError("the server wrote nothing")


def have_ended(process_ids: list[int]) -> bool:
    def runs(pid: int) -> bool:
        try:
            return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return False

    for _ in range(200):
        if not any(runs(pid) for pid in process_ids):
            return True
        time.sleep(0.05)
    return False


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> vllm_server.Server:
    (folder / "config.json").write_text('{"dtype": "float32"}')
    monkeypatch.setattr(vllm_server, "command", lambda *args: [sys.executable, "-c", code])
    return vllm_server.Server.start("python", folder, folder / "server.log")


def test_a_server_that_dies_at_its_start_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, monkeypatch, "print('one', flush=True); raise SystemExit('no such device')")
    with pytest.raises(
        AtomError, match=r"is gone \(exit code 1\); its log .*server.log ends: .*no such device; see to it"
    ):
        server.wait(30)
    server.close()
    server = start(tmp_path, monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(AtomError, match="no answer within 0 s"):
        server.wait(0.3)
    server.close()
    server.close()


CHILD = "import os, subprocess, time; p = subprocess.Popen(['sleep', '60']); print(os.getpid(), p.pid, flush=True); time.sleep(60)"


def test_a_server_ends_with_all_its_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(tmp_path, monkeypatch, CHILD)
    process_ids = pids(tmp_path / "server.log")
    server.close()
    assert have_ended(process_ids)


def test_a_server_ends_when_the_stage_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from stages.generation import vllm_server as v\n"
        f"v.command = lambda *given: [sys.executable, '-c', {CHILD!r}]\n"
        "folder = Path(sys.argv[1]); s = v.Server.start('python', folder, folder / 'server.log')\n"
        "while not (folder / 'server.log').read_text().endswith('\\n'): time.sleep(0.05)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(ROOT)], check=False)
    assert have_ended(pids(tmp_path / "server.log"))


def test_a_server_beside_training_leaves_it_its_gpu_or_its_memory() -> None:
    assert vllm_server.place({}, 2, 0.9) == ({"CUDA_VISIBLE_DEVICES": "1"}, [])
    assert vllm_server.place({"CUDA_VISIBLE_DEVICES": "4,6,7", "WORLD_SIZE": "2"}, 3, 0.9)[0] == {
        "CUDA_VISIBLE_DEVICES": "7"
    }
    assert vllm_server.place({"WORLD_SIZE": "16"}, 8, 0.6) == ({}, ["--gpu-memory-utilization=0.30"])


def test_workarounds_for_the_cpu_are_only_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')
    assert not set(vllm_server.CPU_OPTIONS) & set(vllm_server.command("python", tmp_path, "127.0.0.1", 1))


class Place:
    """Where a server runs: until `is_over`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.run, self.number = folder, folder / "server.log", "run-1", 3
        self.is_over = self.is_ready = False

    def ended(self) -> bool:
        return self.is_over

    def ready(self) -> None:
        self.is_ready = True


ANSWERING = (
    "import os, sys, uvicorn, atom_guard\n"
    "from starlette.applications import Starlette\n"
    "from starlette.responses import Response\n"
    "from starlette.routing import Route\n"
    "print(os.getpid(), flush=True)\n"
    "app = Starlette(routes=[Route('/health', lambda request: Response())])\n"
    "uvicorn.run(atom_guard.Guard(app), host='127.0.0.1', port=int(sys.argv[1]), log_level='critical')\n"
)


def test_a_server_in_a_job_is_announced_while_it_answers_and_ends_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_jobs, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(vllm_server, "interpreter", lambda: "python")
    monkeypatch.setattr(
        vllm_server, "command", lambda python, folder, host, port, options: [sys.executable, "-c", ANSWERING, str(port)]
    )
    monkeypatch.setattr(vllm_server, "own_address", lambda: ("127.0.0.1", "127.0.0.1"))
    monkeypatch.setenv("SLURMD_NODENAME", "127.0.0.1")
    atom_secret.make(tmp_path / "secret")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    place, outcomes = Place(tmp_path), []
    settings = Sampling(kind="vllm", max_new_tokens=7)

    def run() -> None:
        try:
            outcomes.append(server_jobs.serve(settings, place))
        except ServerLost as error:
            outcomes.append(error)

    def announcements(count: int) -> list[Announced]:
        for _ in range(1000):
            if len(present := server_jobs.read(tmp_path, "run-1")) == count:
                return present
            time.sleep(0.02)
        raise AssertionError(f"{present} were announced, not {count}; {outcomes}")

    for is_killed in (True, False):
        thread = threading.Thread(target=run)
        thread.start()
        if is_killed:
            time.sleep(0.1)
            assert not place.log.exists(), "it started without a model"
            (tmp_path / "config.json").write_text('{"dtype": "float32"}')
        (announced,) = announcements(1)
        assert place.is_ready and (announced.run, announced.job, announced.host) == ("run-1", "7", "127.0.0.1")
        pid = pids(place.log)[-1]
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        else:
            place.is_over = True
        thread.join(60)
        assert not announcements(0) and have_ended([pid])
        assert ("is gone (exit code" in str(outcomes[-1])) == is_killed
    assert outcomes[-1] is None
