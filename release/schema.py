"""The versions that a published folder states, and the content of its release.json.

There are two numbers: the **format** of the release, which determines the content of its files and the names in them,
and the **card schema**, which determines the words and tables of the cards. Both are in release.json (`format`,
`card_schema`) and at the head of each repository's card (`atom_release_format`, `atom_card_schema`). A folder without a
card, such as that of a checkpoint, states none and is checked as one of the present versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from pipeline.core.errors import CheckFailed
from release import untrusted
from release.layout import RELEASE

FORMAT, CARDS = 1, 1
"""The present format and card schema. Whoever renames a field or a file, or changes what a check compares, raises
FORMAT; whoever changes a table or the words of the cards raises CARDS."""
CARD = "README.md"
CARD_BYTES, RELEASE_BYTES = 4_000_000, 4_000_000
"""The maximum bytes that are read of a card and of release.json."""
HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
"""The metadata at the head of a card."""
LINE = re.compile(r"^atom_(release_format|card_schema): ([0-9]{1,9})\r?$", re.MULTILINE)
"""A line of the metadata that states a version."""


@dataclass(frozen=True)
class Stated:
    """The versions that a release or a repository states.

    Attributes:
        format: The format of the release.
        cards: The card schema.
    """

    format: int = FORMAT
    cards: int = CARDS


@dataclass(frozen=True)
class NodeArtifact:
    """The artifact of a node that the release was built from.

    Attributes:
        key: Its key.
        digest: Its digest.
    """

    key: str
    digest: str


@dataclass(frozen=True)
class PublishedLicenses:
    """The licenses of a release, as SPDX expressions.

    Attributes:
        code: That of the code.
        data_compilation: That of the data as a whole; the documents keep their own licenses.
        weights: That of the models.
    """

    code: str
    data_compilation: str
    weights: str


@dataclass(frozen=True)
class ReleaseInfo:
    """The content of evidence/release.json.

    Attributes:
        format: The format of the release, 1.
        card_schema: The schema of its cards, 1.
        name: The name of the recipe.
        version: The version of the recipe.
        title: The title of the cards.
        description: The recipe's description; empty without one.
        namespace: The namespace on the Hub.
        contact: A URL or an address for questions and requests; null if the recipe states none.
        languages: The languages of the texts.
        license: The licenses.
        commit: The commit of the checkout that built the release; null without one.
        dirty: True if that checkout had uncommitted changes.
        stale: The nodes whose artifacts were made by other code than that checkout's.
        nodes: The artifacts of all nodes of the recipe's graph, by node.
    """

    format: int
    card_schema: int
    name: str
    version: str
    title: str
    description: str
    namespace: str
    contact: str | None
    languages: tuple[str, ...]
    license: PublishedLicenses
    commit: str | None
    dirty: bool
    stale: tuple[str, ...]
    nodes: Mapping[str, NodeArtifact]

    @property
    def repository(self) -> str:
        """The Hub's id of the final model's repository, with which the ids of the others begin."""
        return f"{self.namespace}/{self.name}"

    @property
    def tag(self) -> str:
        """The tag of the version in its repositories."""
        return f"v{self.version}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stated_by_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ReleaseInfo` that follow from the resolved recipe. Raises KeyError if it lacks one."""
    section = recipe["release"]
    return {
        "name": recipe["name"],
        "version": recipe["version"],
        "title": section["title"] or recipe["name"],
        "description": recipe.get("description", ""),
        "namespace": section["namespace"],
        "contact": section["contact"],
        "languages": tuple(section["languages"]),
        "license": PublishedLicenses(**section["license"]),
    }


def head() -> dict[str, int]:
    """Returns the fields of a card's metadata that state the versions."""
    return {"atom_release_format": FORMAT, "atom_card_schema": CARDS}


def metadata_of(card: str) -> str:
    """Returns the metadata of a card as text; "" without any."""
    block = HEAD.match(card)
    return block[1] if block else ""


def of_card(folder: Path) -> Stated | None:
    """Reads the versions that the card in a folder states; None without a card or a statement."""
    try:
        text = untrusted.read(folder / CARD, CARD_BYTES, follow=True).decode(errors="replace")
    except CheckFailed:
        return None
    numbers = {name: int(number) for name, number in LINE.findall(metadata_of(text))}
    if not numbers:
        return None
    return Stated(numbers.get("release_format", FORMAT), numbers.get("card_schema", CARDS))


def refusal(folder: Path) -> str:
    """Returns a sentence if a release or a repository states other versions than the present ones; else "".

    A folder of another version is refused, not checked in part: a forger would state that version to be checked less.
    """
    stated = of_card(folder) or Stated()
    if (folder / RELEASE).is_file():
        try:
            body = untrusted.read_json(folder / RELEASE, RELEASE_BYTES, follow=True)
        except CheckFailed:  # whoever reads it says what is wrong
            return ""
        numbers: list[Any] = []
        if isinstance(body, dict):
            numbers = [body.get("format"), body.get("card_schema")]
        # Not `isinstance`: `true` is an int for Python.
        if [type(number) for number in numbers] != [int, int]:
            return f"{RELEASE} does not state its format and card schema; get the release again"
        stated = Stated(*numbers)
    for name, number, present in (("format", stated.format, FORMAT), ("card schema", stated.cards, CARDS)):
        if number < present:
            return f"states {name} {number}, which was never published; get the release again from its maker"
        if number > present:
            return f"states {name} {number}, and this atom reads {present}; get a newer atom"
    return ""


def require_readable(folder: Path) -> None:
    """Raises CheckFailed if a release or a repository states other versions than the present ones."""
    if reason := refusal(folder):
        raise CheckFailed(f"{folder}: {reason}")


_RELEASE: TypeAdapter[ReleaseInfo] = TypeAdapter(ReleaseInfo)


def read_release(folder: Path) -> ReleaseInfo:
    """Reads evidence/release.json of a folder.

    Raises:
        CheckFailed: It cannot be read, lacks a field, or states another version.
    """
    require_readable(folder)
    body = untrusted.read_json(folder / RELEASE, RELEASE_BYTES, follow=True)
    try:
        return _RELEASE.validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CheckFailed(f"{RELEASE}: {place or 'it'}: {first['msg']}") from None
