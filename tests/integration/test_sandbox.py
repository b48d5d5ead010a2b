"""The sandbox under attack, as root (held by control groups) and as an ordinary user (by a user namespace's limit)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stages.rl import sandbox
from stages.rl.sandbox import ATTEMPTS, Limits, Outcome, Pool, Program, SandboxFailed, cgroups, missing, syscalls
from stages.rl.sandbox.cell import OWN_PROCESSES, Cell
from stages.rl.sandbox.cgroups import Cgroup, Home, homes
from tests.fixtures.sandbox_fixtures import LIMITS, ROOT, UserPool, copy  # noqa: F401 - a fixture

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and "CI" not in os.environ,
    reason="needs bubblewrap (apt-get install bubblewrap), which only recipes that run a model's code need",
)

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    cell = Cell(LIMITS)
    yield cell
    cell.close()


@pytest.fixture(params=["here", "user"])
def run(request: pytest.FixtureRequest, cell: Cell, copy: Path) -> Run:  # noqa: F811
    """run(source, **limits) -> Outcome, by this user in a cell that all tests share, and by one with no rights at all."""

    def run_program(source: str, **limits: Any) -> Outcome:
        if not limits:
            return cell.run(Program(source))
        with Pool(1, Limits(**{**asdict(LIMITS), **limits})) as pool:
            return pool.run([Program(source)])[0]

    def user(source: str, **limits: Any) -> Outcome:
        with UserPool(copy, 1, Limits(**{**asdict(LIMITS), **limits})) as pool:
            return pool.run([Program(source)])[0]

    return run_program if request.param == "here" else user


def alive(marker: str) -> list[int]:
    """Processes of this machine with the marker in their command line."""
    pids = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marker.encode() in (folder / "cmdline").read_bytes():
                pids.append(int(folder.name))
        except OSError:
            continue
    return pids


def test_a_program_runs(run: Run) -> None:
    assert run("print(6 * 7)") == Outcome("ok", "42\n", "", 0, pytest.approx(0, abs=1))  # type: ignore[arg-type]
    broken = run("import sys; print('so far'); 1 / 0")
    assert (broken.status, broken.stdout, broken.exit_code) == ("error", "so far\n", 1)
    assert "ZeroDivisionError" in broken.stderr


def test_programs_get_their_input_and_end_as_they_say(cell: Cell) -> None:
    assert cell.run(Program("print(input() + input())", "a\nb\n")).stdout == "ab\n"
    assert cell.run(Program("import sys; sys.exit(7)")).exit_code == 7
    assert cell.run(Program("raise SystemExit('why')")).stderr == "why\n"
    assert cell.run(Program("import atexit; atexit.register(print, 'last')")).stdout == "last\n"
    assert cell.run(Program("import ctypes; ctypes.string_at(0)")).status == "killed"
    assert cell.run(Program("def f(")).status == cell.run(Program("\udcff\0")).status == "error"


def test_forks_stop_at_the_limit(run: Run) -> None:
    count = (
        "import os, time\nn = 0\ntry:\n    while n < 2000:\n        if os.fork() == 0: time.sleep(60)\n        n += 1\n"
    )
    outcome = run(count + "except OSError as e: print(n, type(e).__name__)")
    forks, error = outcome.stdout.split()
    assert error == "BlockingIOError" and 10 <= int(forks) < 16 + OWN_PROCESSES
    threads = "import threading, time\nn = 0\ntry:\n    while n < 2000:\n        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n        n += 1\nexcept RuntimeError: print(n)"
    assert 10 <= int(run(threads).stdout) < 16 + OWN_PROCESSES


def test_a_fork_bomb_is_ended_and_leaves_nothing(run: Run) -> None:
    start = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, cpu_seconds=1, wall_seconds=3).status == "timeout"
    assert time.monotonic() - start < 30
    assert run("print('fine')").stdout == "fine\n"


def test_memory_of_a_process(run: Run) -> None:
    outcome = run("x = bytearray(300 << 20)")
    assert outcome.status == "memory" and "MemoryError" in outcome.stderr
    assert run("x = bytearray(100 << 20); print(len(x))").stdout == f"{100 << 20}\n"


def test_memory_of_all_processes_together(cell: Cell) -> None:
    if os.geteuid():
        pytest.skip("only a control group, which takes root, bounds it")
    hungry = "import os, time\nfor n in range(8):\n    if os.fork() == 0:\n        x = b'x' * (120 << 20); time.sleep(1); os._exit(0)\n"
    outcome = cell.run(Program(hungry + "print(sorted({os.wait()[1] for _ in range(8)}))"))
    # the kernel killed some, or all with their first process: 8 times 120 MiB never fitted 256
    assert outcome.status == "memory" or "9" in outcome.stdout, outcome
    assert cell.run(Program("print('fine')")).stdout == "fine\n"


def test_memory_that_no_process_is_charged_for_is_denied(run: Run) -> None:
    tries = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())\ntry: os.memfd_create('x')\nexcept PermissionError: print('denied')"
    assert run(tries).stdout == "-1 1\ndenied\n"


def test_disk(run: Run) -> None:
    one = "n = 0\ntry:\n    with open('/tmp/one', 'wb', 0) as f:\n        while True: n += f.write(bytes(1 << 16))\nexcept OSError as e: print(n, e.errno)"
    assert run(one).stdout == f"{4 << 20} 27\n", "a file ends at its limit, EFBIG"
    many = "n = 0\ntry:\n    for i in range(99):\n        with open(f'/tmp/{i}', 'wb', 0) as f:\n            for _ in range(16): n += f.write(bytes(1 << 16))\nexcept OSError as e: print(n, e.errno)"
    written, error = map(int, run(many).stdout.split())
    assert (15 << 20) <= written <= (16 << 20) and error == 28, "the disk ends at its limit, ENOSPC"
    empty = (
        "n = 0\ntry:\n    while True: open(f'/tmp/{n}', 'w').close(); n += 1\nexcept OSError as e: print(n, e.errno)"
    )
    count, error = map(int, run(empty).stdout.split())
    assert count < 2000 and error == 28, "and so do files"


def test_nothing_but_tmp_can_be_written(run: Run) -> None:
    walk = """
