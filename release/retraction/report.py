"""The text of a retraction for a terminal."""

from __future__ import annotations

from release.retraction.retract import Retraction

SHOWN = 20


def text(retraction: Retraction) -> str:
    tombstone = retraction.tombstone
    would = "would be " if retraction.dry_run else ""
    documents = "document" if tombstone.count == 1 else "documents"
    lines = [f"{tombstone.count} {documents} of {tombstone.release} {would}retracted:"]
    lines += [f"  {document.id} ({document.found})" for document in tombstone.documents[:SHOWN]]
    if (others := tombstone.count - SHOWN) > 0:
        lines.append(f"  and {others} more")
    for changed in tombstone.repositories:
        lines.append(f"{changed.repository}@{changed.branch}: {len(changed.files)} files {would}changed or removed")
    kept = [name for name in tombstone.trained if name not in tombstone.removed]
    lines += [f"{name}: trained on them, {would}removed" for name in tombstone.removed]
    lines += [f"{name}: trained on them, and stays; --models takes it back" for name in kept]
    return "\n".join([*lines, *retraction.on_hub])
