"""What the checks of a release may take: processor time and memory, fixed or by the files that a check really reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release.checks import confine, table_sizes
from release.checks.check import NOTHING_LARGE, Check, Reads
from release.checks.confine import Budget
from release.checks.findings import Absent, Findings, require_file
from release.checks.verdict import CheckResult, answer
from release.hash_cache import Digests
from release.tree import Tree, real_bytes

SECONDS, MEMORY = 5.0, 192 << 20
"""What every check may take, all of them together: processor time; and each of them: bytes of memory."""
TEXT_SECONDS, TEXT_GROWTH, TEXT_MEMORY = 1e-7, 8, 128 << 20
"""What a check has besides for each byte of JSON that it reads; memory for all of it at most."""
LOG_GROWTH = 2
"""Bytes of memory for each byte of the longest log (.jsonl), of which a check keeps a part."""
ROW_SECONDS, TABLE_SECONDS, TABLE_GROWTH = 1e-4, 1e-6, 64
"""For each row of tables, but no more than for each byte of them. Bytes of memory for each byte, but no more than they
unpack to."""
DEEP = 5
"""How many times as much checks of tables and logs may take that compare row with row."""
TENSOR_SECONDS, TENSOR_GROWTH = 2e-8, 3
"""For each byte of weights, and for each of the largest file of them."""


def run_check(name: str, question: Callable[[], Findings]) -> CheckResult:
    """The answer to a question about files that may hold anything."""
    try:
        findings = question()
        problems, skipped = findings.problems, [f"skipped: {reason}" for _, reason in sorted(findings.skipped.items())]
        ok = not problems if problems or findings.compared else None
        return CheckResult(name, ok, problems[0] if problems else findings.detail, problems, skipped)
    except ImportError as error:
        return CheckResult(name, None, f"not asked, since it needs {error.name or error}; install atom-release[train]")
    except CheckFailed as error:
        return answer(name, [str(error)])
    except Absent as error:
        return CheckResult(name, None, str(error))
    except MemoryError:
        raise
    except Exception as error:  # anyone can write checksums: a file that is not what it should be is a finding
        return answer(name, [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"])


def load_libraries(deep: bool) -> None:
    """Imports once what checks need, so that not every process of theirs does, within its limits."""
    import pyarrow as pa
    import pyarrow.parquet

    pa.table({"column": [1]}).to_pylist()  # looks for pandas
    if deep:
        with suppress(ImportError):  # the check that needs it says so
            import torch  # noqa: F401


class CheckRunner:
    """Runs checks, each in a process of its own, with a budget: what is left of SECONDS, and what belongs to the files
    that this check reads, by their bytes on the disk. Once a check took more, no other is asked."""

    def __init__(self, folder: Path, tree: Tree, deep: bool) -> None:
        self.folder, self.tree, self.deep = folder, tree, deep
        self.seconds = SECONDS
        self.tables: dict[str, tuple[int, int]] = {}
        self.spent = ""

    def ask(self, check: Check, kind: str, digests: Digests) -> CheckResult:
        """The answer of a registered check. kind: of the folder, which the check applies to."""
        subject = check.scope.subject(self.folder, kind, digests)

        def question() -> Findings:
            if check.since_format is not None:
                require_file(subject.folder, check.needs, check.since_format)
            return check.function(subject)

        if not check.confined:
            return run_check(check.name, question)
        return self.run(check.name, lambda: run_check(check.name, question), check.reads_of(kind))

    def run(self, name: str, question: Callable[[], CheckResult], reads: Reads = NOTHING_LARGE) -> CheckResult:
        if self.spent:
            return CheckResult(name, None, f"not asked, since {self.spent}")
        try:
            return CheckResult(**self._run_confined(lambda: asdict(question()), self._allowance(reads)))
        except CheckFailed as error:
            self.spent = f"{name} took all the time or memory that there is"
            return answer(name, [f"cannot be checked: it {error}"])

    def _run_confined(self, call: Callable[[], Any], budget: Budget) -> Any:
        """What `call` returns. budget: what it may take besides what all share. Raises CheckFailed if it takes more."""
        if self.seconds <= 0:
            raise CheckFailed(f"comes after checks that took {SECONDS:.0f} s of processor time")
        result, seconds = confine.run(call, Budget(MEMORY + budget.memory, self.seconds + budget.seconds))
        self.seconds -= max(0.0, seconds - budget.seconds)
        return result

    def check_tables(self) -> Iterator[CheckResult]:
        """Whether tables are as large as their bytes can be; what they unpack to is known from then on."""
        paths = sorted(path for path in self.tree.files if path.endswith(".parquet"))
        load_libraries(self.deep)
        if not paths or self.spent:
            return
        try:
            body = self._run_confined(lambda: table_sizes.sizes(self.folder, paths), Budget(0, 0))
        except CheckFailed as error:
            self.spent = "tables took all the time or memory that there is"
            yield answer("tables", [f"cannot be checked: it {error}"])
            return
        self.tables = body["tables"]
        rows = sum(count for count, _ in self.tables.values())
        yield answer("tables", body["wrong"], f"{len(paths)} tables, {rows} rows")
        if body["wrong"]:
            self.spent = "a table cannot be read"

    def _allowance(self, reads: Reads) -> Budget:
        """What a check may take for the files that it reads."""
        paths = [path for path in self.tree.files if path.startswith(reads.places)]
        texts = real_bytes(self.tree.files[path] for path in paths if path.endswith(".json"))
        logs = [real_bytes([self.tree.files[path]]) for path in paths if path.endswith(".jsonl")]
        times = DEEP if self.deep else 1
        memory = min(TEXT_MEMORY, TEXT_GROWTH * texts) + times * LOG_GROWTH * max(logs, default=0)
        seconds = TEXT_SECONDS * (texts + times * sum(logs))
        for path in paths:
            if path in self.tables:
                (rows, unpacked), size = self.tables[path], real_bytes([self.tree.files[path]])
                memory += min(2 * unpacked, TABLE_GROWTH * size)
                seconds += times * min(ROW_SECONDS * rows, TABLE_SECONDS * size)
        if reads.weights:
            weights = [self.tree.files[path] for path in paths if path.endswith(".safetensors")]
            memory += TENSOR_GROWTH * max((real_bytes([status]) for status in weights), default=0)
            seconds += TENSOR_SECONDS * real_bytes(weights)
        return Budget(memory, seconds)
