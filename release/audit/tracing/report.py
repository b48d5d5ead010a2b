"""The text of an answer of `atom trace`."""

from __future__ import annotations

from collections.abc import Sequence

from release.audit.tracing.answers import Answer, Document, Removal, Step, TextMatches, Use
from release.untrusted import cleaned


def text(answer: Answer) -> str:
    """Any answer for a terminal; control characters in it are escaped."""
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
    head = f"step {step.step} of {step.phase} ({step.order}): {len(step.segments)} segments{_moved_text(step.moved)}"
    lines = [head]
    for segment in step.segments:
        tokens = f"tokens {segment.offset}-{segment.offset + segment.length - 1}"
        about = f"{segment.id}  {segment.license or 'license unknown'}  {segment.origin or ''}"
        lines.append(f"  row {segment.row}.{segment.segment}  {tokens}  {about}".rstrip())
    return "\n".join(lines + _unknown_lines(step.unknown))


def _document_text(document: Document) -> str:
    lines = [document.id]
    for fate in document.fates:
        fate_text = f"kept ({fate.split})" if fate.kept else f"removed by {fate.rule}"
        if fate.value is not None:
            fate_text += f": {fate.value:g}, threshold {fate.threshold:g}"
        fate_text += f", duplicate of {fate.duplicate_of}" if fate.duplicate_of else ""
        fate_text += f", match {fate.match}" if fate.match else ""
        lines.append(f"  {fate_text}; {fate.license}; {fate.origin or fate.source} [{fate.table}]")
    lines += _uses_text(document.uses) or ["  not read by any step"]
    for task in document.asked:
        steps = ranges(task.steps) or "none"
        counts = f"{task.answers} answers, {task.learnt} trained on"
        lines.append(f"  a task of {task.phase}, steps {steps}: {counts}")
    if document.checkpoints is not None:
        lines.append(f"  checkpoints that include it: {', '.join(document.checkpoints) or 'none'}")
    lines.append(f"  models that include it: {', '.join(document.models) or 'none'}")
    return "\n".join(lines + _unknown_lines(document.unknown))


def _matches_text(answer: TextMatches) -> str:
    lines = [f"kept documents that contain {answer.span!r} exactly: {len(answer.matches)} (by {answer.by})"]
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
    """1, 2, 3, 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
