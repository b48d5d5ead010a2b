"""Every hostile thing in a release ends `verify` soon, in little memory, with the file named in one printable line."""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import text
from pipeline.core.errors import CheckFailed, MachineError
from release import scratch, untrusted
from release.audit.verify import kind_of
from release.checks import check_runner
from release.checks.check import NOTHING_LARGE, Reads
from release.checks.check_runner import Budget, CheckRunner
from release.checks.verdict import CheckResult
from release.layout import ALL_SUMS, SUMS
from release.opened_release import Release
from release.repositories import files_below, read_sums
from tests.fixtures import ROOT
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import SOAK, at_length

SECONDS, MEGABYTES = 30, 500
"""What is promised: processor time, and memory of the largest process."""
SERVER = """
import json, os, resource, sys
from release.checks import check_runner
from release.audit.verify import verify
check_runner.load_libraries()
for line in sys.stdin:
    if os.fork() == 0:
        folder, check_runner.SECONDS = json.loads(line)
        verdict = verify(folder).to_json()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        took = sum(each.ru_utime + each.ru_stime for each in used)
        print(json.dumps([verdict, took, max(each.ru_maxrss for each in used) >> 10]), flush=True)
        os._exit(0)
    if os.wait()[1]:
        print("null", flush=True)
"""
"""Verifies each folder in a process of its own, which begins with the libraries and nothing else, and within so many
seconds of the processor as it is given with the folder."""


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 100 << 30)


