"""The text of an answer of `atom trace`."""

from __future__ import annotations

from collections.abc import Sequence

from release.tracing.answers import Answer, Document, Removal, Step, TaskRecord, TextMatches, Use
from release.untrusted import cleaned

WIDTH = 100
"""Characters of a prompt or an answer in a text."""
USES = {
    True: "trained on",
    False: "not trained on, since the step updated nothing",
    None: "trained on, if the step updated",
}
"""The use of an answer that was not dropped, by whether the step learnt from it."""


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
        steps = f", read by the reward model in steps {ranges(pair.reward_steps)}" if pair.reward_steps else ""
        rewards = f"{pair.chosen_reward:g} over {pair.rejected_reward:g} by {pair.judge}"
        lines.append(f"    pair {pair.row} of round {pair.round}: {rewards}, {use}{steps}")
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
    """Returns sorted numbers as text, with neighbors joined: 1, 2, 3, 7 as 1-3, 7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ", ".join("-".join(map(str, part)) for part in parts)
