"""The answers of `atom trace`. The names of fields are the names in its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from release.merkle import Proof

SCHEMA = 1


@dataclass(frozen=True)
class Answer:
    """An answer to one question. KIND: its name in JSON."""

    KIND: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        """The fields, and `schema`, `kind`; fields are only ever added."""
        return {"schema": SCHEMA, "kind": self.KIND, **asdict(self)}


@dataclass(frozen=True)
class Place:
    """A piece of a document in a step. row, segment: in the step; offset, length: in the document, in tokens."""

    row: int
    segment: int
    offset: int
    length: int


@dataclass(frozen=True)
class Use:
    """A step that read a document. order: the folder that lists it; rows: the pieces that it read.

    moved: whether the step updated the weights (a spike, an excluded batch or a step without answers does not); None if
    the log of the phase is not available.
    """

    phase: str
    step: int
    order: str
    moved: bool | None
    rows: list[Place]


@dataclass(frozen=True)
class Segment(Place):
    """A piece of a document in a step, and the document. license, origin: None if its text is not available."""

    source: str
    id: str
    license: str | None
    origin: str | None


@dataclass(frozen=True)
class SampledAnswer:
    """An answer that a phase sampled.

    wave, group, sample: its place in the step. parts: of its reward, by name. seed: of its tokens. dropped: the reason
    why no update used it, "" if none. learnt: whether an update used it, None if it was not dropped and the log of the
    phase is not available. calls: of tools, in order.
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
    """Two answers to a question, the better first. row: in its table, from 0; round: the step that sampled them.
    learnt: whether that step trained on the pair. reward_steps: the steps of the reward model that read it, None if
    there is none or its settings are not available."""

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
    """A task of a phase. table: its file. messages: the prompt; it, kind, level and verifier are None if the file lacks
    the task. answers, pairs: those that the question is about, of one step or of all."""

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
    """One optimizer step: the segments that it read, and the tasks whose answers or pairs it sampled or read. order,
    moved: as of Use; order is None if the phase has none. segments of a phase with tasks are replayed rows."""

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
    """The row of a document in a table of dispositions. table: its path in the data; origin: None if it was removed.

    value, threshold: of the rule that removed it. content_hash, kept_hash: SHA-256 of its text as acquired and as kept.
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
    """Tasks of reinforcement learning that have a document's id or its question. table: their file; tasks: their ids;
    steps: those that sampled answers to them; answers: their number; learnt: the number of answers trained on."""

    phase: str
    table: str
    tasks: list[str]
    steps: list[int]
    answers: int
    learnt: int


@dataclass(frozen=True)
class Document(Answer):
    """The fate of one document, or the use of one task.

    fates: the first is of the release's own dispositions, others are of earlier runs; empty of a task whose id no
    document has. uses: by order of training. asked: by order of training. tasks: those with this very id, by order of
    training. checkpoints: folders of those trained on it, None if they are not available. models: names of exported
    ones trained on it.
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
    """The kept documents that contain a span. by: `index`, or `scan` if every text was read."""

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
    """A file that has the id or contains a text of a document. by_id, by_text: rows of a table, or 1 of another file.
    repository: its id on the Hub, None if only the data is available."""

    repository: str | None
    path: str
    by_id: int
    by_text: int


@dataclass(frozen=True)
class Removal(Answer):
    """The scope of a request to remove a document. files: those that mention it; token ids and weights are not
    searched. proofs: by table."""

    KIND = "removal"
    document: Document
    related: list[Related]
    files: list[Mention]
    proofs: dict[str, Proof]
    unknown: list[str]