def bound_socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(path.parent, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{descriptor}/{path.name}")  # the whole path may be too long for a socket
    os.close(descriptor)


def header(body: object) -> bytes:
    data = json.dumps(body).encode()
    return struct.pack("<Q", len(data)) + data


def many_rows(path: Path) -> None:
    column = pa.array(["x"]).take(pa.array([0] * 4_000_000, pa.int32()))
    pq.write_table(pa.table({"id": column}), path, compression="zstd")


def long_values(path: Path) -> None:
    """One megabyte, twenty thousand times: the footer states one megabyte."""
    zeros = pa.array([0] * 20_000, pa.int32())
    names = ("id", "source", "license", "disposition", "split", "rule")
    columns = {
        name: pa.DictionaryArray.from_arrays(zeros, pa.array(["v" * (1_000_000 if name == "id" else 1)]))
        for name in names
    }
    pq.write_table(pa.table(columns), path, compression="zstd", store_schema=False)


SPECIAL = {
    "a pipe": (lambda path: os.mkfifo(path), "is a named pipe, not a regular file"),
    "a socket": (bound_socket, "is a socket, not a regular file"),
    "a link to /dev/zero": (link("/dev/zero"), "is "),
    "a link to itself": (link("."), "is "),
    "a link to nothing": (link("/nowhere"), "is "),
    "a hole of 100 GB": (hole, "is a file of holes"),
}
PLACES = ("SHA256SUMS", "evidence/SHA256SUMS", "evidence/release.json", "evidence/origins.json", "model/SHA256SUMS",
          "model/model.safetensors", "model/model.sig", "dataset/dispositions/prose/part-00000.parquet", "checkpoints/index.json",
          "model/new.json")  # fmt: skip


def linked_folder(place: str) -> Callable[[Path], None]:
    """A link to the whole file system where a folder of the release could be."""

    def make(release: Path) -> None:
        if (release / place).exists():
            shutil.rmtree(release / place)
        (release / place).symlink_to("/")
        for sums in (SUMS, ALL_SUMS, f"{place.split('/')[0]}/{SUMS}"):  # and is listed
            if (release / sums).is_file() and not (release / place.split("/")[0]).is_symlink():
                rows = read_sums(release / sums, sums) | {place: "0" * 64}
                (release / sums).write_text("".join(f"{rows[path]}  {path}\n" for path in sorted(rows)))

    return make


def many_lists(count: int, size: int, link: bool = False) -> Callable[[Path], None]:
    """Folders of checkpoints, each with a checksum file: of holes, or all the same one."""

    def make(release: Path) -> None:
        text = "".join(f"{'0' * 64}  {number:09}\n" for number in range(size // 76)) if link else ""
        (release / "list").write_text(text)
        for number in range(count):
            path = release / f"checkpoints/x{number}" / SUMS
            path.parent.mkdir()
            if link:
                path.hardlink_to(release / "list")
            else:
                path.touch()
                os.truncate(path, size)

    return make


def many_holes(release: Path) -> None:
    for number in range(50):
        path = release / f"dataset/rl/{number}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, 60 << 20)
    sums = release / ALL_SUMS
    rows = read_sums(sums, ALL_SUMS) | {f"dataset/rl/{number}.jsonl": "0" * 64 for number in range(50)}
    sums.write_text("".join(f"{rows[path]}  {path}\n" for path in sorted(rows)))


def one_file_of_many_names(release: Path) -> None:
    """Three gigabytes to hash, if each name were hashed."""
    (release / "dataset/rl").mkdir(exist_ok=True)
    (release / "dataset/rl/0.jsonl").write_bytes(os.urandom(1 << 20) * 3)
    for number in range(1, 1000):
        (release / f"dataset/rl/{number}.jsonl").hardlink_to(release / "dataset/rl/0.jsonl")
    digest = hashlib.sha256((release / "dataset/rl/0.jsonl").read_bytes()).hexdigest()
    rows = read_sums(release / ALL_SUMS, ALL_SUMS) | {f"dataset/rl/{number}.jsonl": digest for number in range(1000)}
    (release / ALL_SUMS).write_text("".join(f"{rows[path]}  {path}\n" for path in sorted(rows)))


def nested_releases(release: Path) -> None:
    """Each branch seems to be a release, whose release.json is long to read."""
    text = '{"format": 2, "x": [' + "[]," * 1_200_000 + "[]]}"
    for number in range(200):
        place = release / f"checkpoints/x{number}"
        (place / "checkpoints").mkdir(parents=True)
        (place / "evidence").mkdir()
        if number:
            (place / "evidence/release.json").hardlink_to(release / "checkpoints/x0/evidence/release.json")
        else:
            (place / "evidence/release.json").write_text(text)


def with_allowances(bomb: Callable[[Path], None]) -> Callable[[Path], None]:
    """Many files that a check could be given time for."""

    def make(release: Path) -> None:
        column = pa.array(["x"]).take(pa.array([0] * 70_000, pa.int32()))
        (release / "dataset/rl/x").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": column}), release / "dataset/rl/x/0.parquet", compression="zstd")
        for number in range(1, 100):
            (release / f"dataset/rl/x/{number}.parquet").write_bytes((release / "dataset/rl/x/0.parquet").read_bytes())
        path = release / "dataset/rl/x/x.jsonl"
        path.touch()
        os.truncate(path, 30 << 20)
        (release / "dataset/rl/x/y.jsonl").write_text("[]\n" * 10_000_000)
        bomb(release)
        resum(release)

    return make


def endless_template(release: Path) -> None:
    BOMBS[ENDLESS][1](release / "model/chat_template.jinja")


def long_values_of_many(release: Path) -> None:
    long_values(release / "dataset/dispositions/prose/part-00000.parquet")


def below_the_growth(release: Path) -> None:
    """A table that unpacks to just less than a thousand times its bytes."""
    rows = 800_000
    columns = {name: pa.array([name]).take(pa.array([0] * rows, pa.int32())) for name in COLUMNS[1:]}
    columns["id"] = pa.array([f"{number % 4}" for number in range(rows)])
    columns["rule"] = pa.concat_arrays([pa.array([os.urandom(900_000).hex()]), columns["rule"][1:]])
    path = release / "dataset/dispositions/prose/part-00000.parquet"
    pq.write_table(pa.table(columns), path, compression="zstd")
    resum(release)


COLUMNS = ("id", "source", "license", "disposition", "split", "rule", "bytes", "kept_hash")


TREES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a checkpoint that is a link": (linked_folder("checkpoints/x"), "checkpoints/x is a link, not a regular file"),
    "a model that is a link": (linked_folder("model-x"), "model-x is a link, not a regular file"),
    "a part that is a link": (linked_folder("dataset"), "dataset is a link, not a regular file"),
    "a folder within that is a link": (linked_folder("model/evaluation"), "model/evaluation is a link, not a regular file"),
    "lists of holes": (many_lists(9_000, 32 << 20), "the checksum files up to checkpoints/x"),
    "lists of small holes": (many_lists(3_000, 20_000), "the checksum files up to checkpoints/x"),
    "one list in many folders": (many_lists(50, 14 << 20, link=True), "the checksum files up to checkpoints/x"),
    "holes below the limit": (many_holes, "dataset/rl/0.jsonl is a file of holes"),
    "one file of many names": (one_file_of_many_names, "dataset/rl/0.jsonl is not listed in dataset/SHA256SUMS"),
    "releases within": (nested_releases, "checkpoints/x0/evidence/release.json is not listed"),
    "files that give time": (with_allowances(endless_template), "cannot be checked: it does not end within"),
    "files that give memory": (with_allowances(long_values_of_many), "cannot be checked: it "),
    "a table below the limit": (below_the_growth, "cannot be checked: "),
}  # fmt: skip
SLOW_TREES = ("releases within", "files that give time")
"""Those that take all the time there is."""
ENDLESS = "endless template"
BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "deep JSON": ("evidence/gates.json", lambda p: p.write_text("[" * 100_000), "nested too deeply"),
    "long number": ("model/parity.json", lambda p: p.write_text("9" * 1_000_000), "no JSON that can be read"),
    "much JSON": ("model/parity.json", lambda p: p.write_text("[" + "[]," * 9_000_000 + "[]]"), "cannot be checked: it "),
    "key twice": ("model/config.json", lambda p: p.write_text('{"a": 1, "a": 2}'), "a key stands there twice"),
    "huge tensor": (
        "model/model.safetensors",
        lambda p: p.write_bytes(header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**120]}})),
        "its header says of a what is true of no tensor",
    ),
    "deep header": ("model/model.safetensors", lambda p: p.write_bytes(struct.pack("<Q", 90_000) + b"[" * 90_000), "nested too deeply"),
    ENDLESS: (
        "model/chat_template.jinja",
        lambda p: p.write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
        "cannot be checked: it ",
    ),
    "growing template": (
        "model/chat_template.jinja",
        lambda p: p.write_text("{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}"),
        "cannot be checked: it ",
    ),
    "rows of nothing": ("dataset/dispositions/prose/part-00000.parquet", many_rows, "bytes hold 4000000 rows"),
    "values that unpack": ("dataset/dispositions/prose/part-00000.parquet", long_values, "cannot be checked: it "),
    "no table": ("dataset/kept/prose/part-00000.parquet", lambda p: p.write_bytes(b"PAR1" + b"\xff" * 90 + b"\x40\0\0\0PAR1"), "cannot be read as Parquet"),
    "a program": ("model/LICENSE", lambda p: p.write_bytes(b"\x7fELF" + bytes(60)), "is a program by its first bytes"),
    "a library": ("dataset/x.so", lambda p: p.write_bytes(b"x"), "is code beside data or weights"),
    "compiled code": ("code/release/x.pyc", lambda p: p.write_bytes(b"x"), "is compiled code"),
    "an archive": ("dataset/x.json", lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(60)), "is an archive by its first bytes"),
    "another kind": ("checkpoints/pretrain-step-2/x.exe", lambda p: p.write_bytes(b"x"), "is of a kind that a release does not hold"),
    "a script": ("model/x.txt", lambda p: p.write_text("#!/bin/sh\n"), "is a script by its first bytes"),
    "escaped auto_map": ("model/x.json", lambda p: p.write_text('{"a": [{"auto\\u005fmap": {}}]}'), "names code to load a model with (auto_map)"),
    "auto_map in UTF-16": ("model/x.json", lambda p: p.write_bytes('{"auto_map": {}}'.encode("utf-16")), "names code to load a model with (auto_map)"),
    "a text with ESC": ("model/README.md", lambda p: p.write_text("\x1b[2J"), "is a text with characters that no text has"),
}  # fmt: skip


