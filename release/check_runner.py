"""The room that the checks of one release have: processor time and memory, which grow with what the release lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pipeline.errors import CheckFailed
from release import checks, confine, table_sizes
from release.confine import Budget
from release.layout import SIGNATURE
from release.tree import Tree
from release.verdict import Check, Wrong, answer

SECONDS, MEMORY = 5.0, 192 << 20
"""What all checks of a small release may take together, beyond hashing: processor time, and bytes of memory."""
TEXT_GROWTH = 8
"""Bytes of memory for each byte of JSON."""
ROW_SECONDS, BYTE_SECONDS, TENSOR_SECONDS = 1e-4, 2e-7, 2e-8
"""What is added for each row of tables, each byte of JSON, and each byte of weights if they are read, too."""


def ask(name: str, question: Callable[[], Wrong | checks.Findings]) -> Check:
    """The answer to a question about files that may hold anything."""
    try:
        findings = question()
        if not isinstance(findings, checks.Findings):
            return answer(name, findings)
        wrong, skipped = findings.wrong, [f"skipped: {why}" for _, why in sorted(findings.skipped.items())]
        ok = not wrong if wrong or findings.compared else None
        return Check(name, ok, wrong[0] if wrong else findings.detail, wrong, skipped)
    except ImportError as error:
        return Check(name, None, f"not asked, since it needs {error.name or error}; install atom-release[train]")
    except CheckFailed as error:
        return answer(name, [str(error)])
    except checks.Absent as error:
        return Check(name, None, str(error))
    except MemoryError:
        raise
    except Exception as error:  # anyone can write checksums: a file that is not what it should be is a finding
        return answer(name, [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"])


def load_libraries(deep: bool) -> None:
    """Imports once what checks need, so that not every process of theirs does, within its limits."""
    import pyarrow as pa
    import pyarrow.parquet

    import release.rescore  # noqa: F401
    import stages.evaluate
    import stages.prefer
    import stages.solve  # noqa: F401

    pa.table({"column": [1]}).to_pylist()  # looks for pandas
    if deep:
        with suppress(ImportError):  # the check that needs it says so
            import torch  # noqa: F401


class CheckRunner:
    """What all checks together may take, each in a process of its own. Once a check took more, no other is asked."""

    def __init__(self, folder: Path, tree: Tree, deep: bool) -> None:
        self.folder, self.tree, self.deep = folder, tree, deep
        texts = sum(s.st_size for p, s in tree.files.items() if p.endswith((".json", ".jsonl", SIGNATURE)))
        weights = [s.st_size for p, s in tree.files.items() if p.endswith(".safetensors") and deep]
        self.memory = MEMORY + TEXT_GROWTH * texts + 3 * max(weights, default=0)
        self.seconds = SECONDS + BYTE_SECONDS * texts + TENSOR_SECONDS * sum(weights)
        self.spent = ""

    def run(self, name: str, question: Callable[[], Check]) -> Check:
        if self.spent:
            return Check(name, None, f"not asked, since {self.spent}")
        try:
            body, took = confine.run(lambda: asdict(question()), Budget(self.memory, self.seconds))
        except CheckFailed as error:
            self.spent = f"{name} took all the time or memory that there is"
            return answer(name, [f"cannot be checked: it {error}"])
        self.seconds = max(1.0, self.seconds - took)
        return Check(**body)

    def check_tables(self) -> Iterator[Check]:
        """Whether tables are as large as their bytes can be; makes room for them."""
        paths = sorted(path for path in self.tree.files if path.endswith(".parquet"))
        load_libraries(self.deep)
        if not paths or self.spent:
            return
        try:
            body, took = confine.run(lambda: table_sizes.sizes(self.folder, paths), Budget(self.memory, self.seconds))
        except CheckFailed as error:
            self.spent = "tables took all the time or memory that there is"
            yield answer("tables", [f"cannot be checked: it {error}"])
            return
        self.memory += 2 * body["memory"]
        self.seconds += ROW_SECONDS * body["rows"] - took
        yield answer("tables", body["wrong"], f"{len(paths)} tables, {body['rows']} rows")
        if body["wrong"]:
            self.spent = "a table cannot be read"
