"""What the tests of the sandbox share: programs that attack it, and runners of programs as this user and as another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stages.rl.sandbox import Limits, Outcome, Pool, Program

ROOT = Path(__file__).parent.parent
LIMITS = Limits(cpu_seconds=2, wall_seconds=20, memory_bytes=256 << 20, file_bytes=4 << 20)
USER = 54321

AS_USER = """
import json, sys
from dataclasses import asdict
from stages.rl.sandbox import Limits, Pool, Program
workers, limits = json.loads(sys.argv[1])
with Pool(workers, Limits(**limits)) as pool:
    for line in sys.stdin:
        print(json.dumps([asdict(o) for o in pool.run([Program(s) for s in json.loads(line)])]), flush=True)
"""


@pytest.fixture(scope="module")
def copy() -> Iterator[Path]:
    """The sandbox's files where any user may read them; a checkout under /root is closed to others."""
    folder = Path("/tmp", f"atom-{uuid.uuid4()}")
    for name in ("pipeline/core/errors.py", "pipeline/__init__.py", "stages/__init__.py", "stages/rl/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "stages/rl/sandbox", folder / "stages/rl/sandbox")
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


class UserPool:
    """A Pool of an ordinary user. Skips the test where this user is not root, or no Python is there for another."""

    def __init__(self, copy: Path, workers: int, limits: Limits) -> None:
        if os.geteuid():
            pytest.skip("these tests do not run as root, so what runs here is an ordinary user's already")
        python = next((p for n in range(11, 20) if os.path.exists(p := f"/usr/bin/python3.{n}")), "")
        if not python:
            pytest.skip(
                "there is no Python >= 3.11 in /usr/bin, for a user who may not read root's; apt-get install python3"
            )
        self.process = subprocess.Popen(
            [python, "-c", AS_USER, json.dumps([workers, asdict(limits)])], cwd=copy, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, user=USER, group=USER, extra_groups=[],
            env={"PATH": os.environ["PATH"]},
        )  # fmt: skip

    def run(self, programs: Sequence[Program]) -> list[Outcome]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([p.source for p in programs]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"it ended with {self.process.wait()}"
        return [Outcome(**outcome) for outcome in json.loads(line)]

    def __enter__(self) -> UserPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


def pool_of(user: str, copy: Path, workers: int, limits: Limits = LIMITS) -> Any:
    """A pool of "here", this user, or of "user", one without rights."""
    return Pool(workers, limits) if user == "here" else UserPool(copy, workers, limits)


def program_of(names: Sequence[str]) -> Program:
    """A program of these parts, each of which prints what comes of it and cannot stop those after it by raising."""
    parts = [f"def part():\n{_indent(PARTS[name])}\nattempt({name!r}, part)" for name in names]
    return Program("\n".join([PRELUDE, *parts]))


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip("\n").split("\n"))


PRELUDE = """
import builtins, ctypes, errno, fcntl, gc, hashlib, json, os, random, resource, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
kept = []
def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    return 'yes' if result >= 0 else errno.errorcode[ctypes.get_errno()]
def each(*calls):
    out = []
    for one in calls:
        try: one(); out.append('yes')
        except OSError as e: out.append(errno.errorcode.get(e.errno, '?'))
    return out
def attempt(name, part, write=os.write):
    try: result = part()
    except BaseException as e: result = type(e).__name__
    write(1, f'{name}: {result}\\n'.encode())
"""

# On x86-64, whose numbers of system calls these are, and elsewhere without those.
PARTS = {
    # What may outlive a program. No device gets a mode that would harm this machine if the sandbox held it not.
    "device modes": """
return [each(lambda: os.chmod(p, 0o666), lambda: os.utime(p, (1, 1)), lambda: os.chown(p, os.getuid(), os.getgid()),
             lambda: os.setxattr(p, 'user.x', b'1'), lambda: os.utime(os.open(p, os.O_RDWR)))
        for p in sorted('/dev/' + n for n in os.listdir('/dev'))]""",
    "devices": "return [tuple(os.stat('/dev/' + n))[:4] + (os.stat('/dev/' + n).st_mtime_ns, os.stat('/dev/' + n).st_ctime_ns) for n in sorted(os.listdir('/dev'))]",
    "libraries": "return [(s.st_mode, s.st_uid, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, (json.__file__, sys.executable, '/atom/inside.py'))]",
    "library modes": "return [each(lambda: os.chmod(p, 0), lambda: os.utime(p), lambda: open(p, 'a'), lambda: os.rename(p, p + 'x')) for p in (json.__file__, sys.executable, '/atom/inside.py', '/', '/atom')]",
    "locks": """
files = [os.open(p, os.O_RDONLY) for p in ('/dev/null', json.__file__, '/atom/inside.py', '/')]
kept.extend(files)
return [each(lambda: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB), lambda: fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB),
             lambda: fcntl.fcntl(f, 1024, 0), lambda: fcntl.fcntl(f, 1036, b'\\x05' + bytes(7)), lambda: fcntl.fcntl(f, 1026, 1)) for f in files]""",
    "hints": "f = os.open(json.__file__, os.O_RDONLY); return each(lambda: fcntl.fcntl(f, 1035, bytes(8)))",
    "watches": "return [call(294, 0), call(253), call(300, 0, 0)]",
    "pages": """
f = os.open(hashlib.__file__, os.O_RDONLY)
libc.mmap.restype = ctypes.c_void_p
at = libc.mmap(None, 4096, 1, 1, f, ctypes.c_long(0))
seen = ctypes.create_string_buffer(1)
buffer = ctypes.create_string_buffer(8); vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
return [call(27, ctypes.c_void_p(at), 4096, seen), seen.raw, call(327, f, vector, 1, ctypes.c_long(0), ctypes.c_long(0), 8), call(221, f, 0, 0, 4), call(451, f, 0, 0, 0)]""",
    "signals to the group": "signal.signal(15, signal.SIG_IGN); return each(lambda: os.kill(0, 9), lambda: os.killpg(0, 19), lambda: os.kill(0, 15), lambda: os.kill(-1, 9), lambda: os.kill(os.getppid(), 9))",
    "signals to others": "return each(*(lambda n=n: os.kill(n, 9) for n in range(2, 300)))[:3]",
    "priorities": "return each(*(lambda w=w: os.setpriority(w, 0, 19) for w in (0, 1, 2)), lambda: os.nice(5), lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)), lambda: os.sched_setaffinity(0, {0})) + [call(251, w, 0, 3 << 13) for w in (1, 2, 3)]",
    "my priorities": "return [os.getpriority(w, 0) for w in (0, 1, 2)], os.sched_getscheduler(0), len(os.sched_getaffinity(0))",
    "limits": "return each(*(lambda r=r: resource.setrlimit(r, (0, 0)) for r in (resource.RLIMIT_NPROC, resource.RLIMIT_SIGPENDING, resource.RLIMIT_FSIZE, resource.RLIMIT_NICE)))",
    "my limits": "return [resource.getrlimit(r) for r in range(16)]",
    "keys": "return [call(248, b'user', b'left', b'x', 1, n) for n in (-1, -2, -3, -4, -5)] + [call(249, b'user', b'left', None, 0), call(250, 0, -3, 1), call(250, 1, b'left')]",
    "system v": "return [call(29, 42, 4096, 0o1666), call(64, 42, 1, 0o1666), call(68, 42, 0o1666), call(240, b'left', 0o102, 0o666, None)]",
    "shared memory": "return each(lambda: open('/dev/shm/left', 'x'), lambda: os.memfd_create('left'), lambda: os.mkdir('/dev/shm'))",
    "abstract socket": """
s = socket.socket(socket.AF_UNIX); kept.append(s); s.bind('\\0left'); s.listen()
if os.fork() == 0:
    os.setsid(); time.sleep(99)
return 'bound'""",
    "sockets in flight": """
a, b = socket.socketpair(); d = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); d.bind('\\0flight')
return each(lambda: socket.send_fds(a, [b'x'], [b.fileno(), d.fileno()]), lambda: socket.send_fds(b, [b'x'], [a.fileno(), d.fileno()]))""",
    "ports": """
s = socket.socket(); s.bind(('127.0.0.1', 4242)); s.listen()
u = socket.socket(type=socket.SOCK_DGRAM); u.bind(('127.0.0.1', 4242)); kept.append(u)
c = socket.create_connection(('127.0.0.1', 4242)); a = s.accept()[0]
a.close(); c.close(); s.close()
return 'the one that closed first waits in TIME_WAIT'""",
    "families": "return [each(lambda: kept.append(socket.socket(f, t))) for f, t in ((40, 1), (40, 2), (16, 3), (17, 3), (10, 1), (38, 5), (31, 1), (44, 3), (2, 3))] + [call(41, 2, 1, p) for p in (132, 262, 33, 6)]",
    "files": "open('/tmp/left', 'w').write('x'); os.mkdir('/tmp/folder'); os.mkfifo('/tmp/fifo'); return sorted(os.listdir('/tmp'))",
    "my files": "return sorted(os.listdir('/tmp')), os.getcwd(), os.stat('/tmp').st_nlink, oct(os.umask(0o22))",
    "daemons": """
for n in range(4):
    if os.fork() == 0:
        os.setsid()
        for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)
        if os.fork() == 0:
            while True: time.sleep(9)
        os._exit(0)
threading.Thread(target=time.sleep, args=(0.01,), daemon=True).start()
return 'started'""",
    "my processes": "return os.getpid(), os.getppid(), os.getsid(0), os.getpgrp(), [n for n in range(2, 400) if each(lambda: os.kill(n, 0)) != ['ESRCH']][9:]",
    "room for processes": """
count = 0
while count < 99:
    try: pid = os.fork()
    except OSError: break
    if pid == 0: time.sleep(99); os._exit(0)
    kept.append(pid); count += 1
for pid in kept[-count:]: os.kill(pid, 9); os.waitpid(pid, 0)
return count > 2""",
    "modules": "json.dumps = sys.exit = builtins.len = lambda *a, **k: 'poisoned'; sys.setrecursionlimit(50); sys.modules.pop('re', None); random.seed(5); gc.disable(); return 'poisoned'",
    "my modules": "return json.dumps([1]), len('ab'), sys.getrecursionlimit(), 're' in sys.modules, random.randrange(10 ** 9), hash('text'), gc.isenabled()",
    "signal handlers": "signal.signal(2, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, {10, 12}); signal.alarm(9); return 'set'",
    "my signal handlers": "return signal.getsignal(2), signal.getsignal(15), signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.sigpending(), signal.getitimer(0)[0] > 0",
    "names": "return [call(170, b'left', 4), call(171, b'left', 4)], os.uname().nodename, time.tzset(), time.timezone",
    "environment": "before = sorted(n for n in os.environ if n != 'LC_CTYPE'); os.environ['LEFT'] = 'x'; libc.setenv(b'LEFT', b'x', 1); os.chdir('/'); os.umask(0o777); return before",
    "namespaces": "return [call(272, 1 << n) for n in (17, 25, 26, 27, 28, 29, 30)] + [call(272, 0x68020000), call(308, 0, 0), call(165, b't', b'/tmp', b'tmpfs', 0, 0), call(166, b'/tmp', 2), call(161, b'/tmp'), call(428, -1, b'/', 1), call(442, -1, b'/tmp', 0, 0, 0)]",
    "clones": "return [call(56, (1 << n) | 17, 0, 0, 0, 0) for n in (17, 25, 26, 27, 28, 29, 30)] + [call(435, 0, 0)]",
    "other memory": "return [call(101, 16, 1, 0, 0), call(310, 1, 0, 0, 0, 0, 0), call(311, 1, 0, 0, 0, 0, 0), call(440, 0, 0, 0, 0, 0), call(438, 0, 0, 0), call(312, 1, 1, 0, 0, 0)]",
    "doors": "return [call(n, 0, 0, 0, 0, 0) for n in (425, 321, 298, 323, 175, 313, 246, 320, 304, 303, 317, 139, 103, 167, 169, 227, 155, 133 + 200, 444, 206, 306, 162)]",
    "tuning": "return [call(157, n, 1, 0, 0, 0) for n in (4, 22, 36, 38, 62, 65)], [call(28, 0, 0, n) for n in (12, 20, 21, 100)], each(lambda: fcntl.fcntl(1, 1031, 1 << 20))",
    "descriptors": """
for n in range(3, 1024):
    try: os.write(n, b'{"value": 1}\\n'); os.close(n)
    except OSError: pass
return 'closed'""",
    "my descriptors": "return [n for n in range(1024) if each(lambda: os.fstat(n)) == ['yes']], os.read(0, 9)",
    "memory": "kept.append(b'x' * (150 << 20)); return 'used'",
    "disk": "n = 0\ntry:\n    while True: open(f'/tmp/{n}', 'wb').write(bytes(1 << 20)); n += 1\nexcept OSError as e: return e.errno, 10 < n < 17",
    "pipes": "kept.extend(os.pipe() for _ in range(9)); return each(*(lambda p=p: (os.set_blocking(p[1], False), os.write(p[1], bytes(1 << 20))) for p in kept[-9:]))",
    # Its ends.
    "exit": "os._exit(3)",
    "crash": "ctypes.string_at(0)",
    "abort": "signal.signal(6, signal.SIG_DFL); os.abort()",
    "kill itself": "os.kill(os.getpid(), 9); return 'it is process 1'",
    "stop itself": "os.kill(os.getpid(), 19); return 'it is process 1'",
    "too much memory": "kept.append(b'x' * (1 << 30))",
    "another program": "os.execv(sys.executable, [sys.executable, '-S', '-c', 'print(6 * 7)'])",
    "endless output": "while True: os.write(2, b'x' * 4096)",
}  # fmt: skip
