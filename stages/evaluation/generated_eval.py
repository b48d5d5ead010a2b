"""Stage `fresh`: evaluation items that did not exist before the weights.

    atom run atom-tiny --only fresh

The seed of the problems is the digest of the final model's weight tensors, so no training run could target them. A
problem may still occur in the data by chance: a problem whose question occurs in a document, an RL task, a preference
prompt or another evaluation item is removed, and counted by the place of the match. Anyone with the published weights
can draw the same problems (`digest_of` and `draw`), and with the published data remove the same ones (`find_places`).

This protects against leakage, not against training until a digest gives easy problems.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Key, SourceName
from pipeline.core.errors import RecipeError
from pipeline.core.parts import PartCount, seal_part, shards_of
from pipeline.core.stage import Config, Inputs, Report, Stage, operational
from pipeline.core.store import once
from stages.data import estimates
from stages.data.estimates import Size
from stages.formats.seeds import seed_of
from stages.formats.table import part_files, stream_rows, write_json, write_jsonl
from stages.tasks import Row, question, to_row
from stages.tasks.eval_set import CHAT, Problems, chat_rows, texts_of
from stages.tasks.synthetic.problems import draw_distinct

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ItemRuns

VERSION = 2
EVALUATION = "evaluation items"
# The input with the pairs that others ordered.
PREFERENCES = "preferences"


Sources = Annotated[tuple[SourceName, ...], Field(max_length=MOST_SOURCES)]


class FreshConfig(Config):
    """The number of problems by task, and the sources of documents of each training phase."""

    problems: Problems
    """number of problems by task"""
    phases: Annotated[dict[Key, Sources], Field(max_length=100)]
    """sources of documents by training phase"""
    parts: Annotated[dict[SourceName, PartCount], Field(max_length=MOST_SOURCES)] = operational({})
    """parts of each of these sources; empty: no job array"""
    expected: Size | None = operational(None)
    """size of the corpus, for `atom plan` alone; null: unknown"""


class RemovedItem(TypedDict):
    """A generated item that occurs in the data, and the places where it does."""

    id: str
    question: str
    where: list[str]


class FreshMeta(TypedDict):
    """The content of `meta.json`."""

    digest: str
    """digest of the final model's tensors"""
    seed: str
    """its 256 bits in hex"""
    problems: dict[str, int]
    """requested number of problems by task"""
    drawn: int
    """number of generated items"""
    kept: int
    """number of kept items"""
    removed: list[RemovedItem]
    """items that occur in the data, and where"""