import os
tried = 0
for folder, _, names in os.walk('/'):
    for path in [folder + '/new'] + [folder + '/' + n for n in names if 'random' not in n and n not in ('null', 'zero')][:3]:
        tried += 1
        try: open(path, 'ab').close()
        except OSError: continue
        print(path)
print(tried > 100)
"""
    assert run(walk).stdout.split() == ["/tmp/new", "True"]


def test_files_that_may_be_open(run: Run) -> None:
    many = "files = []\ntry:\n    while True: files.append(open('/dev/null'))\nexcept OSError as e: print(len(files), e.errno)"
    count, error = map(int, run(many).stdout.split())
    assert 50 <= count < 64 and error == 24


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_endless_output(run: Run, stream: str) -> None:
    outcome = run(f"import sys\nwhile True: print('x' * 999, file=sys.{stream})")
    assert outcome.status == "output" and len(getattr(outcome, stream)) == LIMITS.output_bytes


def test_endless_computing_is_ended_by_the_processor_time_it_takes(run: Run) -> None:
    outcome = run("while True: pass", cpu_seconds=1, wall_seconds=60)
    assert outcome.status == "timeout" and 0.5 <= outcome.cpu_seconds < 2


def test_sleep_is_ended_by_the_clock(run: Run) -> None:
    stubborn = (
        "import signal, time\nfor s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\ntime.sleep(99)"
    )
    start = time.monotonic()
    outcome = run(stubborn, wall_seconds=1)
    assert outcome.status == "timeout" and outcome.cpu_seconds < 0.5 and time.monotonic() - start < 30


def test_by_default_the_clock_is_far_from_what_decides() -> None:
    assert Limits().wall_seconds >= 10 * Limits().cpu_seconds


def test_no_network(run: Run) -> None:
    name = f"atom-{uuid.uuid4()}"
    with socket.create_server(("", 0)) as host, socket.socket(socket.AF_UNIX) as local:
        local.bind("\0" + name)
        local.listen()
        port = host.getsockname()[1]
        attack = f"""
