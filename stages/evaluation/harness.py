"""Stage `harness`: lm-evaluation-harness (arXiv 2405.14782) on one exported model, with results of every item.

    atom run my-recipe --only harness-online-rlhf

The tasks and their items come from stage `benchmarks`; nothing is read from the network. The model runs in plain
transformers and fp32, or by `evaluation.engine`. Needs the extra `harness`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from pipeline.core.errors import AtomError, installing
from pipeline.core.stage import Inputs, Report, Stage
from stages.confidence import clustered
from stages.evaluation import estimates
from stages.evaluation.estimates import EngineConfig, Piece, compute, compute_shard
from stages.evaluation.scores import HarnessScores
from stages.formats.table import Double, Int32, String, columns_of, write_json, write_rows
from stages.tasks.benchmarks import BenchmarksConfig, data_folder, in_folder, load_task, task_manager

VERSION = 2
BATCH = 32
# Difference up to which two means are the same: of the same values, added up in other orders.
EQUAL = 1e-9


class ItemResult(TypedDict):
    """A value of one metric on one item."""

    set: String
    """the set of the task"""
    task: String
    """the task"""
    number: Int32
    """the item, as in `benchmarks`"""
    filter: String
    """the harness's name for the way the answer was extracted from the response"""
    metric: String
    """such as `acc` or `exact_match`"""
    value: Double
    """value of the metric on this item"""
    target: String
    """what the harness expects"""
    response: String
    """the answer, or as JSON the log-probabilities of the choices"""


RESULTS = columns_of(ItemResult)


class HarnessConfig(BenchmarksConfig, EngineConfig):
    """The task sets, as in stage `benchmarks`."""


