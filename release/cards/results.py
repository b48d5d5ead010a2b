"""`.eval_results/<data repository>.yaml` of a model repository: its measured scores as the Hub's evaluation results.

The Hub's `revision` is a commit, which is unknown before the data are published, so the source's URL has the tag. There
is no date: the Hub uses that of the commit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline.hub.client import PUBLIC_HUB, load
from release.cards.render import METRICS
from release.facts.model_facts import ModelFacts

FOLDER = ".eval_results"


def results_path(dataset: str) -> str:
    return f"{FOLDER}/{dataset.rpartition('/')[2]}.yaml"


def text(model: ModelFacts, dataset: str, version: str) -> str:
    """Returns the file's content. `dataset` is the id of the release's data repository."""
    return _dump(_rows(model, dataset, version))


def _dump(rows: Any) -> str:
    return str(yaml.safe_dump(rows, sort_keys=False, width=1000))


def problems(folder: Path, model: ModelFacts, dataset: str, version: str | None) -> list[str]:
    """Returns the errors of a model repository's file.

    Args:
        folder: The model repository.
        model: Its facts.
        dataset: The id of the release's data repository.
        version: The version of the release; None if only the model repository is known.
    """
    path = results_path(dataset)
    if not (folder / FOLDER).is_dir():
        return [f"{path} is missing"]
    # Further files would be shown as results by the Hub.
    present = [file.relative_to(folder).as_posix() for file in (folder / FOLDER).rglob("*")]
    if present != [path]:
        return [f"{FOLDER} holds {', '.join(sorted(present))}, and not {path} alone"]
    content = (folder / path).read_text()
    stated, measured = yaml.safe_load(content), _rows(model, dataset, version or "")
    # Equal values are not enough: the file could hold comments, or a key twice.
    written = _dump(stated) == content
    # The address of the source has the version.
    if version is None:
        stated, measured = _without_source(stated), _without_source(measured)
    return [] if stated == measured and written else [f"{path} is not what was measured"]


def _without_source(rows: Any) -> Any:
    """Returns the content of an untrusted file without its sources."""
    if not isinstance(rows, list):
        return rows
    return [{**row, "source": None} if isinstance(row, dict) else row for row in rows]


def _rows(model: ModelFacts, dataset: str, version: str) -> list[dict[str, Any]]:
    hub = load()
    scores, name = model.own_scores(), model.name()
    # Other engines round differently, so the engine belongs to the number.
    computed = f"; by vLLM ({scores['engine']})" if "engine" in scores else ""
    entries = [
        hub.EvalResultEntry(
            dataset_id=dataset,
            task_id=f"{metric}_{task}",
            value=row["value"],
            source_url=f"{PUBLIC_HUB}/datasets/{dataset}/tree/v{version}/evaluation/{name}",
            source_name="Scores, and the outputs that they follow from",
            notes=f"{title} on {measured_on}; standard error {row['se']}{computed}",
        )
        for kind, (metric, title, measured_on) in METRICS.items()
        for task, row in scores[kind].items()
    ]
    rows: list[dict[str, Any]] = hub.eval_result_entries_to_yaml(entries)
    return rows
