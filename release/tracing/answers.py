"""The answers of `atom trace`, and their text. The names of fields are the names in its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from release.merkle import Proof
from release.untrusted import cleaned

SCHEMA = 1
WIDTH = 100
"""Characters of a prompt or an answer in a text."""
USES = {
    True: "trained on",
    False: "not trained on, since the step updated nothing",
    None: "trained on, if the step updated",
}
"""The use of an answer that was not dropped, by whether the step learnt from it."""


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    Attributes:
        KIND: Its name in JSON.
    """

    KIND: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, and `schema`, `kind`; fields are only ever added."""
        return {"schema": SCHEMA, "kind": self.KIND, **asdict(self)}


@dataclass(frozen=True)
class Place:
    """A piece of a document in a step.

    Attributes:
        row: The row of the step.
        segment: The segment of the row.
        offset: The first token in the document.
        length: Tokens.
    """

    row: int
    segment: int
    offset: int
    length: int


@dataclass(frozen=True)
class Use:
    """A step that read a document.

    Attributes:
        phase: The phase.
        step: The step.
        order: The folder of the order that lists it.
        moved: Whether the step updated the weights: a spike, an excluded batch or a step without answers does not.
            None if the log of the phase is not available.
        rows: The pieces that it read.
    """

    phase: str
    step: int
    order: str
    moved: bool | None
    rows: list[Place]


@dataclass(frozen=True)
class Segment(Place):
    """A piece of a document in a step, and the document.

    Attributes:
        source: The source.
        id: The document.
        license: Its license; None if its text is not available.
        origin: Its origin; None if its text is not available.
    """

    source: str
    id: str
    license: str | None
    origin: str | None


@dataclass(frozen=True)
class SampledAnswer:
    """An answer that a phase sampled.

    Attributes:
        step: The step.
        wave: The wave of the step.
        group: The group of answers to one task.
        sample: Its number in the group.
        task: The id of the task.
        kind: The kind of the task.
        level: The level of the task.
        text: The answer.
        finished: Whether it ended by itself.
        reward: Its reward.
        parts: The parts of the reward by name.
        verifier: The verifier that judged it.
        verifier_version: The version of that one.
        policy: The weights that sampled it.
        seed: The seed of its tokens.
        dropped: The reason why no update used it; "" if none.
        learnt: Whether an update used it; None if it was not dropped and the log of the phase is not available.
        calls: Calls of tools, in order.
    """

    step: int
    wave: int
    group: int
    sample: int
    task: str
    kind: str
    level: int
    text: str
    finished: bool
    reward: float
    parts: dict[str, float]
    verifier: str
    verifier_version: str
    policy: str
    seed: int
    dropped: str
    learnt: bool | None
    calls: list[dict[str, str]]


@dataclass(frozen=True)
class PairRecord:
    """Two answers to a question, the better first.

    Attributes:
        row: The row of the table, from 0.
        round: The step that sampled them.
        task: The id of the task.
        question: The question.
        judge: Who judged them.
        judge_version: The version of that one.
        chosen: The better answer.
        rejected: The other one.
        chosen_sample: The number of the better answer.
        rejected_sample: The number of the other one.
        chosen_reward: The reward of the better answer.
        rejected_reward: The reward of the other one.
        learnt: Whether that step trained on the pair.
    """

    row: int
    round: int
    task: str
    question: str
    judge: str
    judge_version: str
    chosen: str
    rejected: str
    chosen_sample: int
    rejected_sample: int
    chosen_reward: float
    rejected_reward: float
    learnt: bool


@dataclass(frozen=True)
class TaskRecord:
    """A task of a phase.

    Attributes:
        phase: The phase.
        table: The file of its tasks.
        id: The id.
        kind: The kind; None if the file lacks the task.
        level: The level; None if the file lacks the task.
        verifier: The verifier; None if the file lacks the task.
        messages: The prompt; None if the file lacks the task.
        answers: The answers that the question is about, of one step or of all.
        pairs: The pairs that it is about.
    """

    phase: str
    table: str
    id: str
    kind: str | None
    level: int | None
    verifier: str | None
    messages: list[dict[str, str]] | None
    answers: list[SampledAnswer]
    pairs: list[PairRecord]


@dataclass(frozen=True)
class Step(Answer):
    """One optimizer step: the segments that it read, and the tasks whose answers or pairs it sampled or read.

    Attributes:
        phase: The phase.
        step: The step.
        order: The folder of its order; None if the phase has none.
        moved: As of Use.
        segments: The segments; of a phase with tasks these are replayed rows.
        tasks: The tasks.
        unknown: Sentences on what the files do not state.
    """

    KIND = "step"
    phase: str
    step: int
    order: str | None
    moved: bool | None
    segments: list[Segment]
    tasks: list[TaskRecord]
    unknown: list[str]


@dataclass(frozen=True)
class Fate:
    """The row of a document in a table of dispositions.

    `table` is the path of the table in the data. `origin` is None if the document was removed; `value` and `threshold`
    are those of the rule that removed it. `content_hash` and `kept_hash` are the SHA-256 of its text as acquired and as
    kept.
    """

    table: str
    source: str
    license: str
    disposition: str
    split: str | None
    rule: str | None
    value: float | None
    threshold: float | None
    duplicate_of: str | None
    match: str | None
    bytes: int
    content_hash: str
    kept_hash: str | None
    origin: str | None

    @property
    def kept(self) -> bool:
        return self.disposition == "kept"


@dataclass(frozen=True)
class TaskUse:
    """Tasks of reinforcement learning that have a document's id or its question.

    Attributes:
        phase: The phase.
        table: The file of the tasks.
        tasks: Their ids.
        steps: The steps that sampled answers to them.
        answers: The number of these answers.
        learnt: The number of answers that were trained on.
    """

    phase: str
    table: str
    tasks: list[str]
    steps: list[int]
    answers: int
    learnt: int


@dataclass(frozen=True)
class Document(Answer):
    """The fate of one document, or the use of one task. Lists are in the order of training.

    Attributes:
        id: The id.
        fates: The first is of the release's own dispositions, others are of earlier runs; none of a task whose id no
            document has.
        uses: The steps that read it.
        asked: The tasks that have its id or its question.
        tasks: The tasks with this very id.
        checkpoints: Folders of the checkpoints trained on it; None if they are not available.
        models: Names of the exported models trained on it.
        unknown: Sentences on what the files do not state.
    """

    KIND = "document"
    id: str
    fates: list[Fate]
    uses: list[Use]
    asked: list[TaskUse]
    tasks: list[TaskRecord]
    checkpoints: list[str] | None
    models: list[str]
    unknown: list[str]

    @property
    def hashes(self) -> set[str]:
        """SHA-256 of its text as acquired and as kept."""
        return {hash for fate in self.fates for hash in (fate.content_hash, fate.kept_hash) if hash}


@dataclass(frozen=True)
class Match:
    """A kept document that contains a span, `count` times without overlap, in each of `tables`."""

    id: str
    source: str
    license: str
    origin: str
    split: str
    content_hash: str
    count: int
    tables: list[str]
    uses: list[Use]


@dataclass(frozen=True)
class TextMatches(Answer):
    """The kept documents that contain a span."""

    KIND = "text"
    span: str
    matches: list[Match]
    unknown: list[str]


@dataclass(frozen=True)
class Related:
    """A document that replaces the subject, that the subject replaces, or that has the same text."""

    relation: str
    document: Document


@dataclass(frozen=True)
class Mention:
    """A file that has the id or contains a text of a document.

    Attributes:
        repository: Its id on the Hub; None if only the data is available.
        path: The file.
        by_id: Rows of a table with the id, or 1 of another file.
        by_text: Rows with a text, or 1 of another file.
    """

    repository: str | None
    path: str
    by_id: int
    by_text: int


@dataclass(frozen=True)
class Removal(Answer):
    """The scope of a request to remove a document. Token ids and weights are not searched.

    Attributes:
        document: The document.
        related: Documents that stand for it, that it stands for, or that have its text.
        files: The files that mention it.
        proofs: By table.
        unknown: Sentences on what the files do not state.
    """

    KIND = "removal"
    document: Document
    related: list[Related]
    files: list[Mention]
    proofs: dict[str, Proof]
    unknown: list[str]


def text(answer: Answer) -> str:
    """Returns the text of an answer for a terminal; control characters in it are escaped."""
    answer = cleaned(answer)
    if isinstance(answer, Step):
        return _step_text(answer)
    if isinstance(answer, Document):
        return _document_text(answer)
    if isinstance(answer, TextMatches):
        return _matches_text(answer)
    assert isinstance(answer, Removal), "there are four kinds of answers"
    return _removal_text(answer)


def _step_text(step: Step) -> str:
    counts = [f"{len(step.segments)} segments"] if step.segments or not step.tasks else []
    if step.tasks:
        answers, pairs = (
            sum(map(len, lists)) for lists in zip(*((t.answers, t.pairs) for t in step.tasks), strict=True)
        )
        counts += [f"{len(step.tasks)} tasks, {answers} answers, {pairs} pairs"]
    place = step.order or step.tasks[0].table
    lines = [f"step {step.step} of {step.phase} ({place}): {', '.join(counts)}{_moved_text(step.moved)}"]
    for segment in step.segments:
        tokens = f"tokens {segment.offset}-{segment.offset + segment.length - 1}"
        about = f"{segment.id}  {segment.license or 'license unknown'}  {segment.origin or ''}"
        lines.append(f"  row {segment.row}.{segment.segment}  {tokens}  {about}".rstrip())
    lines += [line for task in step.tasks for line in _task_text(task)]
    return "\n".join(lines + _unknown_lines(step.unknown))


def _task_text(task: TaskRecord, with_steps: bool = False) -> list[str]:
    """Returns the lines of a task with its answers and pairs; with `with_steps`, those of several steps.

    Texts are cut; JSON has all of them.
    """
    prompt = " / ".join(message["content"] for message in task.messages or ()) or "its prompt is not in the tasks"
    lines = [f"  task {task.id} ({task.phase}): {_line(prompt)}"]
    for answer in task.answers:
        place = f"step {answer.step}, " if with_steps else ""
        parts = ", ".join(f"{name} {value:g}" for name, value in answer.parts.items() if name != "reward")
        use = f"dropped ({answer.dropped})" if answer.dropped else USES[answer.learnt]
        reward = f"reward {answer.reward:g}{f' ({parts})' if parts else ''}"
        lines.append(
            f"    {place}answer {answer.wave}.{answer.group}.{answer.sample}: {reward}, {use}: {_line(answer.text)}"
        )
    for pair in task.pairs:
        use = USES[True] if pair.learnt else "not trained on in its round"
        rewards = f"{pair.chosen_reward:g} over {pair.rejected_reward:g} by {pair.judge}"
        lines.append(f"    pair {pair.row} of round {pair.round}: {rewards}, {use}")
    return lines


def _line(text: str) -> str:
    """Returns a text on one line, cut to WIDTH characters."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"}"'


