"""The evaluation set of the recipe: drawn before any training data; decontamination searches for its items."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline.core.bounds import Range, Seed, Words
from pipeline.core.errors import RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added
from pipeline.core.store import Artifact
from stages.formats.seeds import seed_of
from stages.formats.table import ITEMS, read_jsonl, read_table, write_jsonl, write_rows
from stages.tasks import Row, question, to_row
from stages.tasks.synthetic import courtesy_notes
from stages.tasks.synthetic.problems import TASKS, draw_distinct

VERSION = 1
CHAT = "chat.jsonl"


def _task_error(task: str) -> str | None:
    return None if task in TASKS else f"is an unknown task; known are {', '.join(sorted(TASKS))}"


# A procedural task by its name.
Task = Annotated[str, Words(40, test=_task_error)]
Items = Annotated[int, Range(1, 1e6, "each answer costs a generation")]
# The number of problems by task.
Problems = Annotated[dict[Task, Items], Field(min_length=1, max_length=len(TASKS))]
Requests = Annotated[int, Range(0, 10_000)]


class ChatItems(Config):
    """Evaluation items in conversations.

    These are the problems of `evaluation.problems`, further ones for validation, and requests for courteous notes.
    """

    validation: dict[Task, Items] = Field({}, max_length=len(TASKS))
    """number of further problems by task, for choosing settings"""
    courtesies: Requests = 0
    """number of held-out requests for measuring win rates"""
    courtesies_validation: Requests = 0
    """number of further requests for choosing settings"""


class ItemsConfig(Config):
    """The number of problems by task, and the recipe's seed."""

    problems: Problems
    """number of evaluation problems by task"""
    seed: Seed
    """seed of the recipe"""
    chat: ChatItems | None = added(None)
    """evaluation items in conversations; null: none"""


def run(config: ItemsConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `items.parquet`: id, task, prompt, answer, and the text that must not occur in training data.

    The seed's label differs from that of the training problems, so the two streams are independent; a training
    problem may equal an item by chance, and is then removed and counted by curation.
    """
    rows = []
    for task in sorted(config.problems):
        # A stream of its own for each task: another number of items of one leaves the others as they are.
        rng = random.Random(seed_of(f"items/{task}", config.seed))
        with asking_for_fewer("evaluation.problems"):
            problems = draw_distinct(task, config.problems[task], rng)
        for i, problem in enumerate(problems):
            row = {"task": task, "prompt": problem.prompt, "answer": problem.answer, "text": problem.question}
            rows.append({"id": f"{task}/{i:05d}", **row})
    write_rows(out / "items.parquet", ITEMS, rows)
    report.note(f"{len(rows)} evaluation items")
    if config.chat is not None:
        chat_items = list(_chat_rows(config.chat, rows, config.seed))
        write_jsonl(out / CHAT, chat_items)
        report.note(f"{len(chat_items)} items for conversations")


@contextmanager
def asking_for_fewer(setting: str) -> Iterator[None]:
    """Raises RecipeError in the place of the ValueError of a task that has too few problems."""
    try:
        yield
    except ValueError as error:
        raise RecipeError(f"{setting}: {error}; ask for fewer") from None


def courtesy_row(id: str, request: courtesy_notes.Request, verifier: str = "courtesy", **extra_fields: Any) -> Row:
    """Returns the row for a request for a courteous note."""
    fields = {"act": request.act.name, "who": request.who, "what": request.what, **extra_fields}
    return to_row(id, request.text, verifier, "courtesy", 1, **fields)


def _chat_rows(config: ChatItems, items: list[dict[str, str]], seed: int) -> Iterator[Row]:
    # Validation items must not be test items.
    excluded = {row["text"] for row in items}
    for row in items:
        fields = {"question": row["text"], "expected_answer": row["answer"], "split": "test"}
        yield to_row(row["id"], row["text"], "exact", row["task"], 0, **fields)
    for task, count in sorted(config.validation.items()):
        rng = random.Random(seed_of(f"items/validation/{task}", seed))
        with asking_for_fewer("evaluation.chat.validation"):
            problems = draw_distinct(task, count, rng, without=excluded)
        for i, problem in enumerate(problems):
            fields = {"question": problem.question, "expected_answer": problem.answer, "split": "validation"}
            yield to_row(f"validation/{task}/{i:05d}", problem.question, "exact", task, 0, **fields)
    rng = random.Random(seed_of("items/courtesies", seed))
    with asking_for_fewer("evaluation.chat.courtesies"):
        requests = courtesy_notes.draw_distinct(config.courtesies + config.courtesies_validation, rng, heldout=True)
    for i, request in enumerate(requests):
        split = "test" if i < config.courtesies else "validation"
        yield courtesy_row(f"{split}/courtesy/{i:05d}", request, split=split)


def chat_rows(items: Artifact) -> list[dict[str, Any]]:
    """Returns the items for conversations, if the recipe has them."""
    return read_jsonl(items / CHAT) if (items / CHAT).exists() else []


def texts_of(items: Artifact) -> list[tuple[str, str]]:
    """Returns (id, text that must not occur in training data) of every item."""
    rows = read_table(items / "items.parquet", ["id", "text"]).to_pylist()
    texts = {row["id"]: row["text"] for row in rows}
    return list({**{row["id"]: question(row) for row in chat_rows(items)}, **texts}.items())


STAGE = Stage(
    "items",
    VERSION,
    ItemsConfig,
    run,
    estimate=lambda config: Estimate(cpu_seconds=2.0, memory_bytes=200_000_000, disk_bytes=1_000_000),
)