def run(config: HarnessConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Runs the tasks of inputs["benchmarks"] on the export inputs["model"].

    Seals `items.parquet`, one row for each item, filter and metric, `scores.json`, which follows from it alone
    (`summary`), and a copy of the tasks. Resumes from `work`, which keeps every finished task. Only metrics that are
    means over items are sealed; the others are named in the log.

    Raises:
        AtomError: The harness or a task is missing.
    """
    rows = list[ItemResult]()
    for measured in compute(_pieces(config, inputs), work, partial(_load, config, inputs, work), report, "tasks"):
        rows += measured["rows"]
        if left_out := measured["left_out"]:
            report.note(f"{measured['task']}: not means over items, and left out: {', '.join(left_out)}")
    write_rows(out / "items.parquet", RESULTS, rows)
    scores = summary(rows)
    write_json(out / "scores.json", scores)
    stated = config.engine.stated()
    task_sets = {name: row | stated for name, row in inputs["benchmarks"].json("tasks.json").items()}
    write_json(out / "tasks.json", task_sets)
    for task_set, tasks in scores.items():
        for task, metrics in tasks.items():
            figures = (f"{name} {figure['value']:.3f} ± {figure['se']:.3f}" for name, figure in metrics.items())
            report.note(f"{task} of {task_set}: {', '.join(figures)}")


def run_shard(config: HarnessConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Measures the tasks of one shard."""
    shards = estimates.shards(config.expected, 1, config.engine)
    compute_shard(_pieces(config, inputs), work, partial(_load, config, inputs, work), shard, shards)


def _load(config: HarnessConfig, inputs: Inputs, work: Path) -> Any:
    """Returns the harness's model, of a server if the engine is one."""
    import torch

    if config.engine.kind == "vllm":
        from stages.evaluation.harness_vllm import served_model

        return served_model(config.engine, inputs["model"] / "model", work)
    # One thread and deterministic kernels, so that the results repeat bit for bit.
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    return language_model(inputs["model"] / "model")


def _pieces(config: HarnessConfig, inputs: Inputs) -> list[Piece[Any]]:
    """Returns a piece for each task."""
    benchmarks = inputs["benchmarks"]
    pieces: list[Piece[Any]] = []
    for task_set, stated in benchmarks.json("tasks.json").items():
        folder = benchmarks / "folders" / task_set if stated["folder"] else None
        for number, name in enumerate(stated["tasks"]):
            data = benchmarks / data_folder(name)
            measure = partial(_measure, task_set=task_set, name=name, folder=folder, data=data, limit=config.limit)
            pieces.append(Piece(f"{task_set}-{number:04d}", measure))
    return pieces


def summary(rows: Sequence[ItemResult]) -> HarnessScores:
    """Returns `scores.json` from the table alone: the mean over items of each metric and filter, with its error."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        by_metric = values.setdefault(row["set"], {}).setdefault(row["task"], {})
        by_metric.setdefault(f"{row['metric']},{row['filter']}", []).append(row["value"])
    return {
        task_set: {task: {name: clustered(each) for name, each in metrics.items()} for task, metrics in tasks.items()}
        for task_set, tasks in values.items()
    }


def language_model(folder: Path) -> Any:
    """Returns the harness's model of one model folder.

    Raises:
        AtomError: The model or the harness is missing.
    """
    if not (folder / "config.json").is_file():
        raise AtomError(f"{folder} contains no model; give a release folder made by `atom build`")
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise AtomError(f"the harness is not installed ({error}); {installing('harness')}") from None
    from stages.formats.tokenizer import END, without_special
    from stages.mcore import gpu

    class Published(HFLM):  # type: ignore[misc, unused-ignore]
        """Ends an answer like the release's evaluation: at the end of a document, with all tokens in the text."""

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            end_token = self.tokenizer.convert_tokens_to_ids(END)
            return super()._model_generate(context, max_length, stop, eos_token_id=end_token, **settings)

    model = Published(str(folder.resolve()), dtype="float32", device=gpu.start().type, batch_size=BATCH)
    # Names of special tokens in a question are text, as in training.
    model.tokenizer = without_special(model.tokenizer)
    return model


def evaluate(model: Any, tasks: list[Any], manager: Any, limit: int | None = None) -> dict[str, Any]:
    """Returns the harness's result: `results` by task, and `samples`. `manager` is its index of tasks."""
    import lm_eval

    # Without the bootstrap of the harness: errors are computed from the items (`summary`).
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    return results


def _measure(
    model: Any, task_set: str, name: str, folder: Path | None, data: Path, limit: int | None
) -> dict[str, Any]:
    """Returns the `rows` of one task, and the metrics that are `left_out`."""
    import datasets

    class Splits(dict[str, datasets.Dataset]):
        """The splits that stage `benchmarks` keeps, so that nothing is read from the network; others are empty.

        A task looks at its examples even if it shows none.
        """

        def __missing__(self, split: str) -> datasets.Dataset:
            return next(iter(self.values())).select([])

    splits = Splits({path.stem: datasets.Dataset.from_parquet(str(path)) for path in sorted(data.glob("*.parquet"))})
    manager = task_manager(folder)
    with in_folder(folder):
        task = load_task(manager, name, {"custom_dataset": lambda **_: splits})
        result = evaluate(model, [task], manager, limit)
    stated, samples = result["results"][name], sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    if not samples:
        raise AtomError(f"{name} of {task_set} has no items in its sealed splits; run the stage benchmarks again")

    rows: list[ItemResult] = []
    left_out = []
    for metric, kind in sorted({(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]}):
        scored = [sample for sample in samples if sample["filter"] == kind and metric in sample["metrics"]]
        values = [sample[metric] for sample in scored]
        # Some metrics, such as a corpus BLEU, are no means over items, and could not be recomputed from the rows.
        numbers = all(isinstance(value, (int, float)) for value in values)
        if not numbers or abs(sum(values) / len(values) - stated[f"{metric},{kind}"]) > EQUAL:
            left_out.append(metric)
            continue
        rows += [
            ItemResult(
                set=task_set,
                task=name,
                number=sample["doc_id"],
                filter=kind,
                metric=metric,
                value=float(value),
                target=str(sample["target"]),
                response=_response(sample),
            )
            for sample, value in zip(scored, values, strict=True)
        ]
    return {"task": name, "rows": rows, "left_out": left_out}


def _response(sample: dict[str, Any]) -> str:
    responses = sample["filtered_resps"]
    return responses[0] if isinstance(responses[0], str) else json.dumps(responses, default=float)


STAGE = Stage("harness", VERSION, HarnessConfig, run, **estimates.of_engine(), run_shard=run_shard)
