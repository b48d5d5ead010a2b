"""Stage `harness`: lm-evaluation-harness (arXiv 2405.14782) on one exported model, with results of every item.

    atom run my-recipe --only harness-online-rlhf

The tasks and their items come from stage `benchmarks`; nothing is read from the network. The model runs in plain
transformers and fp32, or by `evaluation.engine`. A set is asked as plain text, in the model's chat template, or both.
Needs the extra `harness`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import Context, SourceName
from pipeline.core.errors import AtomError, installing
from pipeline.core.stage import Inputs, Report, Stage, added
from stages.confidence import clustered
from stages.evaluation import estimates
from stages.evaluation.estimates import EngineConfig, Piece, compute, compute_shard
from stages.evaluation.scores import HarnessScores
from stages.formats.table import Double, Int32, String, columns_of, write_json, write_rows
from stages.tasks.benchmarks import (
    CHAT,
    RAW,
    BenchmarksConfig,
    Form,
    data_folder,
    in_folder,
    load_task,
    shots_of,
    task_manager,
)

VERSION = 3
BATCH = 32
# Difference up to which two means are the same: of the same values, added up in other orders.
EQUAL = 1e-9
# The metric that is 1 for an answer in conversation that was cut off in its thinking, which is a wrong one.
CUT_OFF = "cut_off"


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
    """the answer, without thinking, or as JSON the log-probabilities of the choices"""
    form: String
    """`raw`: as plain text; `chat`: in the model's chat template"""


RESULTS = columns_of(ItemResult)


class HarnessConfig(BenchmarksConfig, EngineConfig):
    """The task sets, as in stage `benchmarks`, and how the model is asked."""

    forms: Annotated[dict[SourceName, tuple[Form, ...]], Field(max_length=200)] = added({})
    """forms in which each set is asked; a set that is missing: raw alone"""
    max_new_tokens: Context | None = added(None)
    """maximum number of tokens of an answer in conversation, its thinking included; null: as the task has it"""


def run(config: HarnessConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Runs the tasks of inputs["benchmarks"] on the export inputs["model"].

    Seals `items.parquet`, one row for each item, filter and metric, `scores.json`, which follows from it alone
    (`summary`), and a copy of the tasks. Resumes from `work`, which keeps every finished task. Only metrics that are
    means over items are sealed; the others are named in the log.

    Raises:
        AtomError: The harness or a task is missing.
    """
    rows = list[ItemResult]()
    lower = dict[str, set[str]]()
    for measured in compute(_pieces(config, inputs), work, partial(_load, config, inputs, work), report, "tasks"):
        rows += measured["rows"]
        lower.setdefault(measured["set"], set()).update(measured["lower"])
        if left_out := measured["left_out"]:
            report.note(f"{measured['task']}: not means over items, and left out: {', '.join(left_out)}")
    write_rows(out / "items.parquet", RESULTS, rows)
    scores = summary(rows)
    write_json(out / "scores.json", scores)
    task_sets = {
        name: {**row, "forms": forms, "lower": sorted(lower[name]), **config.engine.stated()}
        for name, row in inputs["benchmarks"].json("tasks.json").items()
        if (forms := config.forms.get(name, (RAW,)))
    }
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
    of_harness = {each.name: each.of_harness for each in config.sets}
    for task_set, stated in benchmarks.json("tasks.json").items():
        folder = benchmarks / "folders" / task_set if stated["folder"] else None
        for form in config.forms.get(task_set, (RAW,)):
            for number, name in enumerate(stated["tasks"]):
                measure = partial(
                    _measure,
                    task_set=task_set,
                    name=name,
                    form=form,
                    shots=stated["shots"],
                    folder=folder,
                    of_harness=of_harness[task_set],
                    data=benchmarks / data_folder(name),
                    limit=config.limit,
                    max_new_tokens=config.max_new_tokens,
                )
                pieces.append(Piece(f"{task_set}-{form}-{number:04d}", measure))
    return pieces


def summary(rows: Sequence[ItemResult]) -> HarnessScores:
    """Returns `scores.json` from the table alone: the mean over items of each metric and filter, with its error.

    Metrics in conversation end in `,chat`.
    """
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        by_metric = values.setdefault(row["set"], {}).setdefault(row["task"], {})
        by_metric.setdefault(metric_key(row), []).append(row["value"])
    return {
        task_set: {task: {name: clustered(each) for name, each in metrics.items()} for task, metrics in tasks.items()}
        for task_set, tasks in values.items()
    }


def metric_key(row: Mapping[str, Any]) -> str:
    """Returns the name of a row's metric in `scores.json`."""
    # Tables of earlier versions have raw forms alone.
    form = row.get("form") or RAW
    return ",".join([row["metric"], row["filter"], *([] if form == RAW else [form])])


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
    import torch

    from stages.formats.tokenizer import END, without_special
    from stages.mcore import gpu

    class Published(HFLM):  # type: ignore[misc, unused-ignore]
        """Ends an answer like the release's evaluation: at the end of a document, with all tokens in the text."""

        def tok_decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
            text: str = self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            return text

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **settings: Any) -> Any:
            settings.setdefault("eos_token_id", self.tokenizer.convert_tokens_to_ids(END))
            return super()._model_generate(context, max_length, stop, **settings)

        def draw(
            self, rows: Sequence[Sequence[int]], room: int, stops: Sequence[int], settings: Mapping[str, Any]
        ) -> list[list[int]]:
            """Returns the ids of an answer to each row, for `InConversation`."""
            answers = dict[int, list[int]]()
            by_length = sorted(range(len(rows)), key=lambda n: (len(rows[n]), n))
            for start in range(0, len(rows), BATCH):
                batch = by_length[start : start + BATCH]
                width = max(len(rows[n]) for n in batch)
                padding = [[self.tokenizer.pad_token_id] * (width - len(rows[n])) for n in batch]
                ids = torch.tensor([[*left, *rows[n]] for left, n in zip(padding, batch, strict=True)])
                mask = torch.tensor([[0] * len(left) + [1] * (width - len(left)) for left in padding])
                drawn = self._model_generate(
                    ids.to(self.device),
                    width + room,
                    [],
                    attention_mask=mask.to(self.device),
                    eos_token_id=list(stops),
                    **settings,
                )
                answers |= zip(batch, drawn[:, width:].tolist(), strict=True)
            return [answers[n] for n in range(len(rows))]

    model = Published(str(folder.resolve()), dtype="float32", device=gpu.start().type, batch_size=BATCH)
    # Names of special tokens in a question are text, as in training.
    model.tokenizer = without_special(model.tokenizer)
    return model