def _document_text(document: Document) -> str:
    lines = [document.id]
    for fate in document.fates:
        fate_text = f"kept ({fate.split})" if fate.kept else f"removed by {fate.rule}"
        if fate.value is not None and fate.threshold is not None:
            fate_text += f": {fate.value:g}, threshold {fate.threshold:g}"
        fate_text += f", duplicate of {fate.duplicate_of}" if fate.duplicate_of else ""
        fate_text += f", match {fate.match}" if fate.match else ""
        lines.append(f"  {fate_text}; {fate.license}; {fate.origin or fate.source} [{fate.table}]")
    if document.fates:
        lines += _uses_text(document.uses) or ["  not read by any step"]
    for task in document.asked:
        steps = ranges(task.steps) or "none"
        counts = f"{task.answers} answers, {task.learnt} trained on"
        lines.append(f"  a task of {task.phase}, steps {steps}: {counts}")
    lines += [line for record in document.tasks for line in _task_text(record, with_steps=True)]
    if document.checkpoints is not None:
        lines.append(f"  checkpoints that include it: {', '.join(document.checkpoints) or 'none'}")
    lines.append(f"  models that include it: {', '.join(document.models) or 'none'}")
    return "\n".join(lines + _unknown_lines(document.unknown))


def _matches_text(answer: TextMatches) -> str:
    lines = [f"kept documents that contain {answer.span!r} exactly: {len(answer.matches)}"]
    for match in answer.matches:
        times = "once" if match.count == 1 else f"{match.count} times"
        lines.append(f"{match.id}: {times}; {match.split}; {match.license}; {match.origin}")
        lines += _uses_text(match.uses) or ["  not read by any step"]
    return "\n".join(lines + _unknown_lines(answer.unknown))


