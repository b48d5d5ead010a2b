"""The task sources that read rows: `rows`, a file; `hub` and `hub-prompts`, a dataset on the Hub at a pinned commit.

The digest of a file and the commit of a dataset are part of the key. The files of a dataset are pulled when the tasks
are made, with the digests that the Hub states for that commit, into the folder of the reader `hub`.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import heapq
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import model_validator

from pipeline.core.bounds import Key, License, Line, LongLine, Range, Sha256, Text, Words
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import added, operational
from pipeline.core.store import sha256_file
from stages.data.acquire.hub_files import Commit
from stages.data.acquire.readers.base import is_unicode
from stages.data.acquire.readers.hub import HOME, Hub, Repo
from stages.data.acquire.readers.row_files import Column, Values, field_at
from stages.data.acquire.readers.row_files import Row as DataRow
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.rl.protocols import Count, Kind, Level, Response, TaskSource, VerifierFailed, make_verifier
from stages.tasks import Row, question, to_row

CODE_PROMPT = (
    "{question}\n\nName the function {entry_point}. Your code must pass this test, among others:\n\n"
    "```python\n{test}\n```\n\nAnswer with all of the code in one ```python block."
)
# Least share of rows that are tasks; with fewer the settings are wrong.
MIN_SHARE = 0.1
# Rows in memory for each task that is wanted, since not every row is one.
ROWS_PER_TASK = 4
# Rows that are scored at once.
BATCH = 256


class FileTasks(TaskSource):
    """Rows of a file in the format of NeMo Gym, one JSON object per line."""

    source: Literal["rows"]
    """selects this kind of tasks"""
    path: LongLine = operational(...)
    """path of the file; its digest, not its path, is part of the key"""
    digest: Sha256
    """SHA-256 digest of the file"""
    verifier: Key
    """name of the verifier that scores the answers"""
    kind: Kind
    """kind of the tasks, which names their bin"""
    level: Level = 1
    """level of difficulty, which names their bin"""
    license: License
    """SPDX license of rows that state none"""
    origin: Text
    """origin of rows that state none: URL or text"""

    def bins(self) -> list[str]:
        return [f"{self.kind}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        path = Path(self.path)
        if not path.is_file():
            raise RecipeError(f"tasks: there is no file {path}; put it there, or correct tasks.path")
        if (digest := f"sha256:{sha256_file(path)}") != self.digest:
            raise RecipeError(f"tasks: {path} has the digest {digest}, not {self.digest}; restore it, or change digest")
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                row = json.loads(line)
                question(row)
            except (ValueError, LookupError, TypeError) as error:
                raise AtomError(f"{path}, line {number}: not a row of NeMo Gym ({error!r}); fix it") from None
            fields = {"verifier": self.verifier, "kind": self.kind, "level": self.level}
            # A row may state its own license and origin; the settings decide on the rest.
            yield {"license": self.license, "origin": self.origin, **row, **fields, "id": f"{self.kind}/{number:06d}"}


class HubTasks(TaskSource):
    """Rows of a dataset on the Hub, at a commit.

    A row without a question or an answer in its fields is no task, and neither is a row of code whose own solution
    fails its tests, or whose tests pass what is no number, or what the test in the question expects.
    """

    source: Literal["hub"]
    """selects this kind of tasks"""
    repo: Repo
    """dataset repository"""
    revision: Commit
    """commit of the repository"""
    pattern: Line
    """pattern of the paths of files in the repository; * matches / as well"""
    format: Literal["jsonl", "parquet"]
    """reader of the files"""
    verifier: Literal["math-verify", "python-tests"]
    """verifier that scores the answers"""
    kind: Kind
    """kind of the tasks, which names their bin"""
    level: Level = 1
    """level of difficulty, which names their bin"""
    count: Count
    """maximum number of tasks, chosen by a seeded hash of the file and the row"""
    license: License
    """SPDX license of the rows"""
    license_evidence: Text
    """text or URL that shows the license"""
    question_field: Column
    """field with the question"""
    answer_field: Column
    """math-verify: field with the answer; python-tests: field with asserts, a list or its JSON"""
    answer_after: Annotated[str, Words(100)] | None = None
    """math-verify: the answer is the text after the last of these in its field; null: the whole field"""
    solution_field: Column | None = None
    """python-tests: field with a correct solution"""
    setup_field: Column | None = None
    """python-tests: field with code that runs before answers and tests; null: none"""
    path: LongLine = operational(f"{HOME}/hub")
    """folder that keeps pulled files; it may be removed at any time"""

    @model_validator(mode="after")
    def _effective(self) -> HubTasks:
        of_code = {"solution_field": self.solution_field, "setup_field": self.setup_field}
        if self.verifier == "python-tests" and self.solution_field is None:
            raise ValueError("solution_field is missing: a row of code is a task only if its own solution passes")
        unused = {"answer_after": self.answer_after} if self.verifier == "python-tests" else of_code
        for name, value in unused.items():
            if value is not None:
                raise ValueError(f"{name} = {value} has no effect with verifier = {self.verifier}; leave it out")
        return self

    def bins(self) -> list[str]:
        return [f"{self.kind}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        """Yields the tasks of the dataset.

        Raises AtomError if hardly any row is a task, or a file cannot be read; and what `hub_files.pull` raises.
        """
        salt = f"{seed_of(f'tasks/hub/{self.kind}/{self.level}', seed)}/"
        hashed = ((hashlib.sha256((salt + row.name).encode()).digest(), row.name, row.fields) for row in self._read())
        # By hash, so that the same rows are drawn from any order of the files, in bounded memory.
        rows = heapq.nsmallest(ROWS_PER_TASK * self.count, hashed)
        candidates = (candidate for _, name, fields in rows if (candidate := self._candidate(name, fields)))
        tasks = list(islice(_with_right_answer(self.verifier, candidates), self.count))
        if len(tasks) < MIN_SHARE * min(self.count, len(rows)):
            raise AtomError(
                f"tasks: of {len(rows)} rows of {self.repo} only {len(tasks)} are tasks, with a question in "
                f"{self.question_field} and an answer in {self.answer_field} for {self.verifier}; correct the fields"
            )
        for number, task in enumerate(tasks):
            yield {**task, "id": f"{self.kind}/{self.level}/{number:06d}"}

    def _read(self) -> Iterator[DataRow]:
        """Yields the rows that can be read."""
        settings = self.model_dump(include={"repo", "revision", "pattern", "format", "path"})
        columns = (self.question_field, self.answer_field, self.solution_field, self.setup_field)
        reader = Hub(reader="hub", **settings).absolute(Path())
        return reader.rows_at_commit(f"tasks {self.bins()[0]}", list(filter(None, columns)))

    def _candidate(self, name: str, fields: Mapping[str, Any]) -> tuple[Row, str] | None:
        """Returns a row as a task, and its right answer; None without a question or an answer to check."""
        question, answer = field_at(fields, self.question_field), field_at(fields, self.answer_field)
        if not isinstance(question, str) or not question.strip() or not is_unicode(question):
            return None
        question = question.strip()
        if self.verifier == "math-verify":
            from stages.rl.rewards.pooled_verifier import boxed

            if not isinstance(answer, str | int | float):
                return None
            _, mark, result = str(answer).rpartition(self.answer_after) if self.answer_after else ("", "", str(answer))
            if not result.strip() or bool(mark) != bool(self.answer_after):
                return None
            prompt, right = question, boxed(result.strip())
            fields = {"question": question, "expected_answer": result.strip()}
        else:
            tests, right = tests_of(answer), field_at(fields, self.solution_field or "")
            if tests is None or not isinstance(right, str):
                return None
            entry_point, asserts = tests
            prompt = CODE_PROMPT.format(question=question, entry_point=entry_point, test=asserts[0])
            prelude = field_at(fields, self.setup_field) if self.setup_field else ""
            fields = {"entry_point": entry_point, "check": check_of(asserts), "prelude": prelude or ""}
        try:
            chat.check([{"role": "user", "content": prompt}])
        except ValueError:  # it names a special token, which the policy would take for that
            return None
        origin = f"https://huggingface.co/datasets/{self.repo}/blob/{self.revision}/{name}"
        stated = {"license": self.license, "origin": origin}
        return to_row(name, prompt, self.verifier, self.kind, self.level, **fields, **stated), right


class HubPrompts(TaskSource):
    """Prompts of a dataset on the Hub, at a commit, whose answers a reward model scores.

    A row whose prompt is no text or conversation up to the user's turn, or names a special token, is no task.
    """

    source: Literal["hub-prompts"]
    """selects this kind of tasks"""
    repo: Repo
    """dataset repository"""
    revision: Commit
    """commit of the repository"""
    pattern: Line
    """pattern of the paths of files in the repository; * matches / as well"""
    format: Literal["jsonl", "parquet"]
    """reader of the files"""
    prompt_field: Column
    """field with the prompt, a text or a list of messages"""
    where: Values = added({})
    """values by the name of a field, such as `language: [english]`; rows with another value are left out"""
    max_characters: Annotated[int, Range(1, 1e6)] = 8000
    """maximum number of characters of a prompt; longer ones are left out"""
    verifier: Literal["reward-model"] = "reward-model"
    """verifier that scores the answers"""
    kind: Kind
    """kind of the tasks, which names their bin"""
    level: Level = 1
    """level of difficulty, which names their bin"""
    count: Count
    """maximum number of tasks, chosen by a seeded hash of the prompt"""
    license: License
    """SPDX license of the rows"""
    license_evidence: Text
    """text or URL that shows the license"""
    path: LongLine = operational(f"{HOME}/hub")
    """folder that keeps pulled files; it may be removed at any time"""

    def bins(self) -> list[str]:
        return [f"{self.kind}/{self.level}"]

    def rows(self, seed: int, excluded: set[str]) -> Iterator[Row]:
        """Yields the prompts.

        Raises AtomError if no row has one, or a file cannot be read; and what `hub_files.pull` raises.
        """
        name, salt = self.bins()[0], f"{seed_of(f'tasks/hub-prompts/{self.kind}/{self.level}', seed)}/"
        settings = self.model_dump(include={"repo", "revision", "pattern", "format", "path", "where"})
        read = Hub(reader="hub", **settings).absolute(Path()).rows_at_commit(f"tasks {name}", [self.prompt_field])
        # By hash of the prompt, so that one with several rows is one task, in bounded memory.
        prompts = ((prompt, row.name) for row in read if (prompt := self._prompt(row)) is not None)
        hashed = ((hashlib.sha256((salt + prompt).encode()).digest(), prompt, place) for prompt, place in prompts)
        chosen: dict[str, str] = {}
        for _, prompt, place in heapq.nsmallest(ROWS_PER_TASK * self.count, hashed):
            chosen.setdefault(prompt, place)
        if not chosen:
            raise AtomError(f"tasks: no row of {self.repo} has a prompt in {self.prompt_field}; correct the field")
        for number, (prompt, place) in enumerate(islice(chosen.items(), self.count)):
            origin = f"https://huggingface.co/datasets/{self.repo}/blob/{self.revision}/{place}"
            stated = {"license": self.license, "origin": origin}
            yield to_row(f"{name}/{number:06d}", json.loads(prompt), self.verifier, self.kind, self.level, **stated)

    def _prompt(self, row: DataRow) -> str | None:
        """Returns the messages of a row as JSON; None if it has no prompt."""
        value = field_at(row.fields, self.prompt_field)
        value = [{"role": "user", "content": value}] if isinstance(value, str) else value
        try:
            messages = [{"role": m["role"], "content": m["content"]} for m in value]
            chat.check(messages)
            text = json.dumps(messages, ensure_ascii=False)
        except (KeyError, TypeError, ValueError):
            return None
        is_asked = messages[-1]["role"] == "user" and all(m["content"].strip() for m in messages)
        return text if is_asked and len(text) <= self.max_characters and is_unicode(text) else None


def tests_of(value: object) -> tuple[str, list[str]] | None:
    """Returns the function that asserts test, and each assert in one line.

    It returns None unless all are asserts that call one function, which has no name of a builtin.

    Args:
        value: A list of asserts, or its JSON.
    """
    try:
        texts = json.loads(value) if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return None
        asserts = [node for text in texts for node in ast.parse(text.strip()).body]
        names = [
            {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
            for node in asserts
        ]
        # The one function that all asserts call is what the answer must define.
        called = set[str]().union(*names) - set(dir(builtins))
        if len(called) != 1 or not all(
            isinstance(node, ast.Assert) and called <= each for node, each in zip(asserts, names, strict=True)
        ):
            return None
        return called.pop(), [ast.unparse(node) for node in asserts]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def check_of(asserts: list[str]) -> str:
    """Returns the asserts as a check of the verifier python-tests, in which the function has its own name."""
    return "\n".join(["def check(candidate):", *(f"    {line}" for line in asserts)]) + "\n"


def _with_right_answer(name: str, candidates: Iterator[tuple[Row, str]]) -> Iterator[Row]:
    """Yields the candidates whose right answer the verifier accepts.

    Tests are weak that a function passes which returns no number (`abs(x - 1) > 0.1` is False for it), or always the
    value that the question shows. Their rows are left out.

    Raises:
        VerifierFailed: The verifier can score nothing here.
    """
    from stages.rl.rewards.code_verifier import NOT_A_NUMBER, SHOWN, CodeVerifier

    verifier = make_verifier(name)

    def scores(batch: list[tuple[Row, str]]) -> list[float]:
        answers = [(task, Response.parse(right, finished=True)) for task, right in batch]
        try:
            return [parts["reward"] for parts in verifier.score(answers)]
        except VerifierFailed:
            if len(batch) > 1:
                # A row whose tests cannot run fails its batch, so each row is scored alone.
                return [score for each in batch for score in scores([each])]
            # If the probe fails too, the verifier is broken, and not the row.
            if batch[0] is PROBES[name] or scores([PROBES[name]]) != [1.0]:
                raise
            return [0.0]  # its tests cannot run

    try:
        while batch := list(islice(candidates, BATCH)):
            tasks = [task for (task, _), score in zip(batch, scores(batch), strict=True) if score == 1]
            if name == CodeVerifier.name:
                for weak in (NOT_A_NUMBER, SHOWN):
                    tried = [(task, CodeVerifier.unsolved(task).get(weak, "")) for task in tasks]
                    tasks = [task for task, score in zip(tasks, scores(tried), strict=True) if score < 1]
            yield from tasks
    finally:
        verifier.close()


# A task and its right answer, by which a broken verifier is told from a broken row.
PROBES: dict[str, tuple[Row, str]] = {
    "math-verify": (to_row("probe", "1", "math-verify", "probe", 0, question="1 + 1", expected_answer="2"), "2"),
    "python-tests": (
        to_row("probe", "1", "python-tests", "probe", 0, entry_point="one", check=check_of(["assert one() == 1"])),
        "def one():\n    return 1\n",
    ),
}
