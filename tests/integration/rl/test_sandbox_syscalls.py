"""System calls of a program in the sandbox: those of a list, with the arguments of a list."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.rl.sandbox import syscalls
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP, ROOT, Run, cell, copy, run  # noqa: F401 - fixtures

pytestmark = NEEDS_BUBBLEWRAP


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
