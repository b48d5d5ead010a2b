"""The answers of `atom trace`.

It finds the documents and tasks of a step, the fate of a document or a task, the documents that contain a text, and the
scope of a removal request.

`documents` answers the first two with `rollout_lookup`, `searches` the others, from the files as `release_data` reads
them. `answers` has the types of the answers and their text. A downloaded data repository answers the same questions.
Fields that need the whole release are null and listed in `unknown`.
"""

from release.tracing.answers import Answer, Document, Removal, SampledAnswer, Step, TextMatches, text
from release.tracing.documents import trace_document, trace_step
from release.tracing.searches import trace_removal, trace_text

__all__ = [
    "Answer",
    "Document",
    "Removal",
    "SampledAnswer",
    "Step",
    "TextMatches",
    "text",
    "trace_document",
    "trace_removal",
    "trace_step",
    "trace_text",
]
