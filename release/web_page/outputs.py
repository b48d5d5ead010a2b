"""The outputs of every evaluation item, of all models beside each other, in parts for the page; and contamination."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release import scratch, untrusted
from release.assembly.published_tables import read_json, stream_rows
from release.layout import when
from release.web_page.script_parts import PartWriter
from release.web_page.spill import Spill

PER_PART = 20
LONGEST = 2_000
"""Characters of a question or an output that are shown."""
ROWS = 64
ITEMS_PER_PART = 1_000
WORST = {"contaminated": "c", "overlap": "o", "clean": "-"}
"""{verdict on contamination: its sign}, the worst one first"""


@dataclass(frozen=True)
class Answer:
    """One output to one item. verdict: 1 right, 0 wrong, p in part. note: in words."""

    id: str
    kind: str
    question: str | None
    expected: str | None
    text: str
    verdict: str
    note: str = ""


@dataclass(frozen=True)
class ItemSet:
    """A set of items. answers: {column, a model as a rule: its answers}; files: {column: path in the release}."""

    name: str
    title: str
    answers: Mapping[str, Callable[[], Iterable[Answer]]]
    files: Mapping[str, str]


@dataclass
class Written:
    """What the page says about a set whose parts are written."""

    name: str
    title: str
    columns: list[str]
    files: list[str]
    items: int = 0
    kinds: list[str] = field(default_factory=list)


def item_sets(release: Path) -> Iterator[ItemSet]:
    """The sets of a release, by folder of the evaluation."""
    folder = release / "dataset/evaluation"
    tables = {
        "problems": ("Problems, continued as text", "*/items.parquet", _problem_rows),
        "passkey": ("Keys hidden in long texts", "*/passkey.parquet", _passkey_rows),
        "test": ("Problems in conversation", "test/*/answers.parquet", _chat_rows(folder / "chat.jsonl")),
        "fresh": ("New problems, drawn from the digest of the weights", "fresh/*/answers.parquet",
                  _chat_rows(folder / "fresh/chat.jsonl")),
        "harness": ("Task sets of lm-evaluation-harness", "harness/*/items.parquet", _harness_rows),
    }  # fmt: skip
    for name, (title, pattern, rows) in tables.items():
        if paths := _by_model(path for path in folder.glob(pattern) if path.parent.name != "contamination"):
            yield ItemSet(name, title, _calls(paths, rows), _files(release, paths))
    for model, path in _by_model(folder.glob("preferences/*/pairs.parquet")).items():
        before = read_json(path.parent / "scores.json")["before"]
        columns = {before: _pair_rows("before"), model: _pair_rows("model")}
        answers = {side: _calls({side: path}, rows)[side] for side, rows in columns.items()}
        files = dict.fromkeys(columns, path.relative_to(release).as_posix())
        yield ItemSet(f"preferences-{model}", f"Requests: {model} against {before}", answers, files)


def _by_model(paths: Iterable[Path]) -> dict[str, Path]:
    named = {path.parent.name: path for path in paths}
    return {model: named[model] for model in sorted(named, key=when)}


def _files(release: Path, paths: Mapping[str, Path]) -> dict[str, str]:
    return {model: path.relative_to(release).as_posix() for model, path in paths.items()}


def _calls(
    paths: Mapping[str, Path], rows: Callable[[Path], Iterable[Answer]]
) -> dict[str, Callable[[], Iterable[Answer]]]:
    return {model: (lambda path=path: rows(path)) for model, path in paths.items()}  # type: ignore[misc]


def _problem_rows(path: Path) -> Iterator[Answer]:
    for row in stream_rows(path, ["id", "task", "prompt", "expected", "output", "score"], ROWS):
        yield Answer(row["id"], row["task"], row["prompt"], row["expected"], row["output"], _verdict(row["score"]))


def _passkey_rows(path: Path) -> Iterator[Answer]:
    for row in stream_rows(path, ["id", "length", "depth", "expected", "output", "score"], ROWS):
        question = f"a text of {row['length']} tokens, the key at {row['depth']:g} of it"
        kind = f"{row['length']} tokens"
        yield Answer(row["id"], kind, question, row["expected"], row["output"], _verdict(row["score"]))


def _harness_rows(path: Path) -> Iterator[Answer]:
    columns = ["set", "task", "number", "filter", "metric", "value", "target", "response"]
    for row in stream_rows(path, columns, ROWS):
        name = "/".join(str(row[column]) for column in columns[:5])
        yield Answer(name, row["task"], None, row["target"], row["response"], _verdict(row["value"]), row["metric"])


def _chat_rows(items: Path) -> Callable[[Path], Iterator[Answer]]:
    """The greedy answers to the items of a file, with how many of the sampled ones are right."""

    def rows(path: Path) -> Iterator[Answer]:
        questions = dict(_questions(items))
        samples: dict[str, list[int]] = {}
        for row in stream_rows(path, ["id", "sample", "reward"]):
            if row["sample"] >= 0:
                counts = samples.setdefault(row["id"], [0, 0])
                counts[0], counts[1] = counts[0] + (row["reward"] == 1), counts[1] + 1
        for row in stream_rows(path, ["id", "kind", "sample", "text", "reward", "tokens", "finished", "parts"], ROWS):
            if row["sample"] >= 0:
                continue
            question, expected = questions.get(row["id"], (None, None))
            right, drawn = samples.get(row["id"], (0, 0))
            notes = [f"{right} of {drawn} sampled answers right"] if drawn else []
            notes += [] if row["finished"] else ["cut at the length limit"]
            reward = _task(row["parts"], row["reward"])
            yield Answer(
                row["id"], row["kind"], question, expected, row["text"], _verdict(reward), ", ".join(notes)
            )  # fmt: skip

    return rows


def _pair_rows(side: str) -> Callable[[Path], Iterator[Answer]]:
    def rows(path: Path) -> Iterator[Answer]:
        columns = ["id", "question", f"{side}_text", f"{side}_reward", f"{side}_parts"]
        for row in stream_rows(path, columns, ROWS):
            reward = row[f"{side}_reward"]
            verdict = _verdict(_task(row[f"{side}_parts"], reward))
            kind = row["id"].partition("/")[0]
            yield Answer(row["id"], kind, row["question"], None, row[f"{side}_text"], verdict, f"reward {reward:.2f}")

    return rows


def _questions(path: Path) -> Iterator[tuple[str, tuple[str, str | None]]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            expected = row.get("expected_answer")
            yield row["id"], (str(row.get("question", "")), None if expected is None else str(expected))


def _task(parts: str | None, reward: float) -> float:
    """The part `task` of a reward, or else the whole of it."""
    value = untrusted.parse_json(parts.encode(), "parts") if parts else None
    task = value.get("task") if isinstance(value, dict) else None
    return float(task) if isinstance(task, (int, float)) else reward


def _verdict(score: float) -> str:
    return "1" if score >= 1 else "p" if score > 0 else "0"


def write(release: Path, parts: PartWriter) -> list[Written]:
    """Writes the parts of all sets: `outputs/<set>` lists the items with their verdicts, `outputs/<set>-N` has
    PER_PART of them."""
    return [_write_set(each, parts) for each in item_sets(release)]


def _write_set(items: ItemSet, parts: PartWriter) -> Written:
    """Answers go to bins by item on the disk; ids and verdicts stay in memory."""
    columns = list(items.answers)
    about = Written(items.name, items.title, columns, [items.files[column] for column in columns])
    numbers: dict[str, int] = {}
    kinds: dict[str, int] = {}
    verdicts: list[list[Any]] = []
    with scratch.folder() as folder:
        spill = Spill(folder)
        for column, rows in enumerate(items.answers.values()):
            for answer in rows():
                number = numbers.setdefault(answer.id, len(numbers))
                if number == len(verdicts):
                    verdicts.append([answer.id, kinds.setdefault(answer.kind, len(kinds)), ["-"] * len(columns)])
                verdicts[number][2][column] = answer.verdict
                row = [number, column, *(_cut(text) for text in (answer.question, answer.expected, answer.text))]
                spill.add(number // PER_PART, (json.dumps([*row, answer.note]) + "\n").encode())
        for part in range(-(-len(numbers) // PER_PART)):
            rows_of_part = [[None, None, [None] * len(columns)] for _ in range(PER_PART)]
            for line in spill.take(part).splitlines():
                number, column, question, expected, text, note = json.loads(line)
                row = rows_of_part[number % PER_PART]
                row[0], row[1] = (question if row[0] is None else row[0]), (expected if row[1] is None else row[1])
                row[2][column] = [text, note]  # type: ignore[index]
            parts.write(f"outputs/{items.name}-{part}", rows_of_part[: len(numbers) - part * PER_PART])
    about.items, about.kinds = len(numbers), list(kinds)
    index = [[id, kind, "".join(signs)] for id, kind, signs in verdicts]
    parts.write(f"outputs/{items.name}", {"kinds": list(kinds), "per": PER_PART, "items": index})
    return about


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= LONGEST else f"{text[:LONGEST]}…"


def write_contamination(release: Path, parts: PartWriter) -> tuple[list[str], int]:
    """Writes the verdict on each item by phase, the worst items first: `contamination/items-N` has rows of id, kind,
    split, words, a sign for each phase, longest run, overlap. Returns the phases and the number of items."""
    path = release / "dataset/evaluation/contamination/items.parquet"
    if not path.exists():
        return [], 0
    phases: dict[str, int] = {}
    rows: dict[tuple[str, str], list[Any]] = {}
    for row in stream_rows(path, ["id", "kind", "split", "phase", "words", "longest", "overlap", "verdict"]):
        phase = phases.setdefault(row["phase"], len(phases))
        item = rows.setdefault(
            (row["split"], row["id"]), [row["id"], row["kind"], row["split"], row["words"], {}, 0, 0]
        )
        item[4][phase] = WORST.get(row["verdict"], "?")
        item[5], item[6] = max(item[5], row["longest"]), max(item[6], round(row["overlap"], 4))
    order = list(WORST.values())
    for item in rows.values():
        item[4] = "".join(item[4].get(phase, " ") for phase in range(len(phases)))
    worst = sorted(rows.values(), key=lambda row: (min(_rank(order, sign) for sign in row[4]), -row[6], row[2], row[0]))
    for number in range(0, len(worst), ITEMS_PER_PART):
        parts.write(f"contamination/items-{number // ITEMS_PER_PART}", worst[number : number + ITEMS_PER_PART])
    return list(phases), len(worst)


def _rank(order: list[str], sign: str) -> int:
    return order.index(sign) if sign in order else len(order)
