"""The result of `atom verify`: checks, each with its problems, and the verdict on all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.core.errors import CheckFailed
from pipeline.core.text import printable

SCHEMA = 1
NAMED = 1000
"""The maximum number of faults that one check names."""
Problems = list[str]
_KEY = "only the maker's key can tell (--key)"
OPEN = {
    "release": "whether its maker made it, or somebody who wrote weights, logs, statements and code anew, " + _KEY,
    "evidence": "whether its maker wrote the statements, the code and the page, " + _KEY,
    "dataset": "whether these are the documents, orders and answers of its maker, " + _KEY,
    "model": "whether these are the weights, figures and words of its maker, " + _KEY,
    "variant": "whether these are the weights, figures and words of its maker, " + _KEY,
    "checkpoint": "whether these are the weights of its maker, " + _KEY,
    "repository": "whether these are the words of its maker, " + _KEY,
}
"""The question about a folder that only a signature by a known key answers, by the kind of the folder."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Names and contents of files are untrusted: every text is one line that is safe to print.

    Attributes:
        name: Name of the check.
        ok: Whether it holds; null if it could not run or found nothing to compare.
        detail: One sentence on the result.
        wrong: Every file or number at fault.
        skipped: Every part that was not compared, with its reason.
    """

    name: str
    ok: bool | None
    detail: str
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", printable(self.name))
        object.__setattr__(self, "detail", printable(self.detail))
        object.__setattr__(self, "wrong", _printable_texts(self.wrong))
        object.__setattr__(self, "skipped", _printable_texts(self.skipped))


def _printable_texts(texts: list[str]) -> list[str]:
    """Makes texts printable, and replaces those beyond NAMED by their number.

    It is idempotent: its own output does not change.
    """
    remaining = len(texts) - NAMED
    return [printable(text) for text in texts[: NAMED + (remaining == 1)]] + (
        [f"and {remaining} others"] if remaining > 1 else []
    )


@dataclass
class Verdict:
    """All checks of one subject.

    Attributes:
        subject: The folder or the name that was given.
        kind: release, evidence, dataset, model, variant, checkpoint or repository.
        deep: Whether the checks of `--deep` ran.
        checks: The results, in order.
        retracted: What was taken back from it, or "".
        digest: The SHA-256 of its SHA256SUMS, which stands for all of its bytes, or "" if that could not be read.
        signed: Whether it has signatures, which hold.
        signer_is_known: Whether the caller named the signer.
    """

    subject: str
    kind: str
    deep: bool
    checks: list[CheckResult] = field(default_factory=list)
    retracted: str = ""
    digest: str = ""
    signed: bool = False
    signer_is_known: bool = False

    def __post_init__(self) -> None:
        self.subject = printable(self.subject)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Returns the verdict as a value for JSON; new versions only add fields.

        It is {schema, subject, kind, deep, ok, retracted, digest, outcome, checks: [{name, ok, detail, wrong,
        skipped}]}.
        """
        body = {"schema": SCHEMA, "subject": self.subject, "kind": self.kind, "deep": self.deep, "ok": self.ok}
        body |= {"retracted": self.retracted, "digest": self.digest, "outcome": self.outcome()}
        return {**body, "checks": [asdict(check) for check in self.checks]}

    def in_one_sentence(self) -> str:
        """Returns a sentence to quote.

        It has the number of checks by their result, and the digest that stands for the bytes.
        """
        bad = [check.name for check in self.checks if check.ok is False]
        skipped = sum(check.ok is None for check in self.checks)
        parts = [f"{sum(check.ok is True for check in self.checks)} of {len(self.checks)} checks hold"]
        parts += [f"{skipped} skipped"] if skipped else []
        parts += [f"{len(bad)} bad ({', '.join(bad[:3])}{', …' if len(bad) > 3 else ''})"] if bad else []
        parts += [f"SHA256SUMS is sha256:{self.digest}"] if self.digest else []
        return ", ".join(parts)

    def outcome(self) -> str:
        """Returns the verdict in one sentence, with what it leaves open: what only the signer's key can show."""
        if not self.ok:
            return "NOT what it claims to be"
        result = f"retracted: {self.retracted}" if self.retracted else "verified"
        if self.signed and self.signer_is_known:
            return result if self.retracted else "verified, and signed by whom you named"
        state = "it is signed, but nothing here says whose key that is" if self.signed else "it is not signed"
        return f"{result}; {state}: {OPEN[self.kind]}"

    def require(self) -> None:
        """Raises CheckFailed with the first problem."""
        problems = [
            (check.name, text) for check in self.checks if check.ok is False for text in check.wrong or [check.detail]
        ]
        if problems:
            remainder = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise CheckFailed(f"{self.subject}: {problems[0][1]} [{problems[0][0]}]{remainder}")


def answer(name: str, problems: Problems, detail: str = "holds") -> CheckResult:
    """Returns a check that holds without problems; the first problem is its detail."""
    return CheckResult(name, not problems, problems[0] if problems else detail, problems)
