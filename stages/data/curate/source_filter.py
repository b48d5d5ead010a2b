"""Filtering: licenses, the steps of a source, secrets, then decontamination, document by document.

Every acquired document gets a disposition: kept, or removed by one rule. See docs/formats.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from stages.data.acquire.licenses.expressions import NOT_ALLOWED, AllowedLicenses
from stages.data.acquire.readers.base import FAILED_RULE, Failures
from stages.data.curate.filters.base import Document, Filter, Removal
from stages.data.curate.secret_patterns import find_secret
from stages.formats.chat import control_tokens, prompt_chars
from stages.formats.table import DispositionRow, DocumentRow, Kind, content_hash

if TYPE_CHECKING:
    from stages.data.curate.decontamination import ContaminationIndex

# The rule that removes documents with access tokens and private keys. No recipe has to name it.
SECRETS = "secrets"


@dataclass(frozen=True, slots=True)
class Removed:
    """The rule that removed a document.

    Attributes:
        rule: The rule, as dispositions have it.
        value: The value that the rule compared, if it states one.
        threshold: The threshold that it compared with.
        match: The evaluation item that occurs in the document, or the request that names it.
    """

    rule: str
    value: float | None
    threshold: float | None
    match: str | None = None


def to_document(row: Mapping[str, Any]) -> Document:
    """Returns an acquired document as a step of the source gets it."""
    from datatrove import data

    metadata = {"source": row["source"], "license": row["license"]}
    if row["origin"].startswith(("http://", "https://")):
        metadata["url"] = row["origin"]
    document: Document = data.Document(row["text"], row["id"], metadata=metadata)
    return document


class SourceFilter:
    """The licenses and the steps of a source in order, secrets, and decontamination.

    Attributes:
        edits: Documents that each step edited, by step.
        failures: Documents on which a step raised an exception.
        measures: {name: Arrow type} of the values that the steps measure.
        measured: The measured values of the last document that passed the steps.
    """

    def __init__(
        self,
        source: str,
        kind: Kind,
        steps: Sequence[Filter],
        index: ContaminationIndex,
        license_allow: Sequence[str] = (),
    ) -> None:
        """Prepares the steps.

        Args:
            source: Name of the source.
            kind: Kind of its documents.
            steps: Its steps, with the inputs that they need.
            index: The evaluation items.
            license_allow: The licenses of documents that are kept; empty: all.
        """
        self.allowed = AllowedLicenses(license_allow) if license_allow else None
        self.source, self.kind, self.index = source, kind, index
        self.measures = {name: kind for step in steps for name, kind in step.measures.items()}
        self.measured: dict[str, str | float | None] = {}
        self.functions = [(step.name, step.function()) for step in steps]
        self.edits = Counter[str]()
        self.failures = Failures(f"source {source}", "fail in its steps; check the steps")

    def apply(self, row: DocumentRow) -> DocumentRow | Removed:
        """Returns the document as it passes, or the rule that removes it.

        Raises AtomError if a step returns neither a text nor a removal, and for an id that cannot be published. Another
        exception of a step removes the document, unless it is of the machine.
        """
        self.require_public(row["id"])
        try:
            result = self._apply_steps(row)
            return result if isinstance(result, Removed) else self._edited(row, result)
        # Errors of the machine or of the settings concern every document.
        except (AtomError, MemoryError, OSError):
            raise
        except Exception as error:
            self.failures.add(row["id"], f"{type(error).__name__}: {error}")
            return Removed(FAILED_RULE, 0.0, 0.0)

    def require_public(self, id: str) -> None:
        """Raises AtomError for an id that holds a secret: those of removed documents are published too."""
        if kind := find_secret(id):
            raise AtomError(
                f"source {self.source}: the id of a document holds {kind}, and all ids are published; leave its file "
                "out, or set another id_field"
            )

    def _apply_steps(self, row: DocumentRow) -> str | Removed:
        # The cheap rule comes first; a document that it removes takes no time in the steps.
        if self.allowed is not None and not self.allowed.allows(row["license"]):
            return Removed(NOT_ALLOWED, 0.0, 0.0)
        document, text = to_document(row), row["text"]
        for step, function in self.functions:
            result = function(document)
            if isinstance(result, Removal):
                rule = f"{step}/{result.reason}" if result.reason else step
                return Removed(rule, result.value, result.threshold)
            if not isinstance(result, str):
                raise AtomError(
                    f"source {self.source}: step {step} returned {result!r} for document {row['id']}; a filter returns "
                    "the text or a Removal"
                )
            self.edits[step] += result != text
            document.text = text = result
        self.measured = {name: document.metadata.get(name) for name in self.measures}
        # After the steps, since one of them may have removed the secret.
        if kind := find_secret(text, row["origin"]):
            return Removed(f"{SECRETS}/{kind.split(' ', 1)[1].replace(' ', '_').lower()}", 1.0, 0.0)
        match = self.index.find(text)
        if match is None:
            return text
        item, words = match
        return Removed("decontamination", words, self.index.ngram, item)

    def _edited(self, row: DocumentRow, text: str) -> DocumentRow:
        """Returns the row with the edited text.

        Raises ValueError for a conversation with other special tokens than before: `<|im_[1]end|>` is text until a step
        removes the citation in it.
        """
        document: DocumentRow = {**row, "text": text, "content_hash": content_hash(text)}
        if self.kind == "chat":
            # A step that makes a special token out of text would move the end of a turn.
            if control_tokens(text) != control_tokens(row["text"]):
                raise ValueError("a step changed the special tokens of a conversation")
            document["prompt_chars"] = prompt_chars(text)
        return document


def kept_disposition(row: DocumentRow, kept_hash: str) -> DispositionRow:
    """Returns the disposition of an acquired document that passes filtering; deduplication decides on its split.

    Raises:
        AtomError: The document has no license.
    """
    return {**_undecided(row), "disposition": "kept", "kept_hash": kept_hash}


def removed_disposition(row: DocumentRow, removed: Removed) -> DispositionRow:
    """Returns the disposition of an acquired document that a rule removed, with the same error."""
    return {
        **_undecided(row),
        "disposition": "removed",
        "rule": removed.rule,
        "value": None if removed.value is None else float(removed.value),
        "threshold": None if removed.threshold is None else float(removed.threshold),
        "match": removed.match,
    }


def _undecided(row: DocumentRow) -> DispositionRow:
    if not row["license"]:
        raise AtomError(f"document {row['id']} has no license; acquire its source with a license")
    return {
        "id": row["id"],
        "source": row["source"],
        "license": row["license"],
        "content_hash": row["content_hash"],
        "bytes": len(row["text"].encode()),
        "disposition": "",
        "split": None,
        "rule": None,
        "value": None,
        "threshold": None,
        "duplicate_of": None,
        "match": None,
        "kept_hash": None,
    }
