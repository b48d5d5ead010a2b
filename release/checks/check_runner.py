"""Runs each check of untrusted bytes in a process of its own, with limits on its time and memory.

Parsers of Parquet, YAML, certificates or templates have no bounds on time and memory. A child that exceeds its limit of
processor time, additional memory or wall-clock time is ended, and the error is one sentence. Some limits are fixed, and
some depend on the size of the files that a check reads.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed, installing
from release.checks.check import HOLDS, NOTHING_LARGE, Absent, Check, Findings, Reads
from release.checks.verdict import CheckResult, answer
from release.opened_release import Release
from release.untrusted import Tree, real_bytes

LIBRARIES = (
    "jinja2.ext",
    "jinja2.sandbox",
    "numpy",
    "pandas",
    "pyarrow.acero",
    "pyarrow.compute",
    "pyarrow.dataset",
    "pyarrow.parquet",
)
"""What most checks import."""
STATUS = "/proc/self/status"
WAITING = 5
"""Wall-clock seconds for each second of processor time, because other processes use the processor as well."""
SECONDS, MEMORY = 20.0, 192 << 20
"""The processor time of all checks together, and the memory of each check in bytes."""
TEXT_SECONDS, TEXT_GROWTH, TEXT_MEMORY = 1e-7, 8, 128 << 20
"""The additional limits for each byte of JSON that a check reads, up to a maximum of memory."""
LOG_GROWTH = 2
"""Bytes of memory for each byte of the longest log (.jsonl); a check keeps a part of it."""
ROW_SECONDS, TABLE_SECONDS, TABLE_GROWTH = 1e-4, 1e-6, 64
"""Seconds for each row of tables, up to those for each byte of them. Bytes of memory for each byte, up to the unpacked
size."""
DEEP = 5
"""The factor on the limits of checks of tables and logs that compare rows with rows."""
TENSOR_SECONDS, TENSOR_GROWTH = 2e-8, 3
"""Seconds for each byte of weights, and bytes of memory for each byte of the largest weight file."""
ROW_BYTES, VALUE_BYTES = 300, 100
"""Bytes of a row as Python objects, and of each value in it: measured on tables of text and numbers."""
GROWTH = 1000
"""The maximum growth factor of a table. Orders, the densest published tables, grow by 200 to 300."""
SMALL = 32 << 20
"""A table may grow to this size in any case."""


@dataclass(frozen=True)
class Budget:
    """The limits of a call.

    Attributes:
        memory: Bytes beyond those in use at the start.
        seconds: Seconds of processor time.
    """

    memory: int
    seconds: float


def missing_limits() -> str:
    """Returns the name of what this platform lacks for limits on a child; "" on Linux."""
    return "" if os.path.exists(STATUS) else f"{STATUS}, which Linux has"


def run_limited(call: Callable[[], Any], budget: Budget) -> tuple[Any, float]:
    """Returns the result of `call`, which must be JSON, and its processor time.

    The call runs in a fork: it sees the state of this process and does not change it. Raises CheckFailed if the
    budget does not suffice, or if the child is killed.

    Where `missing_limits` names something, the call runs in this process, without limits, in no time.
    """
    if missing_limits():
        return call(), 0.0
    # Else the child would write the buffered text of its parent a second time.
    sys.stdout.flush()
    sys.stderr.flush()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        _child(call, budget, write_end)
    os.close(write_end)
    # Stays None if this process is interrupted while it waits; the child is then killed as well.
    data = None
    try:
        data = _receive(read_end, time.monotonic() + 10 + WAITING * budget.seconds)
    finally:
        os.close(read_end)
        if data is None:
            # A child that is late may ignore every other signal.
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    if data is None:
        raise CheckFailed(f"does not end within {10 + WAITING * budget.seconds:.0f} s")
    # The line feed is written last: without it the child ended in the middle of its answer.
    if not data.endswith(b"\n"):
        raise CheckFailed(_reason(os.waitstatus_to_exitcode(status), budget))
    body = json.loads(data)
    # An error of this program, and not a finding about the file.
    if "bug" in body:
        raise RuntimeError(body["bug"])
    if "memory" in body:
        raise CheckFailed(_too_large(budget))
    return body["value"], usage.ru_utime + usage.ru_stime


def _receive(descriptor: int, deadline: float) -> bytes | None:
    """Returns all output of the child; None if it does not end in time."""
    parts: list[bytes] = []
    while (remaining := deadline - time.monotonic()) > 0 and select.select([descriptor], [], [], remaining)[0]:
        part = os.read(descriptor, 1 << 16)
        if not part:
            return b"".join(parts)
        parts.append(part)
    return None


def _child(call: Callable[[], Any], budget: Budget, write_end: int) -> None:
    """Runs `call` in the child process, sends its result to the parent, and ends the process; never returns."""
    body: dict[str, Any]
    gc.freeze()  # collections in the child do not end objects of its parent, whose threads it has not, and are quick
    try:
        _limit(budget)
        body = {"value": call()}
    except MemoryError:
        body = {"memory": True}
    except BaseException:  # an AtomError: the parent raises it
        body = {"bug": traceback.format_exc()}
    try:
        with os.fdopen(write_end, "wb") as file:
            file.write(json.dumps(body).encode() + b"\n")
    finally:
        # No handler of the parent may run in the child: it shares its files and temporary folders.
        os._exit(0)


def _limit(budget: Budget) -> None:
    faulthandler.disable()
    # The handlers are the parent's, and would do its cleaning up in the child.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXCPU):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a crashing library prints much
        os.dup2(null, descriptor)
    if torch := sys.modules.get("torch"):  # the fork has none of its threads
        torch.set_num_threads(1)
    if pyarrow := sys.modules.get("pyarrow"):
        pyarrow.set_cpu_count(1)
        pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve a gigabyte at once
    set_limits(budget)


def set_limits(budget: Budget) -> None:
    """Limits this process."""
    # The limit counts from the start of the process, so what it has used already is added.
    seconds = max(1, round(budget.seconds + time.process_time()))
    # A library that crashes on a crafted file must not leave a large core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The soft limit sends a signal that a process may ignore; the hard one, a second later, kills it.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    # What is in use at the fork belongs to the parent and is not the fault of the file.
    data_limit = _data_bytes() + budget.memory
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    data_limit = data_limit if hard == resource.RLIM_INFINITY else min(data_limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (data_limit, data_limit))


def _data_bytes() -> int:
    """Returns the private writable memory of this process, which RLIMIT_DATA counts."""
    with open(STATUS) as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData:"))


def _reason(code: int, budget: Budget) -> str:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"does not end within {budget.seconds:.0f} s of processor time"
    # Libraries in C++ abort when they get no memory.
    if code == -signal.SIGABRT:
        return _too_large(budget)
    if code < 0:
        return f"ends by {signal.Signals(-code).name} in the library that reads it"
    return "ends without a result in the library that reads it"


def _too_large(budget: Budget) -> str:
    return f"needs more than {budget.memory >> 20} MB of memory"


def run_check(name: str, question: Callable[[], Findings]) -> CheckResult:
    """Runs a check of untrusted files."""
    return guarded(name, lambda: _result(name, question()))


def _result(name: str, findings: Findings) -> CheckResult:
    problems, skipped = findings.problems, [f"skipped: {reason}" for _, reason in sorted(findings.skipped.items())]
    ok = not problems if problems or findings.compared else None
    detail = "there is nothing to compare" if ok is None and findings.detail == HOLDS else findings.detail
    return CheckResult(name, ok, problems[0] if problems else detail, problems, skipped)


def guarded(name: str, question: Callable[[], CheckResult]) -> CheckResult:
    """Returns the result of a question about untrusted files, whatever it raises.

    Checksums prove nothing about content, so a malformed file is a finding.
    """
    try:
        return question()
    except ImportError as error:
        lacking = error.name or error
        return CheckResult(name, None, f"not checked, because it needs {lacking}; {installing('train')}")
    except CheckFailed as error:
        return answer(name, [str(error)])
    except Absent as error:
        return CheckResult(name, None, str(error))
    # Not about the file: the limit on memory, which `run_limited` reports, or the user, who ends the run.
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a parser in Rust is no Exception, nor is SystemExit
        return answer(name, [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"])


def load_libraries(names: Sequence[str] = LIBRARIES) -> None:
    """Imports libraries of checks once, so that not every check process imports them within its limits.

    A check says itself which of them it lacks.
    """
    for name in names:
        # Whatever is wrong with a library is wrong again in the check that needs it, which reports it.
        with suppress(Exception):
            importlib.import_module(name)


class CheckRunner:
    """Runs each check in a process of its own, within a budget.

    The budget is the rest of SECONDS, and an allowance for the files that this check reads, by their bytes on the disk.
    After a check has exceeded it, no further check runs.

    Attributes:
        release: The folder that is checked.
        tree: Its files.
        deep: Whether the checks of `--deep` run.
        seconds: The rest of the shared processor time.
        tables: {table: (rows, bytes that reading it takes)}
        spent: The reason why no further check runs; "" while they may.
        unlimited: What this platform lacks for limits, "" on Linux; without them checks run in this process, and
            `limits` says so.
    """

    def __init__(self, release: Release, tree: Tree, deep: bool) -> None:
        self.release, self.tree, self.deep = release, tree, deep
        self.seconds = SECONDS
        self.tables: dict[str, tuple[int, int]] = {}
        self.spent = ""
        self.unlimited = missing_limits()

    def ask(self, check: Check) -> CheckResult:
        """Returns the result of a registered check, which applies to the folder."""

        def question() -> CheckResult:
            return run_check(check.name, lambda: check.function(self.release))

        if not check.confined:
            return question()
        load_libraries(check.libraries)
        return self.run(check.name, question, check.reads_of(self.release))

    def run(self, name: str, question: Callable[[], CheckResult], reads: Reads = NOTHING_LARGE) -> CheckResult:
        if self.spent:
            return CheckResult(name, None, f"not checked, because {self.spent}")
        try:
            # The result comes from another process as JSON.
            answered = self._run_confined(lambda: asdict(guarded(name, question)), self._allowance(reads))
            return CheckResult(**answered)
        except CheckFailed as error:
            # Every further check could cost as much, so none runs.
            self.spent = f"{name} took all the time or memory that there is"
            return answer(name, [f"cannot be checked: it {error}"])

    def _run_confined(self, call: Callable[[], Any], budget: Budget) -> Any:
        """Returns the result of `call`.

        `budget` is its allowance beside the shared one. Raises CheckFailed if the call exceeds both.
        """
        # The shared time is spent: a file that costs each check a little must not cost all of them much.
        if self.seconds <= 0:
            raise CheckFailed(f"comes after checks that took {SECONDS:.0f} s of processor time")
        result, seconds = run_limited(call, Budget(MEMORY + budget.memory, self.seconds + budget.seconds))
        # Only what goes beyond the allowance for its own files counts against the time of all checks.
        self.seconds -= max(0.0, seconds - budget.seconds)
        return result

    def limits(self) -> Iterator[CheckResult]:
        """Yields a skipped check about the limits themselves, where there are none."""
        if self.unlimited:
            reason = f"needs {self.unlimited}: the checks ran without limits on their time and memory"
            yield CheckResult("limits", None, reason)

    def check_tables(self) -> Iterator[CheckResult]:
        """Checks that the unpacked size of tables is plausible for their bytes; the sizes are then known."""
        paths = sorted(path for path in self.tree.files if path.endswith(".parquet"))
        load_libraries()
        if not paths or self.spent:
            return
        try:
            body = self._run_confined(lambda: self._table_sizes(paths), Budget(0, 0))
        except CheckFailed as error:
            self.spent = "tables took all the time or memory that there is"
            yield answer("tables", [f"cannot be checked: it {error}"])
            return
        self.tables = body["tables"]
        rows = sum(count for count, _ in self.tables.values())
        yield answer("tables", body["wrong"], f"{len(paths)} tables, {rows} rows")
        # The allowances of later checks follow from these sizes, so without them none may run.
        if body["wrong"]:
            self.spent = "a table cannot be read"

    def _table_sizes(self, paths: list[str]) -> dict[str, Any]:
        """Returns the result of `table_sizes`, with a sentence in `wrong` if it fails."""
        body: dict[str, Any] = {"tables": {}}

        def question() -> CheckResult:
            body.update(table_sizes(self.release.root, paths))
            return answer("tables", body["wrong"])

        result = guarded("tables", question)
        return {**body, "wrong": result.wrong or [result.detail] * (result.ok is None)}

    def _allowance(self, reads: Reads) -> Budget:
        """Returns the allowance of a check for the files that it reads."""
        paths = [path for path in self.tree.files if path.startswith(reads.places)]
        texts = real_bytes(self.tree.files[path] for path in paths if path.endswith(".json"))
        logs = [real_bytes([self.tree.files[path]]) for path in paths if path.endswith(".jsonl")]
        times = DEEP if self.deep else 1
        memory = min(TEXT_MEMORY, TEXT_GROWTH * texts) + times * LOG_GROWTH * max(logs, default=0)
        seconds = TEXT_SECONDS * (texts + times * sum(logs))
        for path in paths:
            # Reading a table takes twice its unpacked size, but never more than its bytes can grow to.
            if path in self.tables:
                (rows, unpacked), size = self.tables[path], real_bytes([self.tree.files[path]])
                memory += min(2 * unpacked, TABLE_GROWTH * size)
                seconds += times * min(ROW_SECONDS * rows, TABLE_SECONDS * size)
        if reads.weights:
            weights = [self.tree.files[path] for path in paths if path.endswith((".gguf", ".safetensors"))]
            memory += TENSOR_GROWTH * max((real_bytes([status]) for status in weights), default=0)
            seconds += TENSOR_SECONDS * real_bytes(weights)
        return Budget(memory, seconds)


def table_sizes(folder: Path, paths: Iterable[str]) -> dict[str, Any]:
    """Estimates the memory of Parquet files from their footers, before they are read.

    Returns:
        {wrong: sentences, tables: {path: (rows, bytes that reading it takes)}}.
    """
    import pyarrow.parquet as pq

    problems, tables = [], {}
    for path in paths:
        size = (folder / path).stat().st_size
        try:
            footer = pq.read_metadata(folder / path)
            groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(group.num_columns)]
            values = sum(column.num_values for column in columns)
            unpacked = sum(max(0, column.total_uncompressed_size) for column in columns)
        except MemoryError:
            raise
        except BaseException as error:  # any error of the library for bytes that are not a table
            problems.append(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}")
            continue
        # A footer is untrusted: it may declare any number of rows in a few bytes.
        memory = ROW_BYTES * footer.num_rows + VALUE_BYTES * values + 3 * unpacked
        if not 0 <= memory <= SMALL + GROWTH * size or footer.num_rows < 0 or values < 0:
            problems.append(f"{path} says that its {size} bytes hold {footer.num_rows} rows in {unpacked} bytes")
            continue
        tables[path] = footer.num_rows, memory
    return {"wrong": problems, "tables": tables}
