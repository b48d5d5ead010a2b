"""Limits on the processor time and memory of checks.

Some are fixed, and some depend on the size of the files that a check reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed, installing
from release.checks import confine
from release.checks.check import HOLDS, NOTHING_LARGE, Absent, Check, Findings, Reads
from release.checks.confine import Budget
from release.checks.verdict import CheckResult, answer
from release.opened_release import Release
from release.untrusted import Tree, real_bytes

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
    # Not about the file: the limit on memory, which `confine` reports, or the user, who ends the run.
    except (MemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic of a parser in Rust is no Exception, nor is SystemExit
        return answer(name, [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"])


def load_libraries(deep: bool) -> None:
    """Imports the libraries of checks once, so that not every check process imports them within its limits."""
    import numpy  # noqa: F401
    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.parquet

    pa.table({"column": [1]}).to_pylist()  # looks for pandas
    if deep:
        with suppress(ImportError):  # the check that needs it says so
            import torch  # noqa: F401


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
        self.unlimited = confine.missing()

    def ask(self, check: Check) -> CheckResult:
        """Returns the result of a registered check, which applies to the folder."""

        def question() -> CheckResult:
            return run_check(check.name, lambda: check.function(self.release))

        return self.run(check.name, question, check.reads_of(self.release)) if check.confined else question()

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
        result, seconds = confine.run(call, Budget(MEMORY + budget.memory, self.seconds + budget.seconds))
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
        load_libraries(self.deep)
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
