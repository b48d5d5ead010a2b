"""lm-evaluation-harness (arXiv 2405.14782) on a release: a second implementation of its figures.

    python -m release.audit.harness RELEASE [--model FOLDER] [--limit N]

`RELEASE` is a built or pulled release folder. The model is a folder of it, in plain transformers and float32. The
harness asks the evaluation problems that the release publishes and compares each answer with the one in the release, so
that two programs compute the card's figure. The last line is one JSON object. Needs the extra `harness`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.core.errors import AtomError, CheckFailed
from release.layout import MODEL, model_name, models_of
from stages.evaluation import harness

PROBLEMS = "release_problems"
"""The name of the task with the evaluation problems of the release."""


def problems(rows: list[dict[str, Any]], max_new_tokens: int) -> Any:
    """Returns the task with the evaluation problems; each row has `id`, `task`, `prompt` and `answer`."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    from stages.formats.tokenizer import END
    from stages.scorers import score_problem

    return ConfigurableTask(
        config={
            "task": PROBLEMS,
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answer"],
            "target_delimiter": "",
            "generation_kwargs": {"until": [END], "max_gen_toks": max_new_tokens, "do_sample": False},
            "process_results": lambda row, responses: {"exact_match": score_problem(row["answer"], responses[0])},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )


def read_problems(release: Path, folder: str) -> tuple[list[dict[str, Any]], int]:
    """Reads the evaluation problems with a model's stated answers (`output`, `score`).

    Also returns the longest answer allowed, in tokens.
    """
    from release.facts.published_tables import read_json, read_rows
    from stages.evaluation.settings import EvaluationSection

    models = models_of(path.stem for path in (release / "evidence/manifests").glob("*.json"))
    model = model_name(folder, models[-1] if models else "")
    items = release / "dataset/evaluation" / model / "items.parquet"
    recipe = release / "evidence/recipe.json"
    if not (items.is_file() and recipe.is_file()):
        raise CheckFailed(f"{release} does not contain {items.relative_to(release)} and evidence/recipe.json")
    settings = EvaluationSection.model_validate(read_json(recipe)["evaluation"])
    return read_rows(items), settings.max_new_tokens


def compare_answers(release: Path, folder: str, limit: int | None = None) -> dict[str, Any]:
    """Evaluates the release's problems with the harness, and compares the answers with the published ones.

    The result has the harness's figure, the stated one, and the ids of the answers that differ.
    """
    published, max_new_tokens = read_problems(release, folder)
    published = sorted(published, key=lambda row: row["id"])[:limit]
    rows = [
        {"id": row["id"], "task": row["task"], "prompt": row["prompt"], "answer": row["expected"]} for row in published
    ]

    results = harness.evaluate(harness.language_model(release / folder), [problems(rows, max_new_tokens)], None)
    answers = {sample["doc"]["id"]: sample["filtered_resps"][0] for sample in results["samples"][PROBLEMS]}
    return {
        "model": folder,
        "problems": len(published),
        "exact_match": results["results"][PROBLEMS]["exact_match,none"],
        "stated": sum(row["score"] for row in published) / len(published),
        "other_answers": [row["id"] for row in published if answers[row["id"]] != row["output"]],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path, help="a release folder")
    parser.add_argument("--model", default=MODEL, metavar="FOLDER", help="which of its models; default: model")
    parser.add_argument("--limit", type=int, default=None, help="only the first items")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error("--limit takes a number from 1 on")
    try:
        report = compare_answers(options.release, options.model, options.limit)
    except AtomError as error:
        print(f"release.audit.harness: {error}", file=sys.stderr)
        return error.exit_code
    comparison = f"{len(report['other_answers'])} of {report['problems']} answers differ"
    print(f"exact match {report['exact_match']:.3f}, stated {report['stated']:.3f}; {comparison}")
    print(json.dumps(report, default=str))
    return 1 if report["other_answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