@cache
def server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SERVER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    atexit.register(process.kill)
    return process


def judge(folder: Path, limit: float = check_runner.SECONDS) -> list[str]:
    """All that is wrong with a folder. Fails if reporting it takes more than is promised. limit: seconds of all checks."""
    process = server()
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps([str(folder), limit]) + "\n")
    process.stdin.flush()
    verdict, seconds, megabytes = json.loads(process.stdout.readline())
    wrong = [text for check in verdict["checks"] for text in (check["detail"], *check["wrong"])]
    assert not verdict["ok"] and all(text.isprintable() for text in wrong)
    assert seconds < SECONDS and megabytes < MEGABYTES, (seconds, megabytes, wrong[:9])
    return wrong


@pytest.mark.parametrize("thing", SPECIAL)
def test_what_is_no_regular_file_is_named_and_not_read(thing: str, copy: Path) -> None:
    make, expected = SPECIAL[thing]
    for place in PLACES:
        path = copy / place
        before = path.read_bytes() if path.exists() else None
        replace(path, make)
        wrong = judge(copy)
        assert f"{place} {expected}" in "\n".join(wrong), (place, wrong[:5])
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert verify(copy).ok


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_any_format_is_reported(bomb: str, copy: Path) -> None:
    place, make, expected = BOMBS[bomb]
    replace(copy / place, make)
    resum(copy)
    # What takes all the time that there is shows its limit with less of it, too.
    wrong = judge(copy, 5.0) if bomb == ENDLESS and not SOAK else judge(copy)
    assert expected in "\n".join(wrong), wrong