def _removal_text(removal: Removal) -> str:
    lines = ["Request to remove " + _document_text(removal.document)]
    lines += [f"{related.relation}: {_document_text(related.document)}" for related in removal.related]
    lines.append(f"files with its id or its text: {len(removal.files)}")
    lines += [
        f"  {mention.repository or ''} {mention.path}: {mention.by_id} by id, {mention.by_text} by text"
        for mention in removal.files
    ]
    lines += [
        f"proof: row {proof.index} of {proof.size} in {proof.table}, under the root {proof.root}"
        for proof in removal.proofs.values()
    ]
    return "\n".join(lines + _unknown_lines(removal.unknown))


def _uses_text(uses: Sequence[Use]) -> list[str]:
    steps_of_use: dict[tuple[str, str, bool | None], list[int]] = {}
    for use in uses:
        steps_of_use.setdefault((use.phase, use.order, use.moved), []).append(use.step)
    return [
        f"  read in {phase}, steps {ranges(steps)} ({order}){_moved_text(moved)}"
        for (phase, order, moved), steps in steps_of_use.items()
    ]


def _moved_text(moved: bool | None) -> str:
    return ", without a weight update" if moved is False else ""


def _unknown_lines(unknown: Sequence[str]) -> list[str]:
    return [f"  unknown here: {sentence}" for sentence in unknown]


def ranges(numbers: Sequence[int]) -> str:
    """Returns sorted numbers as text, with neighbors joined: 1, 2, 3, 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
