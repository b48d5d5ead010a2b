"""Stage `benchmarks`: the items of the task sets of lm-evaluation-harness, read once and sealed.

    atom run my-recipe --until benchmarks

It runs before curation, so that decontamination searches the training data for these items, and so that the evaluation
needs neither the network nor another version of the data. Needs the extra `harness`; sets of the Hub need the network,
or the cache of the package `datasets`.

A further set is one entry of task_sets.yaml. A recipe may also bring its own tasks, in a folder of the harness's YAML
files.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import Field, model_validator

from pipeline.core.bounds import Context, Flag, Key, License, Range, SourceName, Text, Words
from pipeline.core.errors import AtomError, RecipeError, installing
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import Artifact, sha256_file
from pipeline.core.yaml_text import read_trusted
from pipeline.hub import client
from stages.formats.file_digests import TreeDigest, tree_digest
from stages.formats.table import Int32, String, columns_of, read_table, write_json, write_rows

# Of a folder of tasks.
MOST_FILES = 10_000
OWN_TASKS = Path(__file__).parents[1] / "evaluation/benchmark_tasks"
# Assumed items of a task of one's own, and tokens of an item, once with each of its choices. The test set of MMLU has
# 6,967,453 bytes, 496 an item (README of cais/mmlu on the Hub), so 125 tokens of four bytes, read with four choices.
TASK_ITEMS, ITEM_TOKENS = 2000, 500
# How a model is asked: as plain text, or in its chat template.
Form = Literal["raw", "chat"]
RAW: Form
CHAT: Form
RAW, CHAT = "raw", "chat"
Format = Literal["raw", "chat", "both"]
FORMS_OF: dict[Format, tuple[Form, ...]] = {"raw": (RAW,), "chat": (CHAT,), "both": (RAW, CHAT)}


Shots = Annotated[int, Range(0, 100)]
Metric = Annotated[str, Words(100)]


class TaskSet(Config):
    """Tasks of the harness that read the same data."""

    name: SourceName
    """name of the set"""
    tasks: Annotated[tuple[Key, ...], Field(min_length=1, max_length=1000)]
    """tasks of the harness"""
    license: License
    """SPDX license of the data"""
    license_evidence: Text
    """text or URL that shows the license"""
    revision: Text | None = None
    """revision of the dataset on the Hub; null: data of a folder"""
    folder: Text | None = operational(None)
    """folder of the YAML files; null: the harness has the tasks"""
    of_harness: Text | None = operational(None)
    """folder of the tasks in the harness, which is read alone; null: all of it, which takes seconds"""
    folder_digest: TreeDigest | None = Field(default=None)
    """digest of the files of the folder; null: no folder"""
    items: Annotated[int, Range(1, 1e9)] | None = operational(None)
    """items that the tasks evaluate together, for `atom plan` alone; null: assumed"""
    shots: Shots | None = added(None)
    """worked examples before each question; null: as the tasks have it"""
    format: Format = operational("raw")
    """how models are asked: raw, as plain text; chat, in the model's chat template; both; the stage `harness` is given
    the forms"""
    metrics: Annotated[tuple[Metric, ...], Field(max_length=10)] = added(())
    """metrics that cards show, as in `scores.json` of the stage `harness`; empty: all"""
    pooled: Flag = added(False)
    """whether the tasks are parts of one set, as the subjects of MMLU, so that cards show the mean over all items"""


def _packaged() -> dict[str, TaskSet]:
    """Returns the task sets of task_sets.yaml, by name."""
    body = read_trusted(Path(__file__).with_name("task_sets.yaml"))
    of_project: dict[str, Any] = {"folder": str(OWN_TASKS), "folder_digest": _digest(_files(OWN_TASKS), OWN_TASKS)}
    packaged = {}
    for name, fields in body.items():
        is_own = fields.pop("own", False)
        packaged[name] = TaskSet(name=name, **fields, **(of_project if is_own else {}))
    return packaged


def _files(folder: Path) -> list[Path]:
    """Returns the files of a folder of tasks, without what Python compiles beside them."""
    paths = sorted(folder.rglob("*")) if folder.is_dir() else []
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]


def _digest(files: Iterable[Path], folder: Path) -> str:
    return tree_digest((path.relative_to(folder).as_posix(), sha256_file(path)) for path in files)


TASK_SETS = _packaged()


def _set_error(name: str) -> str | None:
    return None if name in TASK_SETS else f"is an unknown task set; known are {', '.join(sorted(TASK_SETS))}"


class TaskFolder(Config):
    """Your own tasks: YAML files in the form of the harness, and data files beside them."""

    name: SourceName
    """name of the set"""
    path: Text
    """folder of the YAML files, from that of the recipe; data files are named from it"""
    tasks: Annotated[tuple[Key, ...], Field(min_length=1, max_length=1000)]
    """tasks in the folder"""
    license: License
    """SPDX license of the data"""
    license_evidence: Text
    """text or URL that shows the license"""
    digest: TreeDigest = "auto"
    """expected digest of the files; auto: computed from the files"""
    format: Format = added("raw")
    """how models are asked: raw, as plain text; chat, in the model's chat template; or both"""
    shots: Shots | None = added(None)
    """worked examples before each question; null: as the tasks have it"""


