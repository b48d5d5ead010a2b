"""The host as a program in the sandbox sees it: no network, no files, no rights, no devices to change."""

# ruff: noqa: F811 - fixtures are imported, and are arguments

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP, ROOT, Run, cell, copy, run  # noqa: F401 - fixtures

pytestmark = NEEDS_BUBBLEWRAP


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