import socket
for kind, where in [(2, ('127.0.0.1', {port})), (2, ('localhost', {port})), (2, ('{_address()}', {port})), (1, chr(0) + '{name}')]:
    try: socket.socket(kind).connect(where); print('reached', where)
    except OSError as e: print(type(e).__name__)
"""
        errors = run(attack).stdout.split()
        assert len(errors) == 4 and set(errors) <= {"ConnectionRefusedError", "OSError", "gaierror"}
        for server in (host, local):
            server.settimeout(0.2)
            with pytest.raises(TimeoutError):
                server.accept()
        process = subprocess.run([sys.executable, "-c", attack], capture_output=True, text=True)
        assert process.stdout.count("reached") == 4, f"outside, the same connects: {process.stdout}{process.stderr}"


def _address() -> str:
    """This machine's own address, by the route that it would take outwards; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(s.getsockname()[0])


def test_no_host_files_nor_environment(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the host's")
    monkeypatch.setenv("HF_TOKEN", "the host's")
    attack = f"""
import os
os.symlink('{secret}', '/tmp/link')
os.symlink('../../../../..{secret}', '/tmp/up')
os.symlink('/proc/1/root{secret}', '/tmp/root')
for path in ['{secret}', '/tmp/link', '/tmp/up', '/tmp/root', '{ROOT}/README.md', '/etc/passwd', '/etc/shadow', '/root/.bashrc',
             '/proc/self/environ', '/proc/self/mem', '/proc/1/root', '/proc/self/fd', '/dev/fd', '/dev/shm', '/dev/mem', '/sys/kernel',
             '/sys/fs/cgroup', '/bin/sh', '/usr/bin/env', '/var', '/home', '/run']:
    if os.path.exists(path): print(path)
print(sorted(os.environ), os.getuid(), os.listdir('/tmp'))
"""
    names = "['HOME', 'LANG', 'MALLOC_ARENA_MAX', 'PWD', 'PYTHONHASHSEED']"
    output = run(attack).stdout
    assert output.replace("'LC_CTYPE', ", "") == f"{names} 65534 ['root', 'up', 'link']\n", output


def test_no_rights_to_gain(run: Run) -> None:
    attack = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
os.mkdir('/tmp/m')
held = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
print('capabilities', sum(held), 'no new', libc.prctl(39, 0, 0, 0, 0))
print('denied', [f(*a) for f, *a in (
    (libc.unshare, 0x10000000), (libc.unshare, 0x20000), (libc.mount, b'proc', b'/tmp/m', b'proc', 0, None), (libc.umount2, b'/tmp', 2),
    (libc.chroot, b'/tmp/m'), (libc.setuid, 0), (libc.ptrace, 16, 1, 0, 0), (libc.mknod, b'/tmp/d', 0o60666, 0x800),
    (libc.sethostname, b'x', 1), (libc.keyctl if hasattr(libc, 'keyctl') else libc.setuid, 0))])
stack = ctypes.create_string_buffer(1 << 16)
print('user namespace', libc.clone(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0), ctypes.byref(stack, 1 << 16), 0x10000000 | 17, None))
"""
    assert run(attack).stdout == f"capabilities 0 no new 1\ndenied {[-1] * 10}\nuser namespace -1\n"


def test_devices_of_the_host_stay_as_they_are(run: Run) -> None:
    attack = """
import os
for device in ('null', 'zero', 'random', 'urandom'):
    path = '/dev/' + device
    file = os.open(path, os.O_RDWR | os.O_TRUNC)
    for change in (lambda: os.chmod(path, 0o666), lambda: os.fchmod(file, 0o666), lambda: os.utime(path, (1, 1)), lambda: os.utime(file, (1, 1)),
                   lambda: os.chown(path, 65534, 65534), lambda: os.setxattr(path, 'user.x', b'x'), lambda: os.link(path, '/tmp/x')):
        try: change()
        except OSError: continue
        print('changed', path)
    print(os.write(file, b'x'), len(os.read(file, 2)))