@pytest.mark.parametrize(
    "tree", [pytest.param(tree, marks=at_length("release", 40) if tree in SLOW_TREES else ()) for tree in TREES]
)
def test_a_hostile_tree_is_reported(tree: str, copy: Path) -> None:
    make, expected = TREES[tree]
    make(copy)
    wrong = judge(copy)
    assert expected in "\n".join(wrong), wrong[:9]


def test_the_command_needs_little_memory_and_one_line(copy: Path) -> None:
    """The worst of them, as a user sees it; memory is that of the largest process."""
    replace(copy / "model/parity.json", lambda path: path.write_text("[" + "[]," * 9_000_000 + "[]]"))
    resum(copy)
    code = "import resource, subprocess, sys; d = subprocess.run(sys.argv[1:]); print('MB', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10); sys.exit(d.returncode)"
    command = [sys.executable, "-c", code, sys.executable, "-m", "pipeline.cli", "verify", str(copy)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 1 and int(process.stdout.split("MB ")[-1]) < 500, process.stdout[-300:]
    assert len([line for line in process.stdout.splitlines() if line.startswith("BAD")]) == 1, process.stdout


def test_names_that_no_terminal_should_see(copy: Path) -> None:
    names = [b"a\xff.json", b"b\n.json", b"c\x1b[2J.json", "d\u202ecod.json".encode()]
    for name in names:
        with open(os.fsencode(copy / "model") + b"/" + name, "w"):
            pass
    wrong = judge(copy)
    for problem in ("model/a\\udcff.json has a name that is no UTF-8", "model/b\\n.json has a name with characters",
                  "model/c\\x1b[2J.json has a name", "model/d\\u202ecod.json has a name"):  # fmt: skip
        assert any(text.startswith(problem) for text in wrong), (problem, wrong[:9])
    body = json.dumps(verify(copy).to_json(), ensure_ascii=False)
    assert body.encode() and body.isprintable()


def test_too_many_and_too_deep(copy: Path) -> None:
    (copy / "model/many").mkdir()
    for number in range(untrusted.ENTRIES + 10_000):
        os.link(copy / "LICENSE", copy / f"model/many/{number}")
    assert "entries, far more than its checksums name" in judge(copy)[0]
    shutil.rmtree(copy / "model/many")
    (copy / "model" / "/".join("d" * 60)).mkdir(parents=True)
    assert any("lies more than 32 folders deep" in text for text in judge(copy))


@pytest.mark.parametrize(
    "path",
    [".cache/x.py", ".cache/huggingface/x.json", ".cache/huggingface/download/model.safetensors", "sub/.cache/a"],
)
def test_nothing_hides_in_a_cache(path: str, built: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built / "model", tmp_path / "model"))
    for name in ("CACHEDIR.TAG", ".gitignore", "trees/0a.json", "download/a/b.metadata", "download/a/b.lock"):
        (folder / ".cache/huggingface" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / ".cache/huggingface" / name).write_text("x")
    assert verify(folder).ok  # which the Hub's client leaves there
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text("x")
    assert any(text.startswith(f"{path} lies in .cache") for text in judge(folder))


