"""The answers of `atom trace`. The names of fields are the names in its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from release.merkle import Proof

SCHEMA = 1


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
        reward_steps: The steps of the reward model that read it; None if there is none or its settings are not
            available.
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
    reward_steps: list[int] | None


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
    """The kept documents that contain a span. `by` is `index`, or `scan` if every text was read."""

    KIND = "text"
    span: str
    by: str
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