def run(config: FreshConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Draws problems from the digest of the export inputs["model"], and removes those that occur in the data.

    The data is inputs["dedup"], inputs["items"], and in inputs["tasks-<phase>"] the tasks of each phase of
    reinforcement or preference learning.

    Seals `chat.jsonl`, rows as in the items artifact, and `meta.json`: digest, seed, the number of problems drawn, and
    the removed ones with their places.

    Raises:
        RecipeError: A task has too few problems.
    """
    digest = _digest(inputs, work)
    rows = draw(digest, config.problems)
    matches = find_places(rows, config, inputs, work, report)
    kept_rows = [row for row in rows if row["id"] not in matches]
    write_jsonl(out / CHAT, kept_rows)
    by_id = {row["id"]: row for row in rows}
    removed: list[RemovedItem] = [
        {"id": id, "question": question(by_id[id]), "where": names} for id, names in sorted(matches.items())
    ]
    meta: FreshMeta = {
        "digest": digest,
        "seed": seed_from(digest),
        "problems": config.problems,
        "drawn": len(rows),
        "kept": len(kept_rows),
        "removed": removed,
    }
    write_json(out / "meta.json", meta)
    report.note(f"{len(rows)} problems drawn from {digest}, {len(kept_rows)} kept")


def run_shard(config: FreshConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Searches one part of the kept documents."""
    parts = [(source, number) for source, count in sorted(config.parts.items()) for number in range(count)]
    source, number = parts[shard]
    files = part_files(inputs["dedup"] / "kept", source)
    _search_part(_runs(draw(_digest(inputs, work), config.problems)), work, source, number, files[number])


def _digest(inputs: Inputs, work: Path) -> str:
    """Returns the digest of the model, which every part needs."""
    digest: str = once(work / "digest.json", lambda: digest_of(inputs["model"] / "model"))
    return digest


def digest_of(folder: Path) -> str:
    """Returns `sha256:…` over names, types, shapes and bytes of an exported model's tensors, by name.

    Raises:
        AtomError: A file is missing or damaged.
    """
    import torch

    from stages.train.checkpoint import release_checkpoint

    tensors = release_checkpoint.Tensors(folder)
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hasher.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        # As bytes, since numpy has no type for bf16.
        hasher.update(tensor.flatten().view(torch.uint8).numpy().data)
    return f"sha256:{hasher.hexdigest()}"


def seed_from(digest: str) -> str:
    """Returns the seed in hexadecimal: the digest's 256 bits."""
    return digest.removeprefix("sha256:")


def draw(digest: str, problems: Mapping[str, int]) -> list[Row]:
    """Returns the problems of a model with that digest, before any removal."""
    rows: list[Row] = []
    for task in sorted(problems):
        # All 256 bits of the digest: a shorter seed could be searched for weights that give easy problems.
        rng = random.Random(seed_of(f"fresh/{task}", int(seed_from(digest), 16)))
        try:
            generated = draw_distinct(task, problems[task], rng)
        except ValueError as error:
            raise RecipeError(f"evaluation.problems: {error}; ask for fewer") from None
        for i, problem in enumerate(generated):
            fields = {"question": problem.question, "expected_answer": problem.answer, "split": "test"}
            rows.append(to_row(f"fresh/{task}/{i:05d}", problem.question, "exact", task, 0, **fields))
    return rows


def find_places(
    rows: list[Row], config: FreshConfig, inputs: Inputs, work: Path, report: Report
) -> dict[str, list[str]]:
    """Returns the places of questions that occur in the data: item id → training phases, task artifacts, EVALUATION.

    A question occurs in a text that contains its words in sequence, as decontamination compares them. All kept
    documents of a phase's sources count, held-out ones too. Resumes after the last searched part.
    """
    runs = _runs(rows)
    matches: dict[str, list[str]] = {}

    def record_matches(name: str, nodes: set[int]) -> None:
        closed_runs = runs.with_prefixes(nodes)
        for row in rows:
            # With n-grams longer than any question, the overlap is 1 if all of its words stand in sequence.
            if runs.overlap(row["id"], closed_runs, ngram=10**9)[0] == 1:
                matches.setdefault(row["id"], []).append(name)

    by_source: dict[str, set[int]] = {}
    names = sorted({source for sources in config.phases.values() for source in sources})
    parts = [(name, n, path) for name in names for n, path in enumerate(part_files(inputs["dedup"] / "kept", name))]
    for done, (source, number, path) in enumerate(parts, start=1):
        by_source.setdefault(source, set()).update(_search_part(runs, work, source, number, path))
        report.progress(done, len(parts), "parts")
    # Sources are searched once, and belong to several phases.
    for phase, sources in config.phases.items():
        record_matches(phase, set().union(*(by_source[source] for source in sources)))
    for role in task_roles(inputs):
        record_matches(role, set().union(*(runs.search(text) for text in prompts(inputs, role))))
    items = [text for _, text in texts_of(inputs["items"])] + [question(row) for row in chat_rows(inputs["items"])]
    record_matches(EVALUATION, set().union(*(runs.search(text) for text in items)))
    return matches


def _runs(rows: Sequence[Row]) -> ItemRuns:
    from stages.data.curate.decontamination import ItemRuns

    return ItemRuns({row["id"]: question(row) for row in rows})


def _search_part(runs: ItemRuns, work: Path, source: str, number: int, path: Path) -> list[int]:
    """Returns the runs that occur in a part of the kept documents, kept in `work`."""
    import numpy as np

    def search(folder: Path) -> dict[str, Any]:
        nodes: set[int] = set()
        for row in stream_rows(path, ["text"]):
            nodes |= runs.search(row["text"])
        np.save(folder / "runs.npy", np.array(sorted(nodes), np.uint32))
        return {}

    part = seal_part(work, f"{source}-{number:05d}", search)
    nodes: list[int] = np.load(part.folder / "runs.npy").tolist()
    return nodes


def task_roles(inputs: Inputs) -> list[str]:
    """Returns the inputs with tasks of reinforcement and preference learning, and with pairs that others ordered."""
    return sorted(role for role in inputs if role.startswith("tasks-") or role == PREFERENCES)


def prompts(inputs: Inputs, role: str) -> Iterator[str]:
    """Yields the text of every message of the tasks or pairs of one artifact."""
    from stages.rl import preference_pairs
    from stages.rl.rollout.tasks import read

    if role == PREFERENCES:
        for pair in stream_rows(inputs[role] / preference_pairs.FILE, ["messages", "chosen", "rejected"]):
            asked = [str(message["content"]) for message in json.loads(pair["messages"])]
            yield "\n".join([*asked, pair["chosen"], pair["rejected"]])
        return
    for row in read(inputs[role]):
        yield "\n".join(str(message["content"]) for message in row["responses_create_params"]["input"])


STAGE = Stage(
    "fresh",
    VERSION,
    FreshConfig,
    run,
    estimate=lambda config: estimates.estimate("fresh", config.expected, small=10.0),
    shards=lambda config: shards_of(config.parts.values()),
    run_shard=run_shard,
)