def evaluate(
    model: Any, tasks: list[Any], manager: Any, limit: int | None = None, chat: bool = False
) -> dict[str, Any]:
    """Returns the harness's result: `results` by task, and `samples`. `manager` is its index of tasks.

    `chat`: the questions go through the model's chat template, and each example is a turn of its own.
    """
    import lm_eval

    # Without the bootstrap of the harness: errors are computed from the items (`summary`).
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        verbosity="ERROR",
    )
    return results


def _measure(
    model: Any,
    task_set: str,
    name: str,
    form: Form,
    shots: int | None,
    folder: Path | None,
    of_harness: str | None,
    data: Path,
    limit: int | None,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """Returns the `rows` of one task in one form, and the metrics that are `left_out`, or better if `lower`."""
    import datasets

    if form == CHAT:
        from stages.evaluation.harness_chat import InConversation

        model = InConversation(model, max_new_tokens)

    class Splits(dict[str, datasets.Dataset]):
        """The splits that stage `benchmarks` keeps, so that nothing is read from the network; others are empty.

        A task looks at its examples even if it shows none.
        """

        def __missing__(self, split: str) -> datasets.Dataset:
            return next(iter(self.values())).select([])

    splits = Splits({path.stem: datasets.Dataset.from_parquet(str(path)) for path in sorted(data.glob("*.parquet"))})
    manager = task_manager(folder, of_harness)
    with in_folder(folder):
        task = load_task(manager, name, {"custom_dataset": lambda **_: splits, **shots_of(shots)})
        result = evaluate(model, [task], manager, limit, chat=form == CHAT)
    stated, samples = result["results"][name], sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    if not samples:
        raise AtomError(f"{name} of {task_set} has no items in its sealed splits; run the stage benchmarks again")

    rows: list[ItemResult] = []
    left_out = []

    def add(metric: str, kind: str, scored: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
        for sample, value in zip(scored, values, strict=True):
            row = ItemResult(
                set=task_set,
                task=name,
                number=sample["doc_id"],
                filter=kind,
                metric=metric,
                value=float(value),
                target=str(sample["target"]),
                response=_response(sample),
                form=form,
            )
            rows.append(row)

    higher = result["higher_is_better"][name]
    for metric, kind in sorted({(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]}):
        scored = [sample for sample in samples if sample["filter"] == kind and metric in sample["metrics"]]
        values = [sample[metric] for sample in scored]
        # Some metrics, such as a corpus BLEU, are no means over items, and could not be recomputed from the rows.
        numbers = all(isinstance(value, (int, float)) for value in values)
        if not numbers or abs(sum(values) / len(values) - stated[f"{metric},{kind}"]) > EQUAL:
            left_out.append(metric)
            continue
        if higher.get(metric, True):
            # An empty answer may be a right one to some tasks; one that was cut off is wrong to all.
            values = [min(0.0, v) if _is_cut_off(s) else v for s, v in zip(scored, values, strict=True)]
        add(metric, kind, scored, values)
    if form == CHAT and isinstance(samples[0]["resps"][0][0], str):
        each = list({sample["doc_id"]: sample for sample in samples}.values())
        add(CUT_OFF, "none", each, [_is_cut_off(sample) for sample in each])
    lower = sorted(metric for metric, is_better in higher.items() if not is_better)
    return {"set": task_set, "task": name, "rows": rows, "left_out": left_out, "lower": lower}


def _is_cut_off(sample: dict[str, Any]) -> bool:
    """Returns True if a response of a sample was cut off in the thinking."""
    from stages.evaluation.harness_chat import CutOff

    return any(isinstance(text, CutOff) for responses in sample["resps"] for text in responses)


def _response(sample: dict[str, Any]) -> str:
    responses = sample["filtered_resps"]
    return responses[0] if isinstance(responses[0], str) else json.dumps(responses, default=float)


def lack(config: HarnessConfig) -> str | None:
    """Returns what this machine lacks for the engine, or to score answers, in one sentence; None if nothing."""
    from stages.evaluation.benchmark_scoring import obstacle_of

    return config.engine.lack or obstacle_of(each for each in config.sets if config.forms.get(each.name, (RAW,)))


STAGE = Stage("harness", VERSION, HarnessConfig, run, **{**estimates.of_engine(), "lack": lack}, run_shard=run_shard)