class HarnessSection(Config):
    """Task sets of lm-evaluation-harness; needs the extra `harness`."""

    sets: Annotated[tuple[Annotated[str, Words(40, test=_set_error)], ...], Field(max_length=100)] = ()
    """task sets by name"""
    folders: Annotated[tuple[TaskFolder, ...], Field(max_length=100)] = ()
    """task sets from your own folders"""
    formats: Annotated[dict[SourceName, Format], Field(max_length=200)] = added({})
    """sets that are asked in another form than their own: raw, as plain text; chat, in the model's chat template; or
    both. A model without a chat template is asked as plain text, or not at all"""
    max_new_tokens: Context | None = added(None)
    """maximum number of tokens of an answer in conversation, its thinking included; null: as the task has it"""
    every_model: Flag = added(False)
    """whether each exported model is measured; otherwise, the final one alone"""
    limit: Annotated[int, Range(2, 1e6)] | None = None
    """first items of a task; null: all"""

    @model_validator(mode="after")
    def _check_names(self) -> HarnessSection:
        names = [*self.sets, *(folder.name for folder in self.folders)]
        if not names:
            raise ValueError("evaluation.harness names no task set; give `sets` or `folders`, or leave it out")
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"evaluation.harness has the task set {repeated} twice; names must differ")
        if unknown := next((name for name in self.formats if name not in names), None):
            raise ValueError(
                f"evaluation.harness.formats names {unknown}, which is none of its task sets {', '.join(names)}"
            )
        return self

    def forms(self, converses: bool) -> dict[str, tuple[Form, ...]]:
        """Returns the forms in which a model is asked each set; none of a set in conversation alone without a template.

        Args:
            converses: True if the model was trained on conversations.
        """
        known = {name: TASK_SETS[name].format for name in self.sets}
        formats = known | {folder.name: folder.format for folder in self.folders} | self.formats
        return {
            name: tuple(form for form in FORMS_OF[each] if form == RAW or converses) for name, each in formats.items()
        }

    def tokens(self, converses: bool = False) -> int:
        """Returns the number of tokens that the evaluation of one model reads and draws, as assumed for `atom plan`."""
        forms, total = self.forms(converses), 0
        for name, (tasks, items, shots) in self._sizes().items():
            most = items or tasks * TASK_ITEMS
            most = most if self.limit is None else min(most, tasks * self.limit)
            # Each example is as long as a question.
            read = ITEM_TOKENS * (1 + shots)
            total += most * sum(read + (self.max_new_tokens or 0) * (form == CHAT) for form in forms[name])
        return total

    def pieces(self, converses: bool = False) -> int:
        """Returns the number of all tasks, in each of their forms."""
        forms = self.forms(converses)
        return sum(tasks * len(forms[name]) for name, (tasks, _, _) in self._sizes().items())

    def _sizes(self) -> dict[str, tuple[int, int | None, int]]:
        """Returns by set the number of tasks, that of items if it is known, and the examples before each question."""
        sets = {name: TASK_SETS[name] for name in self.sets}
        sizes: dict[str, tuple[int, int | None, int]] = {}
        for name, known in sets.items():
            sizes[name] = len(known.tasks), known.items, known.shots or 0
        for folder in self.folders:
            sizes[folder.name] = len(folder.tasks), None, folder.shots or 0
        return sizes

    def task_sets(self, base: Path, where: str) -> tuple[TaskSet, ...]:
        """Returns the sets with the digests of their folders.

        `base` is the folder of the recipe. Raises RecipeError if a folder is missing, has no YAML file, or differs
        from its pin.
        """
        return (*(TASK_SETS[name] for name in self.sets), *(_of_folder(tasks, base, where) for tasks in self.folders))