"""
    nodes = [Path("/dev", name) for name in ("null", "zero", "random", "urandom")]
    before = [os.stat(node) for node in nodes]
    assert run(attack).stdout == "1 0\n1 2\n1 2\n1 2\n"
    for node, was in zip(nodes, before, strict=True):
        status = os.stat(node)
        assert [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_ctime_ns] == [
            was.st_mode, was.st_uid, was.st_gid, was.st_mtime_ns, was.st_ctime_ns,
        ]  # fmt: skip


def test_sockets_are_of_two_families(run: Run) -> None:
    """AF_VSOCK reaches the host of a virtual machine, whatever the network namespace."""
    attack = """
import socket
def opened(*kind):
    try: return bool(socket.socket(*kind))
    except OSError: return False
print([f for f in range(64) if any(opened(f, t) for t in (1, 2, 3, 4, 5))], opened(2, 3, 1), opened(2, 1, 132), opened(2, 1, 262))
with socket.create_server(('127.0.0.1', 0)) as server, socket.create_connection(server.getsockname()) as client:
    server.accept()[0].sendall(b'within')
    print(client.recv(9))
"""
    assert run(attack).stdout == "[1, 2] False False False\nb'within'\n"


def test_options_of_sockets_are_of_a_list(run: Run) -> None:
    """With IP_MINTTL, what was sent over the loopback stayed in the kernel for minutes after the program."""
    attack = """
import asyncio, http.server, socket, threading, urllib.request
s = socket.socket()
def may(level, option, value=1):
    try: return s.setsockopt(level, option, value)
    except OSError as e: return e.errno
allowed = [(1, n) for n in (2, 6, 7, 8, 9, 15, 16)] + [(6, n) for n in (1, 3, 4, 5, 6, 12, 18)]
print([o for o in allowed if may(*o) == 92], may(1, 20, bytes(16)), may(1, 13, bytes(8)))
allowed += [(1, 13), (1, 20), (1, 21), (41, 26)]
print([(level, n) for level in range(256) for n in range(80) if (level, n) not in allowed and may(level, n) != 92])
print(may(0, 21, 255), may(-1, 2), may(41, 25))
try: s.send(b'x', socket.MSG_OOB)
except PermissionError: print('no byte out of band')
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'served')
    def log_message(self, *args): pass
with http.server.HTTPServer(('127.0.0.1', 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(urllib.request.urlopen('http://127.0.0.1:%d' % server.server_port).read())
    server.shutdown()
async def echo():
    async def back(reader, writer): writer.write(await reader.readline()); writer.close()
    async with await asyncio.start_server(back, '127.0.0.1', 0) as server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b'echo\\n')
        print(await reader.readline())
asyncio.run(echo())
"""
    outcome = run(attack)
    lines = ["[] None None", "[]", "92 92 92", "no byte out of band", "b'served'", "b'echo\\n'"]
    assert outcome.stdout.splitlines() == lines, outcome


@pytest.mark.skipif(platform.machine() != "x86_64", reason="is of x86-64's machine code")
def test_calls_by_another_machines_numbers_kill(run: Run) -> None:
    """int 0x80 names a call as 32-bit x86 does (20 is getpid), and bit 30 as x32 does."""
    attack = """
import ctypes, errno, mmap
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(0x40000000 + 39), errno.errorcode[ctypes.get_errno()], flush=True)
page = mmap.mmap(-1, 4096, prot=7)
page.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print('alive')
"""
    outcome = run(attack)
    assert (outcome.stdout, outcome.status, outcome.exit_code) == ("-1 EPERM\n", "killed", -signal.SIGSYS)


def test_a_machine_without_a_list_of_calls_is_refused() -> None:
    look = "from stages.rl.sandbox import missing; print(missing())"
    process = subprocess.run(
        ["setarch", "linux32", sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True
    )
    assert process.stdout.startswith("the sandbox cannot start: the list of system calls"), (
        process.stdout + process.stderr
    )


def test_the_list_of_calls_is_the_kernels() -> None:
    headers = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}
    for machine, header in headers.items():
        path = Path("/usr/include", header)
        if not path.exists():
            pytest.skip(f"there is no {path}; apt-get install linux-libc-dev")
        text = path.read_text()
        shared = dict(re.findall(r"#define __NR3264_(\w+) (\d+)", text))
        known = set(re.findall(r"#define __NR_(\w+) (\d+)", text))
        known |= {
            (name, shared[of]) for name, of in re.findall(r"#define __NR_(\w+) __NR3264_(\w+)", text) if of in shared
        }
        calls = syscalls.numbers(machine)
        assert {(name, str(number)) for name, number in calls.items()} <= known
        assert len(calls) > 140 and set(syscalls.ARGUMENTS) <= set(calls)


def test_no_inherited_descriptors(run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("the host's")
    with open(tmp_path / "secret") as file:
        os.set_inheritable(file.fileno(), True)
        attack = "import os\nfor n in range(4096):\n    try: os.fstat(n)\n    except OSError: continue\n    print(n)"
        assert run(attack, output_bytes=4096).stdout.split() == ["0", "1", "2"]


def test_a_daemon_dies_with_its_program(run: Run) -> None:
    marker = f"marker-{uuid.uuid4()}"
    daemon = f"""
