"""A damaged file under `$ATOM_HOME` is named in one sentence, and stops nothing but what needs it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core import events, input_integrity, json_files, os_errors, provenance, source_code
from pipeline.core.errors import AtomError, Kind
from pipeline.core.events import EVENT, Tail
from pipeline.core.json_files import Damaged
from pipeline.core.lease import Lease, holder
from pipeline.core.store import Store
from pipeline.graph import run as runs
from pipeline.graph.dag import Graph
from pipeline.launch import submission_lock
from pipeline.launch.diagnoses import failure_kind, failure_message
from tests.fixtures import home_fixtures
from tests.fixtures.run_fixtures import SOAK, at_length, atom

pytestmark = pytest.mark.filterwarnings("ignore::pipeline.core.json_files.DamagedFile")


def replace(path: Path, make: Callable[[], object]) -> None:
    path.unlink()
    make()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda p: p.write_bytes(b""),
    "cut": lambda p: os.truncate(p, p.stat().st_size * 2 // 3),
    "a list": lambda p: p.write_text("[]\n"),
    "an object": lambda p: p.write_text("{}\n"),
    "a number": lambda p: p.write_text("1e400\n"),
    "other types": lambda p: p.write_text(
        json.dumps({"id": 3, "key": [], "nodes": {}, "files": 1, "event": {}, "pid": "x", "predicate": []}) + "\n"
    ),
    "deep brackets": lambda p: p.write_text("[" * 100_000 + "\n"),
    "a huge integer": lambda p: p.write_text("9" * 10_000 + "\n"),
    "half a character": lambda p: p.write_text('{"id": "\\ud800"}\n'),
    "binary": lambda p: p.write_bytes(bytes(range(256)) * 8 + b"\n"),
    "a directory": lambda p: replace(p, p.mkdir),
    "a link that leads nowhere": lambda p: replace(p, lambda: p.symlink_to("nowhere")),
    "a link to itself": lambda p: replace(p, lambda: p.symlink_to(p)),
    "a pipe": lambda p: replace(p, lambda: os.mkfifo(p)),
    "a device": lambda p: replace(p, lambda: p.symlink_to("/dev/zero")),
}


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    return home_fixtures.graphs(tmp_path_factory.mktemp("recipes"))[0]


@pytest.fixture(scope="module")
def undamaged_home(composed: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with two runs, of which the latest stopped in the middle of filtering, and a release."""
    store = Store(tmp_path_factory.mktemp("whole") / "home")
    selected = composed.select("items", None)
    home_fixtures.start(store, composed, selected)
    home_fixtures.release(store, composed, selected)
    home_fixtures.start(store, composed, composed.select("filter", None), "filter")
    lease = Lease.take(store.work(composed.nodes["filter"].key))
    assert lease
    lease.release()
    return store.home


@pytest.fixture
def home(undamaged_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undamaged_home, tmp_path / "home"))


FILES = {
    "ledger/items-*/*.json": ("status", "plan", "gc"),
    "artifacts/items-*/manifest.json": ("status", "plan", "gc"),
    "work/filter-*/lease.1": ("status", "gc"),
    "logs/one-*/run.json": ("status", "gc"),
    "logs/one-*/filter/events.jsonl": ("status",),
    "releases/one-0.1.0/evidence/release.json": ("gc",),
    "releases/one-0.1.0/evidence/manifests/items.json": ("gc",),
}
"""Files, and the commands that read them."""


