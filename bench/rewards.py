"""What the rewards of the packaged recipes pay to answers that solve nothing, by family of attacks.

    .venv/bin/python bench/rewards.py                            # seven minutes of CPU time
    .venv/bin/python bench/rewards.py --dataset knights_knaves   # beside them a set of reasoning-gym with its defaults
    .venv/bin/python bench/rewards.py --count 8                  # to see that it works

The sources of tasks are those of all phases of all packaged recipes, with fewer tasks each. Datasets of the Hub are
replaced by a few rows in the same format, which pass through the same source (`HubTasks`). The probe is that of the
stage `tasks`: a figure is the mean reward of the best answer of a family, chosen on other tasks if there are enough,
and the largest over the levels of a kind. `chance` is that of the level with the least. A figure in bold is more than
the chance of its level + MARGIN. `reward-model` is trained in a run, so its rewards are not here.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from pydantic import BaseModel

from pipeline.graph import recipe
from stages.data.acquire.readers.row_files import Row as DataRow
from stages.rl.protocols import TaskSource, make_verifiers
from stages.rl.rollout.generation import Verifiers
from stages.rl.rollout.task_sources.procedural_tasks import ReasoningGymTasks
from stages.rl.rollout.task_sources.stored_tasks import HubTasks
from stages.rl.rollout.tasks import MARGIN, TRAINED, ProbedBin, probe
from stages.rl.rollout.unsolved import FAMILIES
from stages.tasks import Row, bin_of

RECIPES = Path(__file__).parent.parent / "pipeline" / "recipes"
SEED = 0
# (text, head of the function, the value that it returns, its tests)
FUNCTIONS = (
    ("Double a number.", "double(x)", "2 * x", "double(2) == 4", "double(0.5) == 1.0"),
    ("Add all numbers of a list.", "total(x)", "sum(x)", "total([1, 2]) == 3", "total([]) == 0"),
    ("Reverse a text.", "back(s)", "s[::-1]", "back('ab') == 'ba'", "back('xyz') == 'zyx'"),
    ("Is a number even?", "even(n)", "n % 2 == 0", "even(2) == True", "even(3) == False"),
    ("Sort a tuple.", "order(t)", "tuple(sorted(t))", "order((2, 1)) == (1, 2)", "order((3, 5, 4)) == (3, 4, 5)"),
    ("The largest of a list.", "top(x)", "max(x)", "top([1, 9, 2]) == 9", "top([-1, -3]) == -1"),
    ("Count the letter a.", "count(s)", "s.count('a')", "count('tea') == 1", "count('xyz') == 0"),
    ("Square each number.", "squares(x)", "[n * n for n in x]", "squares([1, 3]) == [1, 9]", "squares([]) == []"),
    ("Join words with spaces.", "join(w)", "' '.join(w)", "join(['a', 'b']) == 'a b'", "join(['x']) == 'x'"),
    (
        "Count the letters.",
        "letters(s)",
        "{c: s.count(c) for c in s}",
        "letters('aa') == {'a': 2}",
        "letters('') == {}",
    ),
    ("The absolute difference.", "apart(a, b)", "abs(a - b)", "apart(3, 7) == 4", "apart(7, 4) == 3"),
)


def word_problem(rng: random.Random) -> dict[str, str]:
    """Returns a row in the manner of GSM8K."""
    boxes, each, eaten = rng.randint(3, 20), rng.randint(3, 40), rng.randint(1, 8)
    left = boxes * each - eaten
    return {
        "question": f"A shop has {boxes} boxes of {each} apples. {eaten} apples are eaten. How many are left?",
        "answer": f"There are {boxes}*{each}=<<{boxes}*{each}={boxes * each}>>{boxes * each} apples.\n#### {left}",
    }


def local_rows(kind: str) -> list[dict[str, Any]]:
    """Returns rows in the format of a dataset of the Hub that recipes name, by the kind of its tasks."""
    if kind == "gsm8k":
        rng = random.Random(SEED)
        return [word_problem(rng) for _ in range(48)]
    rows: list[dict[str, Any]] = []
    for text, head, value, *tests in FUNCTIONS:
        code, asserts = f"def {head}:\n    return {value}\n", [f"assert {test}" for test in tests]
        mbpp = {"text": text, "code": code, "test_list": asserts, "test_setup_code": ""}
        rows.append(mbpp if kind == "mbpp" else {"input": text, "output": code, "unit_tests": json.dumps(asserts)})
    return rows


class LocalTasks(HubTasks):
    """A dataset of the Hub, with rows of this file."""

    def _read(self) -> Iterator[DataRow]:
        return (DataRow(fields, self.kind, f"{self.kind}:{n}") for n, fields in enumerate(local_rows(self.kind)))


def sources_in(value: Any) -> Iterator[TaskSource]:
    """Yields the sources of tasks in the settings of a recipe, whatever phase has them."""
    if isinstance(value, TaskSource):
        yield value
    elif isinstance(value, BaseModel):
        yield from sources_in(list(value.__dict__.values()))
    elif isinstance(value, dict):
        yield from sources_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from sources_in(each)


@cache
def packaged_sources() -> dict[str, TaskSource]:
    """Returns {bin: its source} for all packaged recipes; of sources of one bin that with the least acknowledgement."""
    sources: dict[str, TaskSource] = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        for source in sources_in(recipe.load(path.stem).config):
            if source.verifier != TRAINED:
                for name in source.bins():
                    earlier = sources.setdefault(name, source)
                    if (source.acknowledged_reward or 0) < (earlier.acknowledged_reward or 0):
                        sources[name] = source
    return sources


def rows_of(name: str, source: TaskSource, count: int) -> list[Row]:
    """Returns up to `count` tasks of a bin."""
    few = source.model_copy(update={"count": count})
    if isinstance(source, HubTasks):
        few = LocalTasks.model_validate(source.model_dump() | {"count": count})
    return [row for row in few.rows(SEED, set()) if bin_of(row) == name]


def measure(sources: dict[str, TaskSource], count: int) -> dict[str, ProbedBin]:
    """Returns the probe of each bin."""
    probed: dict[str, ProbedBin] = {}
    for name, source in sources.items():
        rows = rows_of(name, source, count)
        with closing(Verifiers(make_verifiers(rows, {}, None, {}), print)) as verifiers:
            probed[name] = probe(rows, verifiers.score, SEED, source.acknowledged_reward)
        print(f"{name}: {len(rows)} tasks", file=sys.stderr, flush=True)
    return probed


def cell(bins: list[ProbedBin], family: str) -> str:
    """Returns the best mean reward of a family, bold if it is too much in its bin; nothing if it has no answer."""
    pairs = [
        (answer["reward"]["value"], each["chance"])
        for each in bins
        for answer in each["answers"]
        if answer["family"] == family
    ]
    if not pairs:
        return ""
    mark = "**" if any(value > chance + MARGIN for value, chance in pairs) else ""
    return f"{mark}{max(pairs)[0]:.2f}{mark}"


def table(probed: dict[str, ProbedBin]) -> str:
    """Returns the table of Markdown, a row for each kind."""
    kinds: dict[str, list[ProbedBin]] = {}
    for name, each in probed.items():
        kinds.setdefault(name.rpartition("/")[0], []).append(each)
    lines = [
        f"| kind | reward | tasks | chance | {' | '.join(FAMILIES)} |",
        "|---|---|" + "---:|" * (2 + len(FAMILIES)),
    ]
    for kind, bins in kinds.items():
        cells = [cell(bins, family) for family in FAMILIES]
        chance = min(each["chance"] for each in bins)
        tasks = sum(each["tasks"] for each in bins)
        lines.append(f"| `{kind}` | `{bins[0]['verifier']}` | {tasks} | {chance:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--count", type=int, default=128, help="tasks of each kind and level")
    parser.add_argument("--dataset", action="append", default=[], help="a dataset of reasoning-gym beside those")
    parser.add_argument("--only", help="only kinds whose name begins with this")
    arguments = parser.parse_args()
    sources = packaged_sources() | {
        f"{name}/1": ReasoningGymTasks(source="reasoning-gym", dataset=name, count=arguments.count)
        for name in arguments.dataset
    }
    probed = measure({k: v for k, v in sources.items() if k.startswith(arguments.only or "")}, arguments.count)
    print(table(probed))
    print(json.dumps(probed))


if __name__ == "__main__":
    main()