import os, signal, sys, time
r, w = os.pipe()
if os.fork() == 0:
    os.setsid()
    for s in set(signal.Signals) - {{9, 19}}: signal.signal(s, signal.SIG_IGN)
    if os.fork() == 0:
        os.set_inheritable(w, True)
        os.execv(sys.executable, [sys.executable, '-c', f'import os, time; os.write({{w}}, b"x"); time.sleep(99)', '{marker}'])
    os._exit(0)
os.read(r, 1)
time.sleep(float('SECONDS'))
"""
    counts: list[int] = []
    waiter = threading.Thread(target=lambda: counts.append(len(_until(lambda: alive(marker)))))
    waiter.start()
    assert run(daemon.replace("SECONDS", "1")).status == "ok"
    waiter.join()
    assert counts[0], "it did run"
    assert not alive(marker)
    assert run(daemon.replace("SECONDS", "99"), wall_seconds=2).status == "timeout"
    assert not alive(marker)


def _until(true: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return value or []


def test_nothing_passes_from_one_program_to_the_next(cell: Cell) -> None:
    """In the same cell, whose warm process stays the same one."""
    cell.run(Program("pass"))
    before = cell.pid
    poison = """
import builtins, ctypes, json, os, random, signal, socket, sys
open('/tmp/left', 'w').write('x')
json.dumps = builtins.len = builtins.print = sys.exit = lambda *a, **k: 'poisoned'
s = socket.socket(socket.AF_UNIX); s.bind(chr(0) + 'left'); s.listen()
if os.fork() == 0:
    os.setsid()
    while True: signal.pause()
for pid in [0, -1, *range(2, 200)]:
    try: os.kill(pid, 9)
    except OSError: pass
for path in ('/atom/inside.py', '/atom/calls.py', sys.executable, json.__file__):
    for way in ('w', 'a'):
        try: open(path, way)
        except OSError: continue
        os.write(1, b'changed ' + path.encode())
libc = ctypes.CDLL(None)
libc.prctl(1, 0); libc.prctl(4, 1)
random.seed(5)
"""
    assert cell.run(Program(poison)).stdout == ""
    look = """
import json, os, random, socket
print(os.listdir('/tmp'), json.dumps([1]), len('ab'), os.getpid(), random.randrange(10 ** 9), hash('text'))
for pid in range(2, 200):
    try: os.kill(pid, 0); print('alive', pid)
    except ProcessLookupError: pass
