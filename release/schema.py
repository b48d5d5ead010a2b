"""The versions of the formats that a published folder states, and the module that reads its names.

There are two numbers: the **format** of the release, which determines the content of its files and the names in them,
and the **card schema**, which determines the tables of the cards and their lines. Both are in release.json (`format`,
`card_schema`) and at the head of each repository's card (`atom_release_format`, `atom_card_schema`). A folder without
them, such as that of a checkpoint, is checked as one of the present versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.errors import CheckFailed
from release import schema_v2, schema_v3, untrusted
from release.cards.versions import SCHEMA as CARDS
from release.layout import FORMAT, RELEASE

READERS: dict[int, ModuleType] = {1: schema_v2, 2: schema_v2, 3: schema_v3, 4: schema_v3}
"""The module with the names of each format; format 4 has those of format 3."""
CARD = "README.md"
CARD_BYTES, RELEASE_BYTES = 4_000_000, 4_000_000
"""The maximum bytes that are read of a card and of release.json."""
DEPTH = 6
"""The maximum number of folders between a file and the root of its repository or release."""
HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)
DATA_REPOSITORY = re.compile(r"^atom verify (\S+/\S+)-data$", re.MULTILINE)
"""The line of the data card that names its repository."""
LINE = re.compile(r"^atom_(release_format|card_schema): ([0-9]{1,9})\r?$", re.MULTILINE)


@dataclass(frozen=True)
class Stated:
    """The versions that a release or a repository states."""

    format: int = FORMAT
    cards: int = CARDS


@dataclass(frozen=True)
class NodeArtifact:
    """The artifact of a node that the release was built from."""

    key: str
    digest: str


@dataclass(frozen=True)
class PublishedLicenses:
    """SPDX expressions; documents keep their own licenses."""

    code: str
    data_compilation: str
    weights: str


@dataclass(frozen=True)
class ReleaseInfo:
    """The content of evidence/release.json, in today's names.

    format, card_schema: as in `Stated`. namespace: of the Hub. commit, dirty: of the checkout that built the release.
    stale: nodes whose artifacts were made by other code than that. nodes: by name, all of the recipe's graph.
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
        """The Hub's id of the final model's repository, which the ids of the others begin with."""
        return f"{self.namespace}/{self.name}"

    @property
    def tag(self) -> str:
        """The tag of the version in its repositories."""
        return f"v{self.version}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def stated_by_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ReleaseInfo` that follow from the resolved recipe. Raises KeyError if it lacks one."""
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
    """The metadata of a card with its versions."""
    return {"atom_release_format": FORMAT, "atom_card_schema": CARDS}


def metadata_of(card: str) -> str:
    """The metadata of a card, as its text has them; "" without any."""
    block = HEAD.match(card)
    return block[1] if block else ""


def of_card(folder: Path) -> Stated | None:
    """The versions that the card in a folder states; None without a card or a statement."""
    try:
        text = untrusted.read(folder / CARD, CARD_BYTES, follow=True).decode(errors="replace")
    except CheckFailed:
        return None
    numbers = {name: int(number) for name, number in LINE.findall(metadata_of(text))}
    if not numbers:
        return None
    return Stated(numbers.get("release_format", FORMAT), numbers.get("card_schema", CARDS))


def of_release(folder: Path) -> Stated | None:
    """The versions that evidence/release.json in a folder states; None if it is missing or unreadable."""
    try:
        body = untrusted.read_json(folder / RELEASE, RELEASE_BYTES, follow=True)
    except CheckFailed:
        return None
    if not isinstance(body, dict):
        return None
    numbers = body.get("format", 1), body.get("card_schema", schema_v2.CARDS)
    return Stated(*numbers) if all(type(number) is int for number in numbers) else None


def stated(path: Path) -> Stated:
    """The versions for a file or folder: those of its release if it is in one, else those of its repository."""
    places = [place for place in (path, *path.absolute().parents[:DEPTH]) if place.is_dir()]
    whole = next(filter(None, map(of_release, places)), None)
    return whole or next(filter(None, map(of_card, places)), Stated())