@pytest.mark.parametrize("pattern", list(FILES)[:: 1 if SOAK else 3])
def test_every_command_names_a_damaged_file_and_goes_on(
    home: Path, composed: Graph, pattern: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, since there are 300 cases; what a user gets is looked at below."""
    from typer.testing import CliRunner

    from pipeline.cli import main

    path = max(home.glob(pattern))
    original = path.read_bytes()
    monkeypatch.setenv("ATOM_HOME", str(home))
    arguments = {"status": ["status"], "plan": ["plan", str(composed.recipe.path)], "gc": ["gc"]}
    for damage, do in DAMAGES.items():
        do(path)
        for command, line in arguments.items():
            json_files._reported.clear()
            with pytest.warns() as warned:
                json_files.report(Damaged(Path("always"), "one"), "so that there is one")
                result = CliRunner().invoke(main.app, line)
            text = " ".join([result.output, str(result.exception), *(str(each.message) for each in warned)])
            text = text.replace("\n", " ")
            case = f"{pattern}, {damage}, {command}: {text}"
            if pattern.endswith("run.json") and command == "status":  # no older run is shown in the place of the latest
                assert isinstance(result.exception, Damaged) and "is the latest run: name another" in text, case
            else:
                assert result.exit_code == 0 and result.exception is None, case
            if command in FILES[pattern] and not (pattern.endswith("events.jsonl") and damage == "emptied"):
                assert str(path) in text and "is damaged" in text, case
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(original)


def without_privilege(*command: str) -> list[str]:
    """A command that no permission is given to, even if root runs the tests."""
    if os.geteuid():
        return list(command)
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to run as less")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]


UNREADABLE = ["logs/*/run.json", "ledger/items-*", "ledger/items-*/*.json", "work/filter-*"]


@pytest.mark.parametrize("pattern", UNREADABLE if SOAK else UNREADABLE[:1])
def test_what_may_not_be_read_is_named(home: Path, composed: Graph, pattern: str) -> None:
    path = max(home.glob(pattern), key=lambda each: each.lstat().st_mtime_ns)
    path.chmod(0)
    for line in (["status"], ["plan", str(composed.recipe.path)], ["gc"]):
        command = without_privilege(sys.executable, "-m", "pipeline.cli", *line)
        process = subprocess.run(command, env={**os.environ, "ATOM_HOME": str(home)}, capture_output=True, text=True)
        latest_is_gone = pattern.endswith("run.json") and line == ["status"]
        assert process.returncode == (2 if latest_is_gone else 0) and "Traceback" not in process.stderr, process.stderr
        if line == ["gc"]:
            assert f"{path} is damaged (Permission denied)" in process.stderr, process.stderr


def test_a_run_that_needs_what_is_damaged_says_so(home: Path, composed: Graph) -> None:
    store, recipe = Store(home), str(composed.recipe.path)
    sums = composed.nodes["acquire-sums"].key
    manifest = store.artifacts / sums / "manifest.json"
    manifest.write_text("[]")
    process = atom(home, "run", recipe, "--until", "filter", code=2)
    (sentence,) = process.stderr.splitlines()
    assert sentence.startswith(f"atom: stage acquire-sums cannot be run: {manifest} is damaged"), process.stderr
    assert f"--include {sums}" in sentence
    plan = json.loads(atom(home, "plan", recipe, "--json").stdout)["stages"]
    assert {row["name"]: row["state"] for row in plan}["acquire-sums"] == "damaged"
    atom(home, "gc", "--delete", "--yes", "--include", sums)
    assert not store.sealed(sums)
    atom(home, "run", recipe, "--until", "acquire-sums")
    store.open(sums).verify()


def test_submit_and_retry_name_what_is_damaged(home: Path, composed: Graph) -> None:
    """Everything else is sealed, so that Slurm is not asked."""
    store, key = Store(home), composed.nodes["acquire-sums"].key
    manifest = store.artifacts / key / "manifest.json"
    manifest.write_text("[]")
    submit = ("submit", str(composed.recipe.path), "--cluster", "dev", "--until", "acquire-sums")
    runs.start(composed, store, ["acquire-sums"], "dev", {"launcher": "slurm"}).note_job("acquire-sums", "7", False)
    for line in (submit, ("retry",)):
        process = atom(home, *line, code=2)
        assert process.stderr.startswith(f"atom: stage acquire-sums cannot be run: {manifest} is damaged")
        assert f"--include {key}" in process.stderr and process.stderr.count("\n") == 1


def test_a_run_that_cannot_be_read_stops_only_who_asks_for_it(home: Path) -> None:
    path = max(home.glob("logs/*/run.json"))
    path.write_text("{}")
    process = atom(home, "status", path.parent.name, code=2)
    assert process.stderr.count("\n") == 1 and str(path) in process.stderr


@at_length("release", 25)
def test_a_flipped_bit_of_an_input_is_named_once_a_run(home: Path, composed: Graph) -> None:
    store = Store(home)
    for name in composed.nodes["filter"].inputs.values():
        shutil.rmtree(store.artifacts / composed.nodes[name].key)
    recipe = str(composed.recipe.path)
    atom(home, "run", recipe, "--until", "items")
    key = composed.nodes["items"].key
    file = max(path for path in (store.artifacts / key).rglob("*") if path.name != "manifest.json" and path.is_file())
    before, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    process = atom(home, "run", recipe, "--until", "filter", code=2)
    assert f"artifact {key}: file {file.relative_to(store.artifacts / key)} is damaged" in process.stderr, (
        process.stderr
    )
    assert "Traceback" not in process.stdout + process.stderr and not store.sealed(composed.nodes["filter"].key)


def test_inputs_are_hashed_once_a_run_and_again_when_they_change(
    home: Path, composed: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, run, hashed = Store(home).open(composed.nodes["items"].key), tmp_path / "run", []
    real = input_integrity.sha256_file
    monkeypatch.setattr(input_integrity, "sha256_file", lambda path, *_: hashed.append(path.name) or real(path))
    input_integrity.check(run, [artifact])
    assert hashed == ["file"]
    input_integrity.check(run, [artifact])
    assert hashed == ["file"], "once a run"
    os.utime(artifact / "file", ns=(1, 1))
    input_integrity.check(run, [artifact])
    assert hashed == ["file"] * 2, "its time changed"
    input_integrity.check(tmp_path / "another", [artifact])
    assert hashed == ["file"] * 3, "another run"
    max((run / "hashed").glob("*.json")).write_text("[]")
    input_integrity.check(run, [artifact])
    assert hashed == ["file"] * 4, "a damaged record is not believed"
    input_integrity.note(tmp_path / "third", artifact)
    input_integrity.check(tmp_path / "third", [artifact])
    assert hashed == ["file"] * 4, "sealed in this run"
    (artifact / "file").write_bytes((artifact / "file").read_bytes().replace(b"items", b"itemz", 1))
    with pytest.raises(AtomError, match="file file is damaged: it has the SHA-256"):
        input_integrity.check(run, [artifact])


def test_a_record_that_cannot_be_written_is_a_warning(home: Path, composed: Graph, tmp_path: Path) -> None:
    """As on a disk that is full once the artifact is sealed."""
    artifact = Store(home).open(composed.nodes["items"].key)
    (tmp_path / "hashed").touch()
    with pytest.warns(UserWarning, match="is not written down .*hashed again"):
        input_integrity.note(tmp_path, artifact)


def test_of_many_tasks_each_file_is_hashed_by_one(home: Path, composed: Graph, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.core import input_integrity as intact; from pipeline.core.store import Artifact\n"
        "intact.PART_BYTES, real = 1, intact.sha256_file\n"
        "intact.sha256_file = lambda path, *_: sys.stdout.write(f'hashed {path.parent.name}\\n') and real(path)\n"
        "intact.check(Path(sys.argv[1]), [Artifact.open(Path(p)) for p in sys.argv[2:]])"
    )
    folders = sorted(str(path) for path in (home / "artifacts").iterdir())
    command = [sys.executable, "-c", code, str(tmp_path / "run"), *folders]
    tasks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    lines = [
        line for task in tasks for line in task.communicate(timeout=200)[0].splitlines() if line.startswith("hashed")
    ]
    assert all(task.returncode == 0 for task in tasks)
    assert sorted(lines) == [f"hashed {Path(folder).name}" for folder in folders]


def mounted(script: str) -> str:
    """The output of a shell that may mount."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make a mount namespace")
    process = subprocess.run([*space, "sh", "-ec", script], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


@at_length("release", 13)
def test_looking_writes_nothing(home: Path, composed: Graph) -> None:
    """On a file system that is read-only, and on one that is full."""
    python, recipe = f"{sys.executable} -m pipeline.cli", composed.recipe.path
    look = f"{python} status; {python} plan {recipe} > /dev/null; {python} gc; "
    output = mounted(
        f"export ATOM_HOME={home}; mount --bind {home} {home}; mount -o remount,bind,ro {home}; {look}"
        f"{python} run {recipe} --until filter && exit 1; test $? = 2"
    )
    assert output.count("run one-") == 1 and "Traceback" not in output
    assert "cannot be written now" in output.splitlines()[-1], output
    full = home.parent / "full"
    full.mkdir()
    output = mounted(
        f"mount -t tmpfs -o size=4m none {full}; cp -a {home}/. {full}; export ATOM_HOME={full}; "
        f"cat /dev/zero > {full}/rest 2> /dev/null || true; {look}"
        f"{python} run {recipe} --until filter && exit 1; test $? = 2"
    )
    assert output.count("run one-") == 1 and "Traceback" not in output and "is full" in output.splitlines()[-1], output


@pytest.mark.parametrize("number", ["EROFS", "EDQUOT", "ENOSPC", "EIO", "ESTALE"])
def test_what_a_disk_refuses_is_one_sentence_from_wherever_it_arises(tmp_path: Path, number: str) -> None:
    code = getattr(errno, number)
    direct = OSError(code, os.strerror(code), str(tmp_path / "home" / "x"))
    wrapped = RuntimeError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    behind = AtomError("a checkpoint cannot be written")
    behind.__cause__ = direct
    for error in (direct, wrapped, behind):
        message = failure_message(error, "pretrain", Store(tmp_path / "home"))
        assert str(tmp_path / "home") in message and "a bug" not in message and "\n" not in message, message
        assert os_errors.find(error, tmp_path / "home") == os_errors.Fault(Kind.MACHINE, message)
    hidden = KeyError("x")
    hidden.__context__, hidden.__suppress_context__ = direct, True
    assert "a bug in stage pretrain" in failure_message(hidden, "pretrain", Store(tmp_path / "home"))


def test_a_missing_file_of_our_own_code_stays_a_bug(tmp_path: Path) -> None:
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/x")
    assert "a bug in stage pretrain" in failure_message(error, "pretrain", Store(tmp_path))
    inside = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    assert "cannot be used (Permission denied)" in failure_message(inside, "pretrain", Store(tmp_path))
    beside = PermissionError(errno.EACCES, "Permission denied", f"{tmp_path}-old/x")
    assert "a bug in stage pretrain" in failure_message(beside, "pretrain", Store(tmp_path)), "of another home"
    for number in (errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTDOWN):
        network = OSError(number, os.strerror(number))
        message = failure_message(network, "pretrain", Store(tmp_path))
        assert "file server" not in message and "by its machine or network" in message, "a network is no disk"
        assert failure_kind(network, Store(tmp_path)) is Kind.MACHINE


@pytest.mark.parametrize(
    ("line", "of_the_user"),
    [
        (["run", "{here}/recipe.yaml"], False),
        (["verify", "{here}/elsewhere"], True),
        (["sign", "r", "--key={here}/elsewhere/x"], True),
        (["verify", "{here}/else"], False),
    ],
    ids=str,
)
def test_only_a_path_of_the_command_line_or_the_home_is_the_users_mistake(
    line: list[str], of_the_user: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other file that is missing is a bug of ours, whose traceback is needed."""
    from pipeline.cli import main

    def fails() -> None:
        (tmp_path / "elsewhere" / "x").read_text()

    monkeypatch.setenv("ATOM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", ["atom", *(word.format(here=tmp_path) for word in line)])
    monkeypatch.setattr(main, "app", fails)
    monkeypatch.setattr(main.warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit if of_the_user else FileNotFoundError):
        main.main()


def test_a_damaged_claim_is_reported(tmp_path: Path) -> None:
    store, key = Store(tmp_path), "pretrain-000000000000"
    submission_lock.folder(store).mkdir()
    (submission_lock.folder(store) / f"{key}.json").write_text("{}")
    with pytest.warns(UserWarning, match="whether a job makes this key is not known"):
        assert submission_lock.read(store, key) is None


@pytest.mark.parametrize(
    "body", ["[]", "{}", '{"host": 1}', json.dumps({"host": "h", "boot": "b", "pid": -1, "start": None})]
)
def test_a_lease_that_is_none_counts_until_it_is_old(tmp_path: Path, body: str) -> None:
    (tmp_path / "lease.1").write_text(body)
    (tmp_path / "lease.²").touch()
    present = holder(tmp_path)
    assert present and present.alive and Lease.take(tmp_path) is None
    os.utime(tmp_path / "lease.1", (1, 1))
    lease = Lease.take(tmp_path)
    assert lease and lease.number == 2
    lease.release()


def test_lines_of_events_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    good = {"time": 1.0, "event": "progress", "done": 1, "total": 2, "unit": "steps"}
    bad = [
        "[]",
        "{",
        "\ud800",
        json.dumps({**good, "done": "1"}),
        json.dumps({**good, "total": 10**400}),
        "x" * 3 * 2**20,
    ]
    path = tmp_path / "events.jsonl"
    lines = [json.dumps(good), *bad, json.dumps({**good, "done": 2})]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass") + b'{"time": ')
    tail = Tail(path, EVENT)
    assert [row["done"] for row in tail.read()] == [1, 2] and tail.cut
    with open(path, "a") as file:
        file.write('2, "event": "note", "text": "on"}\n')
    assert [row["event"] for row in tail.read()] == ["note"] and not tail.cut


def test_of_a_huge_file_of_events_the_end_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, begun = tmp_path / "events.jsonl", time.monotonic()
    path.touch()
    os.truncate(path, 2**40)
    tail = Tail(path, EVENT)
    with pytest.warns(json_files.DamagedFile, match="has more than 67,108,864 bytes; only the last ones are read"):
        assert tail.read() == []
    line = json.dumps({"time": 1.0, "event": "x"}) + "\n"
    with open(path, "a") as file:
        file.write(f"\n{line}")
    assert len(tail.read()) == 1 and not tail.cut and len(Tail(path, EVENT).read()) == 1
    assert time.monotonic() - begun < 20
    path.write_text(line * 10)
    monkeypatch.setattr(events, "ONE_READ", len(line) * 4)
    from_start = Tail(path, EVENT, whole=True)
    assert [(len(from_start.read()), from_start.has_more) for _ in range(3)] == [(4, True), (4, True), (2, False)]


def test_a_statement_is_believed_only_under_its_name(home: Path, composed: Graph) -> None:
    store, key = Store(home), composed.nodes["items"].key
    (path,) = (store.ledger / key).iterdir()
    path.write_text(path.read_text().replace('"text":"sealed"', '"text":"Sealed"'))
    assert provenance.statements(store.ledger, key)[0] == [] and not list(provenance.read(store.ledger, key))


def test_an_odd_name_is_printed_in_one_line(tmp_path: Path) -> None:
    assert json_files.printable(os.fsdecode(b"/a\n\x1b[31m\xff")) == r"/a\n\x1b[31m\xff"


def test_a_socket_is_no_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(Damaged):
            json_files.read_bytes(tmp_path / "s")


def test_frozen_code_that_was_altered_is_not_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    folder = source_code.freeze(store, {"recipes/x.yaml": b"x"})
    assert source_code.freeze(store, {"recipes/x.yaml": b"x"}) == folder
    file = folder / "pipeline" / "core" / "store.py"
    file.unlink()
    file.write_text("")
    with pytest.raises(Damaged, match="it is not the code that was frozen"):
        source_code.freeze(store, {"recipes/x.yaml": b"x"})


NO_FOLDERS: dict[str, Callable[[Path], object]] = {
    "a file": lambda p: p.touch(),
    "a pipe": lambda p: os.mkfifo(p),
    "a link to itself": lambda p: p.symlink_to(p),
    "a link that leads nowhere": lambda p: p.symlink_to("/unmounted/x"),
}


@pytest.mark.parametrize("kind", NO_FOLDERS)
@pytest.mark.parametrize("place", ["work", "artifacts"])
def test_what_stands_where_a_folder_should_be_is_named(tmp_path: Path, place: str, kind: str) -> None:
    store = Store(tmp_path / "home")
    (tmp_path / "home").mkdir()
    NO_FOLDERS[kind](store.home / place)
    with pytest.raises(OSError) as raised:
        Lease.take(store.home / place / ("key-1" if place == "work" else ""))
    message = failure_message(raised.value, "pretrain", store)
    assert message.startswith(f"{store.home / place}") and "cannot be used (" in message, message


def test_a_file_in_the_place_of_a_folder_is_one_sentence_of_every_command(home: Path, composed: Graph) -> None:
    recipe, key = str(composed.recipe.path), composed.nodes["acquire-sums"].key
    shutil.rmtree(home / "artifacts" / key)
    (home / "work").mkdir(exist_ok=True)
    (home / "work" / key).touch()
    process = atom(home, "run", recipe, "--until", "acquire-sums", code=2)
    assert f"{home / 'work' / key} cannot be used (" in process.stderr.splitlines()[-1], process.stderr