@pytest.mark.parametrize(
    "remaining",
    [("model", "dataset", "code"), ("model-base",), ("model", "model-base"), ("checkpoints",), ("dataset", "model")],
)
@pytest.mark.parametrize("mark", [None, "config.json", "index.json"])
def test_a_release_without_its_evidence_is_a_damaged_release(
    remaining: tuple[str, ...], mark: str | None, copy: Path
) -> None:
    for part in [path for path in copy.iterdir() if path.name not in remaining]:
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    if mark:
        (copy / mark).write_text("[]")
    if len(remaining) > 1:  # and with a checksum file for what is left
        paths = files_below(copy)
        subprocess.run(["sha256sum", *paths], cwd=copy, check=True, stdout=(copy / SUMS).open("w"))
    verdict = verify(copy)
    assert verdict.kind == kind_of(copy) == "release" and not verdict.ok
    assert "evidence is missing" in [text for check in verdict.checks for text in check.wrong]


def test_a_folder_of_no_known_kind_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    subprocess.run("sha256sum README.md > SHA256SUMS", shell=True, cwd=tmp_path, check=True)
    assert "nothing here tells what it is" in judge(tmp_path)[0]


MUTATIONS = st.sampled_from(["flip", "cut", "empty", "zeros", "brackets", "digits", "escape", "long", "pipe", "link"])