def unknown(folder: Path) -> str:
    """A sentence, if a release or a repository states other versions than those that this atom checks; else "".

    A folder of an earlier version would be compared with less, so whoever forges one would state that.
    """
    versions = of_release(folder) or of_card(folder) or Stated()
    return next(_unknown(versions), "")


def _unknown(stated: Stated) -> Iterator[str]:
    for what, number, present in (("format", stated.format, FORMAT), ("card schema", stated.cards, CARDS)):
        if number != present:
            which = "a later" if number > present else "an earlier"
            yield f"states {what} {number}, and this atom checks {present} alone; use {which} atom"


def reader(path: Path) -> ModuleType:
    """The module with the names in a published file. Raises CheckFailed for an unknown format."""
    number = stated(path).format
    if number not in READERS:
        raise CheckFailed(f"it {next(_unknown(Stated(number)))}")
    return READERS[number]


def read_release(folder: Path) -> ReleaseInfo:
    """evidence/release.json of a folder, in today's names.

    Raises CheckFailed if it cannot be read, KeyError if it lacks a field.
    """
    body = reader(folder).release(untrusted.read_json(folder / RELEASE, RELEASE_BYTES, follow=True))
    license = body["license"]
    return ReleaseInfo(
        format=body.get("format", 1),
        card_schema=body.get("card_schema", schema_v2.CARDS),
        name=body["name"],
        version=body["version"],
        title=body["title"],
        description=body["description"],
        namespace=body["namespace"],
        contact=body["contact"],
        languages=tuple(body["languages"]),
        license=PublishedLicenses(license["code"], license["data_compilation"], license["weights"]),
        commit=body["commit"],
        dirty=body["dirty"],
        stale=tuple(body["stale"]),
        nodes=_nodes(body),
    )


def read_nodes(folder: Path) -> dict[str, NodeArtifact]:
    """The nodes in evidence/release.json of a folder by the names of its own format, which the statements and folders
    of the release have. Raises what `read_release` raises."""
    return _nodes(untrusted.read_json(folder / RELEASE, RELEASE_BYTES, follow=True))


def _nodes(body: Mapping[str, Any]) -> dict[str, NodeArtifact]:
    return {node: NodeArtifact(artifact["key"], artifact["digest"]) for node, artifact in body["nodes"].items()}


def disagreements(folder: Path, repositories: list[str], paths: Iterable[str]) -> Iterator[str]:
    """The files of a folder that state other versions than its release.json or, without one, than its card.

    repositories: their folders, whose cards must state versions. paths: of all files.
    """
    whole = of_release(folder)
    if whole is None and (folder / RELEASE).is_file():
        yield f"{RELEASE} does not state its format as a number"
        return
    expected = whole or of_card(folder) or Stated()
    for path in paths:
        place = path.removesuffix(CARD).removesuffix(RELEASE).rstrip("/")
        if path.split("/")[-1] == CARD:
            card = of_card(folder / place)
            if card is None and whole is not None and place in repositories:
                card = Stated(whole.format)
            if card is not None and card != expected:
                yield (
                    f"{path} states format {card.format} and card schema {card.cards}, and "
                    f"{RELEASE if whole else CARD} states {expected.format} and {expected.cards}"
                )
        elif path.endswith(f"/{RELEASE}"):
            yield f"{path} states versions, which {RELEASE} alone does"


def phase(path: Path) -> str:
    """The present name of the phase in the name of a published folder or file."""
    name: str = reader(path).phase(_name(path))
    return name


def model(path: Path) -> str:
    """The present name of the exported model in the name of a published folder or file."""
    name: str = reader(path).model(_name(path))
    return name


def _name(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def fields(path: Path, file: str, value: Any) -> Any:
    """The content of a published JSON file, with the present names of its fields. file: the name of such files."""
    return reader(path).fields(file, value)


def today(path: Path, names: Iterable[str]) -> list[str]:
    """The columns of a published table, with present names."""
    present_names = reader(path).COLUMNS.get(path.name, {})
    return [present_names.get(name, name) for name in names]


def columns(path: Path, names: Iterable[str]) -> dict[str, str]:
    """{present name of a column: its name in the table}"""
    names_module = reader(path)
    return {name: names_module.column(path.name, name) for name in names}