try: socket.socket(socket.AF_UNIX).connect(chr(0) + 'left'); print('reached')
except ConnectionRefusedError: pass
"""
    first = cell.run(Program(look)).stdout
    assert first.startswith("[] [1] 2 1 ") and first.count("\n") == 1, first
    assert cell.run(Program(look)).stdout == first, "the same program gives the same, chance and hashes included"
    assert cell.pid == before


def test_a_cell_that_is_killed_starts_again() -> None:
    with Pool(1) as pool:
        (cell,) = pool._cells[0]
        cell.run(Program("pass"))
        before = cell.pid
        assert before
        os.kill(before, 9)
        assert pool.run([Program("print('again')")])[0].stdout == "again\n" and cell.pid != before
        killer = threading.Timer(0.5, lambda: os.kill(cell.pid or 0, 9))
        killer.start()
        assert pool.run([Program("import time; time.sleep(1.5); print('to its end')")])[0].stdout == "to its end\n"


def killing(times: int, attempts: list[int]) -> Callable[[list[Cell], int], str]:
    """Work on an item that kills its cell in its first attempts, if the item is 3."""

    def work(cells: list[Cell], item: int) -> str:
        if item == 3:
            attempts.append(item)
        kills = item == 3 and len(attempts) <= times
        seconds = 9 if kills else 0.1  # it must not end before it is killed
        job = {"role": "program", "source": f"import time; time.sleep({seconds}); print({item})", "stdin": ""}
        with cells[0].begin(job) as running:
            if kills:
                os.kill(cells[0].pid or 0, 9)
            return running.finish().stdout.strip()

    return work


def test_what_kills_its_sandbox_each_time_is_to_blame_and_nothing_else_is() -> None:
    attempts: list[int] = []
    with Pool(2, LIMITS) as pool:
        outcome = pool.map(killing(99, attempts), range(6), lambda item: f"blamed: {item}")
        assert outcome == ["0", "1", "2", "blamed: 3", "4", "5"] and len(attempts) == ATTEMPTS
        attempts.clear()
        outcome = pool.map(killing(ATTEMPTS - 1, attempts), range(6), lambda item: f"blamed: {item}")
        assert outcome == ["0", "1", "2", "3", "4", "5"], "killed from outside, and not each time"


def test_a_machine_where_each_sandbox_dies_is_no_programs_fault() -> None:
    with Pool(1, LIMITS) as pool:
        (cell,) = pool._cells[0]
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(0.001):
                if pid := cell.pid:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, 9)  # with the first child, which may not yet have asked to die with it

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(SandboxFailed):
                pool.run([Program("import time; time.sleep(5)")])
        finally:
            stop.set()
            killer.join()
        assert pool.run([Program("print('mended')")])[0].stdout == "mended\n"


def test_a_probe_that_does_not_get_its_memory_blames_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.cell, "OWN_MEMORY", -(200 << 20))  # less than a program may use is there
    if os.geteuid():
        pytest.skip("only a control group, which takes root, bounds it")
    with Pool(1, LIMITS) as pool, pytest.raises(SandboxFailed, match=f"the sandbox fails {ATTEMPTS} times, and then"):
        pool.map(killing(99, []), [3], str)


def test_nothing_outlives_its_parent() -> None:
    marker = f"marker-{uuid.uuid4()}"
    program = (
        f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(99)', '{marker}'])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"from stages.rl.sandbox import *\nwith Pool(1) as p: p.run([Program({program!r})])"],
        cwd=ROOT,
    )
    inside = [pid for pid in _until(lambda: [p for p in alive(marker) if p != parent.pid])]
    assert inside
    parent.kill()
    parent.wait()
    assert _until(lambda: not set(alive(marker)) & set(inside))
    if os.geteuid() == 0:
        assert _until(lambda: not left_after_another(parent.pid)), "the next sandbox removes its empty control groups"


def left_after_another(pid: int) -> list[Path]:
    with Pool(1) as pool:
        pool.run([Program("pass")])
    return [f for c in cgroups.FILES for f in Path("/sys/fs/cgroup").glob(f"{c}/**/{cgroups.PREFIX}{pid}-*")]


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt-get install bubblewrap" in str(missing())
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    assert missing() == "the sandbox cannot start: bwrap: No permissions to create new namespace"
    with Pool(1) as pool, pytest.raises(SandboxFailed):
        pool.run([Program("pass")])


def test_root_is_refused_without_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(cgroups, "homes", lambda mounts, membership: {})
    assert "pids.max" in str(missing())


def test_where_control_groups_lie() -> None:
    one = "31 24 0:28 / /sys/fs/cgroup/pids rw,relatime shared:9 - cgroup cgroup rw,pids\n30 24 0:27 /job /mnt/mem rw - cgroup cgroup rw,memory"
    places = homes(one, "8:pids:/\n4:memory:/job/step\n0::/")
    assert places == {
        "pids": Home(1, Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup/pids")),
        "memory": Home(1, Path("/mnt/mem"), Path("/mnt/mem/step")),
    }
    two = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
    unified = Home(2, Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/user.slice/session-3.scope"))
    assert homes(two, "0::/user.slice/session-3.scope") == {"pids": unified, "memory": unified}
    both = homes(two.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified") + "\n" + one, "8:pids:/\n4:memory:/job\n0::/")
    assert {h.version for h in both.values()} == {1}
    assert homes("22 1 8:1 / / rw - ext4 /dev/root rw", "0::/") == {}


def test_version_two_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that gives a new group the files of version 2, as its kernel does where the parent has no processes."""
    make = Path.mkdir

    def mkdir(self: Path, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if self.parent != tmp_path / "slice" / "scope":
            for name in ("pids.max", "memory.max", "memory.swap.max"):
                (self / name).write_text("max")

    (tmp_path / "slice" / "scope").mkdir(parents=True)
    monkeypatch.setattr(Path, "mkdir", mkdir)
    home = Home(2, tmp_path, tmp_path / "slice" / "scope")
    group = Cgroup("box", 21, 1 << 20, {"pids": home, "memory": home})
    assert group.folders == [tmp_path / "slice" / "box"], "one for both controllers, beside the group that is occupied"
    (folder,) = group.folders
    assert {f.name: f.read_text() for f in folder.iterdir()} == {
        "pids.max": "21", "memory.max": str(1 << 20), "memory.swap.max": "0",
    }  # fmt: skip
    (folder / "memory.events").write_text("max 9\noom 2\noom_kill 3\noom_group_kill 0\n")
    assert group.out_of_memory() == 3


@pytest.mark.parametrize("version", [1, 2])
def test_closing_kills_what_is_in_a_group(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In real hierarchies. Where version 2 has no pids here, with two limits that each of its groups has."""
    mounts = Path("/proc/self/mountinfo").read_text()
    if version == 2:
        mounts = "\n".join(line for line in mounts.splitlines() if " - cgroup2 " in line)
        names = {"pids": ("", "cgroup.max.depth"), "memory": ("", "cgroup.max.descendants")}
        monkeypatch.setattr(cgroups, "FILES", names)
    at = homes(mounts, Path("/proc/self/cgroup").read_text())
    if os.geteuid() or {home.version for home in at.values()} != {version}:
        pytest.skip(f"it takes root and control groups of version {version}")
    group = Cgroup(f"atom-test-{uuid.uuid4()}", 9, 1 << 24, at)
    folders = list(group.folders)
    if version == 2:
        assert [(folders[0] / f).read_text() for _, f in names.values()] == ["9\n", f"{1 << 24}\n"]
    process = subprocess.Popen(group.wrapped(["sh", "-c", "trap '' TERM HUP; (trap '' TERM; sleep 99) & sleep 99"]))
    assert _until(lambda: len(group.processes()) >= 3)
    group.close()
    assert process.wait(10) == -9 and not any(folder.exists() for folder in folders)


def test_control_groups_of_the_cell_hold_it_and_go_with_it() -> None:
    if os.geteuid():
        pytest.skip("an ordinary user has none")
    cell = Cell(LIMITS)
    cell.run(Program("pass"))
    group = cell._cgroup
    assert group and cell.pid in group.processes() and len(group.processes()) <= OWN_PROCESSES
    cell.close()
    assert not any(folder.exists() for folder in group.folders) and not group.folders