@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_file_in_any_way(built: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """With all checksums made anew, so that every parser sees it; nothing but our own errors may come out."""
    folder = tmp_path_factory.mktemp("any") / "release"
    shutil.copytree(built, folder)
    name = data.draw(st.sampled_from(files_below(folder)))
    path, how = folder / name, data.draw(MUTATIONS)
    body = path.read_bytes()
    at = data.draw(st.integers(0, max(0, len(body) - 1)))
    texts = {
        "flip": body[:at] + bytes([(body[at] if body else 0) ^ 255]) + body[at + 1 :], "cut": body[:at], "empty": b"",
        "zeros": bytes(len(body)), "brackets": body[:at] + b"[" * 50_000 + body[at:],
        "digits": body[:at] + b"9" * 10_000 + body[at:], "escape": body[:at] + b"\x1b]0;x\x07" + body[at:],
        "long": body * 50,
    }  # fmt: skip
    if how in texts:
        if texts[how] == body:
            return
        path.write_bytes(texts[how])
    else:
        replace(path, lambda p: os.mkfifo(p) if how == "pipe" else p.symlink_to("/dev/zero"))
    if data.draw(st.booleans()) and how in texts:
        resum(folder)
    verdict = verify(folder)
    assert all(text.isprintable() for check in verdict.checks for text in (check.detail, *check.wrong))
    source = name.startswith("code/") or name.endswith((".md", SUMS, "LICENSE"))  # which a maker may write as he likes
    assert not verdict.ok or source or "metrics" in name or "environment" in name or "recipe" in name, (name, how)
    shutil.rmtree(folder)


def test_a_check_may_take_what_belongs_to_the_files_that_it_reads(tmp_path: Path) -> None:
    """And none of what its neighbors read, what holes pretend, or what a second name says once more."""
    for path in ("a/x.parquet", "b/y.parquet", "a/x.json", "b/y.jsonl", "a/x.safetensors"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(os.urandom(1 << 20))
    hole(tmp_path / "a/hole.json")
    (tmp_path / "a/again.json").hardlink_to(tmp_path / "a/x.json")
    runner = CheckRunner(Release(tmp_path), untrusted.scan(tmp_path, 0), deep=False)
    runner.tables = {"a/x.parquet": (1 << 40, 1 << 40), "b/y.parquet": (10, 1000)}
    assert runner._allowance(NOTHING_LARGE) == Budget(0, 0)
    small = runner._allowance(Reads(("b/",)))
    assert small.memory == 2 * 1000 + (2 << 20) and small.seconds < 0.2
    large = runner._allowance(Reads(("a/",)))
    assert large.memory == (8 << 20) + (64 << 20) and 1 < large.seconds < 1.5
    assert runner._allowance(Reads(("a/",), weights=True)).memory == large.memory + (3 << 20)


def test_checks_that_come_after_all_time_is_spent_are_not_ok(tmp_path: Path) -> None:
    runner = CheckRunner(Release(tmp_path), untrusted.scan(tmp_path, 0), deep=False)
    runner.seconds = 0.0
    first, second = (runner.run(name, lambda: CheckResult("x", True, "holds")) for name in ("one", "two"))
    assert first.ok is False and "comes after checks that took 20 s" in first.detail
    assert second.ok is None and "not checked, because one took all the time" in second.detail


def test_a_confined_call_ends() -> None:
    budget = Budget(64 << 20, 1.0)
    assert check_runner.run_limited(lambda: {"a": [1, "é"]}, budget)[0] == {"a": [1, "é"]}

    def loop() -> None:
        while True:
            pass

    for call, expected in (
        (loop, "does not end within 1 s of processor time"),
        (lambda: len(bytearray(200 << 20)), "needs more than 64 MB of memory"),
        (lambda: os.abort(), "needs more than 64 MB of memory"),
        (lambda: os.kill(os.getpid(), 11), "ends by SIGSEGV in the library that reads it"),
        (lambda: os._exit(3), "ends without a result"),
    ):
        with pytest.raises(CheckFailed, match=expected):
            check_runner.run_limited(call, budget)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        check_runner.run_limited(lambda: 1 // 0, budget)


def test_a_confined_call_ends_nothing_of_its_parent() -> None:
    """What the parent no longer uses, but has not collected yet, is not ended in the child: it may wait for threads
    that only the parent has, as groups of ranks do."""

    class Group:
        def __init__(self) -> None:
            self.itself, self.ended = self, threading.Event()

        def __del__(self) -> None:
            self.ended.wait(60)

    gc.collect()
    gc.disable()
    try:
        group = Group()
        ended = group.ended
        del group
        assert check_runner.run_limited(lambda: gc.collect() >= 0, Budget(64 << 20, 0.5))[0] is True
    finally:
        ended.set()
        gc.enable()


def test_text_that_is_safe_to_print() -> None:
    assert text.printable("é 漢 a") == "é 漢 a"
    assert text.printable("a\x1b\n\u202e\udcff\u2028\x9b") == "a\\x1b\\n\\u202e\\udcff\\u2028\\x9b"
    assert len(text.printable("x" * 10_000_000)) < 1000
    with pytest.raises(CheckFailed, match="is not a regular file"):
        untrusted.read(Path("/dev/zero"), 10, follow=True)


def test_a_place_without_temporary_folders_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with pytest.raises(MachineError, match="No such file or directory; set TMPDIR"), scratch.folder():
        pass
