"""What `atom trace` answers, as data and in lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from release.untrusted import cleaned

SCHEMA = 1
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What all answers can do."""

    def to_json(self) -> dict[str, Any]:
        """The fields, and `schema`, `kind`; fields are only ever added."""
        return {"schema": SCHEMA, "kind": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class Use:
    """A step that read a document. order: the folder that says so; rows: [{row, segment, offset, length}], in tokens.

    moved: whether the step moved the weights (a spike, an excluded batch or a step without answers moves none); None
    where the log of the phase is not here.
    """

    phase: str
    step: int
    order: str
    moved: bool | None
    rows: Rows


@dataclass(frozen=True)
class Step(Answer):
    """The segments of one optimizer step: [{row, segment, offset, length, source, id, license, origin}] as read."""

    phase: str
    step: int
    order: str
    moved: bool | None
    segments: Rows
    unknown: list[str]


@dataclass(frozen=True)
class Document(Answer):
    """What became of one document.

    fates: its rows in the tables of dispositions, each with `table`, and `origin` if it was kept; the first is the
    release's own, others are of earlier runs. uses: by order of training. asked: tasks of reinforcement learning that
    ask what the document asks or have its id, [{phase, table, tasks, steps, answers, learnt}]. checkpoints: folders of
    those that learnt from it, models: names of exported ones.
    """

    id: str
    fates: Rows
    uses: list[Use]
    asked: Rows
    checkpoints: list[str] | None
    models: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class Match:
    """A kept document that holds a span, `count` times without overlap, in each of `tables`."""

    id: str
    source: str
    license: str
    origin: str
    split: str
    content_hash: str
    count: int
    tables: list[str] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)


@dataclass(frozen=True)
class Text(Answer):
    """The kept documents that hold a span. by: `index`, or `scan` if every text was read."""

    span: str
    by: str
    matches: list[Match]
    unknown: list[str]


@dataclass(frozen=True)
class Related:
    """A document that stands for the asked one, that the asked one stands for, or that has the same text."""

    relation: str
    document: Document


@dataclass(frozen=True)
class Removal(Answer):
    """What a request to remove a document reaches: of the document itself and of related ones; files:
    [{repository, path, by_id, by_text}], how many rows of a table (or 1, of another file) have the id or hold the
    text; token ids and weights are not searched. proofs: of `merkle.prove`, by table.
    """

    document: Document
    related: list[Related]
    files: Rows
    proofs: dict[str, Any]
    unknown: list[str]


def shown(answer: Answer) -> str:
    """Any answer in lines for people; what a terminal would obey is shown in escapes."""
    answer = cleaned(answer)
    if isinstance(answer, Step):
        return _step_text(answer)
    if isinstance(answer, Document):
        return _document_text(answer)
    if isinstance(answer, Text):
        return _matches_text(answer)
    assert isinstance(answer, Removal), "there are four kinds of answers"
    return _removal_text(answer)


def _step_text(step: Step) -> str:
    head = f"step {step.step} of {step.phase} ({step.order}): {len(step.segments)} segments{_moved_text(step.moved)}"
    lines = [head]
    for row in step.segments:
        end = row["offset"] + row["length"] - 1
        lines.append(f"  row {row['row']}.{row['segment']}  tokens {row['offset']}-{end}  {row['id']}  "
                     f"{row['license'] or 'license unknown'}  {row['origin'] or ''}".rstrip())  # fmt: skip
    return "\n".join(lines + _unknown_lines(step.unknown))


def _document_text(document: Document) -> str:
    lines = [document.id]
    for fate in document.fates:
        fate_text = f"kept ({fate['split']})" if fate["disposition"] == "kept" else f"removed by {fate['rule']}"
        if fate["value"] is not None:
            fate_text += f": {fate['value']:g}, threshold {fate['threshold']:g}"
        for name in ("duplicate_of", "match"):
            fate_text += f", {name.replace('_', ' ')} {fate[name]}" if fate[name] else ""
        lines.append(f"  {fate_text}; {fate['license']}; {fate['origin'] or fate['source']} [{fate['table']}]")
    lines += _uses_text(document.uses) or ["  no step read it"]
    for task in document.asked:
        steps = _ranges(task["steps"]) or "none"
        lines.append(f"  asked in {task['phase']}, steps {steps}: {task['answers']} answers, {task['learnt']} learnt")
    if document.checkpoints is not None:
        lines.append(f"  checkpoints that include it: {', '.join(document.checkpoints) or 'none'}")
    lines.append(f"  models that include it: {', '.join(document.models) or 'none'}")
    return "\n".join(lines + _unknown_lines(document.unknown))


def _matches_text(answer: Text) -> str:
    lines = [f"kept documents that hold {answer.span!r}, exactly: {len(answer.matches)} (by {answer.by})"]
    for match in answer.matches:
        times = "once" if match.count == 1 else f"{match.count} times"
        lines.append(f"{match.id}: {times}; {match.split}; {match.license}; {match.origin}")
        lines += _uses_text(match.uses) or ["  no step read it"]
    return "\n".join(lines + _unknown_lines(answer.unknown))


def _removal_text(removal: Removal) -> str:
    lines = ["Request to remove " + _document_text(removal.document)]
    lines += [f"{related.relation}: {_document_text(related.document)}" for related in removal.related]
    lines.append(f"files with its id or its text: {len(removal.files)}")
    lines += [
        f"  {row['repository'] or ''} {row['path']}: {row['by_id']} by id, {row['by_text']} by text"
        for row in removal.files
    ]
    for proof in removal.proofs.values():
        lines.append(
            f"proof: row {proof['index']} of {proof['size']} in {proof['table']}, under the root {proof['root']}"
        )
    return "\n".join(lines + _unknown_lines(removal.unknown))


def _uses_text(uses: Sequence[Use]) -> list[str]:
    steps_of_use: dict[tuple[str, str, bool | None], list[int]] = {}
    for use in uses:
        steps_of_use.setdefault((use.phase, use.order, use.moved), []).append(use.step)
    return [
        f"  read in {phase}, steps {_ranges(steps)} ({order}){_moved_text(moved)}"
        for (phase, order, moved), steps in steps_of_use.items()
    ]


def _moved_text(moved: bool | None) -> str:
    return ", which moved no weight" if moved is False else ""


def _unknown_lines(unknown: Sequence[str]) -> list[str]:
    return [f"  not known here: {text}" for text in unknown]


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
