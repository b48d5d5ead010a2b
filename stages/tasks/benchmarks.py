"""Stage `benchmarks`: the items of the task sets of lm-evaluation-harness, read once and sealed.

    atom run my-recipe --until benchmarks

It runs before curation, so that decontamination searches the training data for these items, and so that the evaluation
needs neither the network nor another version of the data. Needs the extra `harness`; sets of the Hub need the network,
or the cache of the package `datasets`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import Range
from pipeline.core.errors import AtomError, installing
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from pipeline.core.store import Artifact
from stages.formats.table import Int32, String, columns_of, read_table, write_json, write_rows
from stages.tasks.task_sets import TaskSet

VERSION = 1


class BenchmarkItem(TypedDict):
    """An item of a benchmark.

    Attributes:
        id: `<set>/<task>/<number>`.
        set: Name of the task set.
        task: Name of the task.
        number: The number of its document in the task.
        text: The text that must not occur in training data.
    """

    id: String
    set: String
    task: String
    number: Int32
    text: String


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
            shutil.copytree(task_set.folder, out / "folders" / task_set.name)
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
            **task_set.model_dump(include={"license", "license_evidence", "revision"}),
            "folder": task_set.folder is not None,
        }
    write_rows(out / "items.parquet", ITEMS, rows)
    write_json(out / "tasks.json", stated)


def load_tasks(task_set: TaskSet, folder: Path | None) -> dict[str, Any]:
    """Returns the harness's tasks of a set with their data, by name.

    Raises AtomError if one is unknown or cannot be read.
    """
    manager = task_manager(folder)
    if unknown := [name for name in task_set.tasks if name not in manager.all_subtasks]:
        raise AtomError(
            f"task set {task_set.name}: the harness has no task {unknown[0]}; name tasks, not groups or tags of tasks"
        )
    # The harness would read what the Hub has at the moment.
    revised = {} if task_set.revision is None else {"dataset_kwargs": {"revision": task_set.revision}}
    try:
        with in_folder(folder):
            return {name: load_task(manager, name, revised) for name in task_set.tasks}
    except Exception as error:  # whatever YAML files, their functions and the libraries that read the data raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise AtomError(
            f"task set {task_set.name}: the harness cannot read the data of {', '.join(task_set.tasks)}: {lines[0]}; "
            "correct the files, or run this stage where the Hub can be reached"
        ) from error


def load_task(manager: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """Returns a task of the harness with some settings in place of those of its YAML file.

    Only a group can replace settings, so the task is loaded as the one of a group.
    """
    return manager.load({"group": "sealed", "task": [{"task": name, **settings}]})["tasks"][name]


def task_manager(folder: Path | None) -> Any:
    """Returns the harness's index of tasks: of a folder alone, or its own. Raises AtomError without the harness."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AtomError(f"the harness is not installed ({error}); {installing('harness')}") from None
    return TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)


@contextlib.contextmanager
def in_folder(folder: Path | None) -> Iterator[None]:
    """Runs in that folder, so that YAML files name data beside them."""
    with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
        yield


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
    query = task.doc_to_decontamination_query(document) if task.should_decontaminate() else None
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