def _of_folder(tasks: TaskFolder, base: Path, where: str) -> TaskSet:
    folder = (base / tasks.path).resolve()
    files = _files(folder)
    if not any(path.suffix == ".yaml" for path in files) or len(files) > MOST_FILES:
        raise RecipeError(
            f"{where}: task set {tasks.name} needs a folder of at most {MOST_FILES:,} files with a YAML file for each "
            f"task, and {folder} is none; correct its path"
        )
    digest = _digest(files, folder)
    # The tasks of a folder can change without a new name; the digest in the key notices that.
    if tasks.digest not in ("auto", digest):
        raise RecipeError(
            f"{where}: task set {tasks.name} is pinned to {tasks.digest}, but {folder} has {digest}; restore the "
            "files, or change the pin"
        )
    fields = tasks.model_dump(include={"name", "tasks", "license", "license_evidence", "format", "shots"})
    return TaskSet(**fields, folder=str(folder), folder_digest=digest)


VERSION = 2


class BenchmarkItem(TypedDict):
    """An item of a benchmark."""

    id: String
    """`<set>/<task>/<number>`"""
    set: String
    """name of the task set"""
    task: String
    """name of the task"""
    number: Int32
    """number of its document in the task, from 0"""
    text: String
    """text that must not occur in training data"""


ITEMS = columns_of(BenchmarkItem)


class BenchmarksConfig(Config):
    """The task sets, and the number of items of a task."""

    sets: Annotated[tuple[TaskSet, ...], Field(min_length=1, max_length=200)]
    """task sets"""
    limit: Annotated[int, Range(2, 1e6)] | None = None
    """first items of a task; null: all"""


def run(config: BenchmarksConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals the items of the benchmarks, and what their tasks need to be run again.

    The files are `items.parquet`; of each task `data/<task>/<split>.parquet`, the splits that it reads; of each set
    with a folder `folders/<set>/`, its files; and `tasks.json`, the sets with their tasks and licenses.

    Raises AtomError if a task or its data is missing, or two sets have a task of one name.
    """
    rows: list[BenchmarkItem] = []
    stated: dict[str, Any] = {}
    for task_set in config.sets:
        if task_set.folder is not None:
            shutil.copytree(
                task_set.folder, out / "folders" / task_set.name, ignore=shutil.ignore_patterns("__pycache__")
            )
        tasks = load_tasks(task_set, None if task_set.folder is None else Path(task_set.folder))
        for name, task in sorted(tasks.items()):
            # Files are named by the task, and results too.
            if any(name in other["tasks"] for other in stated.values()):
                raise AtomError(f"two task sets have a task {name}; leave one of them out of evaluation.harness")
            splits = _write_splits(task, out / data_folder(name), config.limit)
            documents = list(task.eval_docs)[: config.limit]
            rows += [
                BenchmarkItem(id=f"{task_set.name}/{name}/{n:06d}", set=task_set.name, task=name, number=n, text=text)
                for n, text in enumerate(_question(task, document) for document in documents)
            ]
            report.note(f"{name} of {task_set.name}: {len(documents)} items, splits {', '.join(splits)}")
        stated[task_set.name] = {
            "tasks": sorted(tasks),
            **task_set.model_dump(
                include={"license", "license_evidence", "revision", "shots", "metrics", "pooled"}, mode="json"
            ),
            "folder": task_set.folder is not None,
        }
    write_rows(out / "items.parquet", ITEMS, rows)
    write_json(out / "tasks.json", stated)


def load_tasks(task_set: TaskSet, folder: Path | None) -> dict[str, Any]:
    """Returns the harness's tasks of a set with their data, by name.

    Raises AtomError if one is unknown or cannot be read.
    """
    manager = task_manager(folder, task_set.of_harness)
    if unknown := [name for name in task_set.tasks if name not in manager.all_subtasks]:
        raise AtomError(
            f"task set {task_set.name}: the harness has no task {unknown[0]}; name tasks, not groups or tags of tasks"
        )
    # The harness would read what the Hub has at the moment.
    revised: dict[str, Any] = {} if task_set.revision is None else {"dataset_kwargs": {"revision": task_set.revision}}
    revised |= shots_of(task_set.shots)
    try:
        with in_folder(folder), downloads():
            return {name: load_task(manager, name, revised) for name in task_set.tasks}
    except Exception as error:  # whatever YAML files, their functions and the libraries that read the data raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise AtomError(
            f"task set {task_set.name}: the harness cannot read the data of {', '.join(task_set.tasks)}: {lines[0]}; "
            "correct the files, or run this stage where the Hub can be reached"
        ) from error


def shots_of(number: int | None) -> dict[str, int]:
    """Returns the setting of a task for so many worked examples; none if the task keeps its own."""
    return {} if number is None else {"num_fewshot": number}


def load_task(manager: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """Returns a task of the harness with some settings in place of those of its YAML file.

    Only a group can replace settings, so the task is loaded as the one of a group.
    """
    return manager.load({"group": "sealed", "task": [{"task": name, **settings}]})["tasks"][name]


@cache
def task_manager(folder: Path | None, of_harness: str | None = None) -> Any:
    """Returns the harness's index of tasks: of a folder alone, or its own, of a folder of it or of all.

    Raises:
        AtomError: The harness is not installed.
    """
    try:
        from lm_eval import tasks
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AtomError(f"the harness is not installed ({error}); {installing('harness')}") from None
    if folder is None and of_harness:
        folder = Path(tasks.__file__).parent / of_harness
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)


@contextlib.contextmanager
def in_folder(folder: Path | None) -> Iterator[None]:
    """Runs in that folder, so that YAML files name data beside them.

    Python compiles no functions of the YAML files into it: the folder may be sealed.
    """
    compiles, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
            yield
    finally:
        sys.dont_write_bytecode = compiles


@contextlib.contextmanager
def downloads() -> Iterator[None]:
    """Lets the package `datasets` use the network, which the environment of a stage turns off."""
    import datasets

    settings = datasets.config
    with client.online():
        offline, settings.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE, False
        try:
            yield
        finally:
            settings.HF_HUB_OFFLINE = offline


def data_folder(task: str) -> str:
    """Returns the folder of a task's splits; names of subtasks may have other characters than files."""
    return f"data/{re.sub(r'[^A-Za-z0-9._-]', '_', task)}"


def _write_splits(task: Any, folder: Path, limit: int | None) -> list[str]:
    """Writes the splits that an evaluation reads: of the items, of which the first are enough, and of examples."""
    config = task.config
    evaluated = config.test_split or config.validation_split
    examples = [config.fewshot_split] if config.fewshot_split else [config.training_split, config.validation_split]
    splits = dict.fromkeys([evaluated, *(examples if config.num_fewshot else [])])
    folder.mkdir(parents=True)
    for name in filter(None, splits):
        data = task.dataset[name]
        # a task may filter its documents, so that its first items are not the first rows
        if name == evaluated and limit is not None and config.process_docs is None:
            data = data.select(range(min(limit, len(data))))
        data.to_parquet(str(folder / f"{name}.parquet"))
    return [name for name in splits if name]


def _question(task: Any, document: Mapping[str, Any]) -> str:
    from lm_eval.utils import apply_template

    template = task.config.doc_to_decontamination_query if task.should_decontaminate() else None
    if isinstance(template, str) and template not in task.features:
        # The harness would read the rendered text as a literal of Python, which that of ARC is not.
        query = apply_template(template, document)
    else:
        query = task.doc_to_decontamination_query(document) if template else None
    text = query if isinstance(query, str) else task.doc_to_text(document)
    return text if isinstance(text, str) else str(document)


def texts_of(benchmarks: Artifact) -> list[tuple[str, str]]:
    """Returns (id, text that must not occur in training data) of every item."""
    return [(row["id"], row["text"]) for row in read_table(benchmarks / "items.parquet", ["id", "text"]).to_pylist()]


STAGE = Stage(
    "benchmarks",
    VERSION,
    BenchmarksConfig,
    run,
    estimate=lambda config: Estimate(cpu_seconds=20.0, memory_bytes=1_000_000_000, disk_bytes=100_000_000),
)
