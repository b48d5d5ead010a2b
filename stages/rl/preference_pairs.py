"""Stage `preferences`: pairs of answers that others ordered, read from files and sealed for `reward_model` and `dpo`.

    atom run RECIPE --until preferences

A source says who ordered its pairs: humans, a model (AI) or rules. Each pair has a license, which its row or its source
states. Left out are ties, pairs that are ordered too weakly or under a license that the source does not allow, texts
that name a special token or hold a secret, and pairs that share words with an evaluation item, in any of their texts.
`summary.json` counts each reason. A hash of the prompt decides which pairs are held out, so that no prompt is in both
parts.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

from pydantic import Field, model_validator

from pipeline.core.bounds import License, Line, LongLine, Range, Seed, Sha256, SourceName, Text
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage, added, operational
from pipeline.core.store import Artifact, sha256_file
from stages.data.acquire.hub_files import Commit
from stages.data.acquire.licenses.expressions import NOT_ALLOWED, AllowedLicenses, Licenses, MapName
from stages.data.acquire.readers.base import is_unicode
from stages.data.acquire.readers.hub import HOME, Hub, Repo
from stages.data.acquire.readers.row_files import Column, Jsonl, LicenseStrings, RowReader, Values, field_at
from stages.data.acquire.readers.row_files import Row as DataRow
from stages.data.curate.secret_patterns import find_secret
from stages.data.curate.settings import Ngram
from stages.formats import chat
from stages.formats.seeds import seed_of
from stages.formats.table import (
    Double,
    Int32,
    String,
    arrow_schema,
    columns_of,
    require_columns,
    write_json,
    write_rows,
)
from stages.rl.protocols import Count
from stages.rl.rollout.rollouts import hash_fraction
from stages.tasks.benchmarks import texts_of as item_texts
from stages.tasks.eval_set import chat_rows, texts_of

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
FILE = "preferences.parquet"
# Least share of the rows that the filters leave which are pairs; with fewer the fields are wrong.
MIN_SHARE = 0.1
# Reasons to leave a row out that the settings ask for, and by which no field is wrong.
ASKED = {"tie", "weak", NOT_ALLOWED}
# Bytes of the texts of a pair: those of HelpSteer3's train.jsonl are about 370 MB for 38,459 rows.
PAIR_BYTES = 10_000
# Fields of a pair that trees are made into, by setting.
TREE_FIELDS = {
    "prompt_field": " prompt",
    "chosen_field": " chosen",
    "rejected_field": " rejected",
    "preference_field": " gap",
}


class PreferenceRow(TypedDict):
    """A row of preferences.parquet: two answers to one prompt, the better first."""

    id: String
    """source, file and line or row"""
    source: String
    """source of the recipe"""
    preferred_by: String
    """who ordered the answers: humans, AI or rules"""
    messages: String
    """messages up to the answers, as JSON"""
    chosen: String
    """the better answer"""
    rejected: String
    """the other answer"""
    strength: Double
    """how strongly it is preferred, in the units of the source; 1 if rows do not say"""
    domain: String
    """domain of the row; empty if rows have none"""
    license: String
    """SPDX license of the row"""
    origin: String
    """where it was read"""
    chosen_tokens: Int32
    """tokens of the messages and the better answer, as a reward model reads them"""
    rejected_tokens: Int32
    """those of the messages and the other answer"""
    heldout: Annotated[bool, "bool"]
    """whether it is held out from training"""


COLUMNS = columns_of(PreferenceRow)


class PairSource(Config):
    """Rows with a prompt and two answers, of which one is preferred.

    Rows have either `chosen_field` and `rejected_field`, or the two `answer_fields` and a number in `preference_field`
    that is negative if the first answer is better, positive if the second one is, and 0 for a tie. An answer is a text
    or a list of messages whose last one is the answer.
    """

    name: SourceName
    """name of the source"""
    preferred_by: Literal["humans", "AI", "rules"]
    """who ordered the answers"""
    license: License
    """SPDX license of rows that state none"""
    license_evidence: Text
    """text or URL that shows the license"""
    license_field: Column | None = None
    """field with the license of a row; null: that of the source"""
    license_map: MapName | None = None
    """shipped map for the strings of license_field that are local to a source; null: none is"""
    license_strings: LicenseStrings = added({})
    """SPDX expressions by strings of license_field, which come before those of license_map"""
    license_allow: Licenses = ()
    """SPDX licenses of rows that are kept; empty: all"""
    where: Values = added({})
    """values by the name of a field, such as `language: [english]`; rows with another value are left out"""
    prompt_field: Column | None = None
    """field with the prompt, a text or a list of messages; null: the messages before the answer, which both lists of
    messages then share"""
    chosen_field: Column | None = None
    """field with the better answer"""
    rejected_field: Column | None = None
    """field with the other answer"""
    answer_fields: Annotated[tuple[Column, ...], Field(min_length=2, max_length=2)] | None = None
    """fields with two answers, which preference_field orders"""
    preference_field: Column | None = None
    """field with the preference, a number whose size is its strength; null: all strengths are 1"""
    min_strength: Annotated[float, Range(0, 1e6)] = 0.0
    """least strength of a pair; ties are never used"""
    domain_field: Column | None = None
    """field with the domain by which accuracy is measured; null: all rows are of one"""
    count: Count | None = None
    """maximum number of pairs, chosen by a seeded hash of the file and the row; null: all"""

    @model_validator(mode="after")
    def _fields_give_pairs(self) -> PairSource:
        given = self.chosen_field is not None, self.rejected_field is not None
        if any(given) == (self.answer_fields is not None) or given[0] != given[1]:
            raise ValueError(
                f"source {self.name}: the answers are in chosen_field and rejected_field, or in answer_fields; give "
                "one of the two"
            )
        if self.answer_fields and (self.preference_field is None or self.prompt_field is None):
            raise ValueError(
                f"source {self.name}: answer_fields need prompt_field, and preference_field, which says which of the "
                "two is better; add both"
            )
        if self.min_strength and self.preference_field is None:
            raise ValueError(
                f"source {self.name}: min_strength = {self.min_strength:g} has no effect without preference_field; "
                "leave it out, or name the field"
            )
        if self.license_field is None and (self.license_map or self.license_strings):
            raise ValueError(f"source {self.name}: license_map and license_strings need a license_field; add it")
        if (
            self.license_allow
            and self.license_field is None
            and not AllowedLicenses(self.license_allow).allows(self.license)
        ):
            raise ValueError(
                f"source {self.name}: its license {self.license} is not in license_allow, so none of its pairs may be "
                "used; leave the source out, or list the license if its terms allow training"
            )
        return self

    @property
    def columns(self) -> list[Column]:
        """The fields of a pair."""
        names = (
            self.prompt_field,
            self.chosen_field,
            self.rejected_field,
            *(self.answer_fields or ()),
            self.preference_field,
            self.domain_field,
        )
        return list(dict.fromkeys(name for name in names if name))

    @property
    def licensing(self) -> dict[str, Any]:
        """The settings of a reader of rows that decide on rows and licenses."""
        names = ("license_field", "license_map", "license_strings", "where")
        return {name: getattr(self, name) for name in names}

    @abstractmethod
    def read(self) -> Iterator[tuple[DataRow, str]]:
        """Yields the rows that `where` takes, and where each was read."""

    @abstractmethod
    def reader(self) -> RowReader:
        """Returns the reader of its files."""


class HubPairs(PairSource):
    """Pairs of a dataset on the Hub, at a commit."""

    source: Literal["hub"]
    """selects this kind of source"""
    repo: Repo
    """dataset repository"""
    revision: Commit
    """commit of the repository"""
    pattern: Line
    """pattern of the paths of files in the repository; * matches / as well"""
    format: Literal["jsonl", "parquet"]
    """reader of the files"""
    path: LongLine = operational(f"{HOME}/hub")
    """folder that keeps pulled files; it may be removed at any time"""

    def reader(self) -> Hub:
        settings = self.model_dump(include={"repo", "revision", "pattern", "format", "path"})
        return Hub(reader="hub", **settings, **self.licensing).absolute(Path())

    def read(self) -> Iterator[tuple[DataRow, str]]:
        place = f"https://huggingface.co/datasets/{self.repo}/blob/{self.revision}"
        for row in self.reader().rows_at_commit(f"preferences {self.name}", self.columns):
            yield row, f"{place}/{row.name}"


class TreePairs(HubPairs):
    """Pairs of a dataset of conversation trees on the Hub, whose messages are rows, as OpenAssistant's.

    Replies of the assistant to one message have ranks, of which the lowest is the best: each two of them are a pair, as
    strong as their ranks differ. The prompt is all messages above them. License and domain are those of the better one.
    """

    source: Literal["hub-trees"]  # type: ignore[assignment]
    """selects this kind of source"""
    id_field: Column = "message_id"
    """field with the id of a message"""
    parent_field: Column = "parent_id"
    """field with the id of the message to which it replies"""
    role_field: Column = "role"
    """field with the role, `assistant` or another word for the user's"""
    text_field: Column = "text"
    """field with the text"""
    rank_field: Column = "rank"
    """field with the rank among the replies to one message; null: not ranked"""

    @model_validator(mode="before")
    @classmethod
    def _fields_of_a_pair(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = (*TREE_FIELDS, "answer_fields")
        # A config that a stage reads again has the fields of trees.
        if given := [name for name in names if data.get(name) not in (None, TREE_FIELDS.get(name))]:
            raise ValueError(f"{given[0]} has no effect on trees, whose ranks make the pairs; leave it out")
        return {**data, **TREE_FIELDS}

    def read(self) -> Iterator[tuple[DataRow, str]]:
        names = (self.id_field, self.parent_field, self.role_field, self.text_field, self.rank_field, self.domain_field)
        rows: dict[str, DataRow] = {}
        replies: dict[str, list[str]] = {}
        for row in self.reader().rows_at_commit(f"preferences {self.name}", list(filter(None, names))):
            id = str(field_at(row.fields, self.id_field))
            rows[id] = row
            rank = field_at(row.fields, self.rank_field)
            if field_at(row.fields, self.role_field) == "assistant" and isinstance(rank, int):
                replies.setdefault(str(field_at(row.fields, self.parent_field)), []).append(id)
        place = f"https://huggingface.co/datasets/{self.repo}/blob/{self.revision}"
        for parent, ids in replies.items():
            prompt = self._conversation(rows, parent)
            ranked = sorted(ids, key=lambda id: (field_at(rows[id].fields, self.rank_field), id))
            for better, worse in combinations(ranked, 2):
                row, other = rows[better], rows[worse]
                gap = field_at(other.fields, self.rank_field) - field_at(row.fields, self.rank_field)
                texts = [field_at(each.fields, self.text_field) for each in (row, other)]
                pair = dict(zip(TREE_FIELDS.values(), (prompt, *texts, gap), strict=True))
                yield DataRow({**row.fields, **pair}, row.file, f"{row.name}/{other.name}"), f"{place}/{row.name}"

    def _conversation(self, rows: Mapping[str, DataRow], id: str) -> list[dict[str, Any]] | None:
        """Returns the messages from the root down to one; None if one of them was left out."""
        messages: list[dict[str, Any]] = []
        while len(messages) < len(rows):  # ids in a circle have no root
            row = rows.get(id)
            if row is None:
                return None
            role = "assistant" if field_at(row.fields, self.role_field) == "assistant" else "user"
            messages.append({"role": role, "content": field_at(row.fields, self.text_field)})
            above = field_at(row.fields, self.parent_field)
            if above in (None, ""):
                return messages[::-1]
            id = str(above)
        return None


class FilePairs(PairSource):
    """Pairs of a file of JSON Lines on this machine."""

    source: Literal["rows"]
    """selects this kind of source"""
    path: LongLine = operational(...)
    """path of the file; its digest, not its path, is part of the key"""
    digest: Sha256
    """SHA-256 digest of the file"""
    origin: Text
    """origin of the rows: URL or text"""

    def reader(self) -> Jsonl:
        return Jsonl(reader="jsonl", path=self.path, **self.licensing)

    def read(self) -> Iterator[tuple[DataRow, str]]:
        path = Path(self.path)
        if not path.is_file():
            raise RecipeError(f"preferences: there is no file {path}; put it there, or correct preferences.sources")
        if (digest := f"sha256:{sha256_file(path)}") != self.digest:
            raise RecipeError(
                f"preferences: {path} has the digest {digest}, not {self.digest}; restore it, or change digest"
            )
        reader = self.reader()
        for row in reader.rows([("rows", path)], self.columns):
            if isinstance(row, DataRow) and reader.reads(row):
                yield row, self.origin


Source = Annotated[HubPairs | TreePairs | FilePairs, Field(discriminator="source")]


class PreferenceSection(Config):
    """Pairs of answers that others ordered, for `reward_model` and `dpo`."""

    sources: Annotated[tuple[Source, ...], Field(min_length=1, max_length=100)]
    """sources of the pairs"""
    heldout_fraction: Annotated[float, Range(0, 1, above=True, below=True)] = 0.05
    """share of prompts, by hash, whose pairs are held out from training"""

    @model_validator(mode="after")
    def _distinct(self) -> PreferenceSection:
        names = [source.name for source in self.sources]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"preferences: two sources have the name {duplicates[0]}; rename one")
        return self


class PreferencesConfig(PreferenceSection):
    """The sources of pairs, and the recipe's seed."""

    seed: Seed
    """seed of the recipe"""
    ngram: Ngram | None = added(None)
    """number of words that no text may share with an item of a task set; null: there are no task sets"""


class _Left(Exception):
    """A row is left out, for the reason that it names."""


def run(config: PreferencesConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `preferences.parquet`, and `summary.json`: the pairs of each source, and why rows were left out.

    The inputs are `tokenizer`, `items`, and `benchmarks` if there are task sets.

    Raises:
        RecipeError: A file is missing or another one.
        AtomError: Hardly any row of a source is a pair.
    """
    from stages.rl.rollout.generation import Chat

    reads = _Screen(config, inputs, Chat(inputs["tokenizer"]))
    sources = {source.name: SourcePairs(source, reads, config) for source in config.sources}
    write_rows(out / FILE, COLUMNS, (row for source in sources.values() for row in source.rows()))
    facts = {name: source.facts() for name, source in sources.items()}
    for name, source in sources.items():
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(source.left.items())) or "none"
        report.note(f"preferences {name}: {facts[name]['pairs']} pairs; left out: {left}")
    write_json(out / "summary.json", {"sources": facts})


class _Screen:
    """What keeps evaluation items, secrets and duplicates out of the pairs.

    Args:
        config: Settings of the stage.
        inputs: Its inputs.
        template: The tokenizer, which counts the tokens of a pair.
    """

    def __init__(self, config: PreferencesConfig, inputs: Inputs, template: Any) -> None:
        from stages.data.curate.decontamination import ContaminationIndex

        self.template = template
        self.excluded = {text for _, text in texts_of(inputs["items"])}
        self.excluded |= {
            str(message["content"])
            for row in chat_rows(inputs["items"])
            for message in row["responses_create_params"]["input"]
        }
        self.index = None
        if config.ngram is not None:
            self.index = ContaminationIndex(item_texts(inputs["benchmarks"]), config.ngram)
        self._seen = set[bytes]()

    def check(self, texts: Sequence[str]) -> None:
        """Raises _Left for texts of a pair that may not be used."""
        joined = "\0".join(texts)
        if (digest := hashlib.sha256(joined.encode()).digest()) in self._seen:
            raise _Left("duplicate")
        self._seen.add(digest)
        if find_secret(joined):
            raise _Left("secret")
        if not self.excluded.isdisjoint(texts) or (self.index and any(map(self.index.find, texts))):
            raise _Left("decontamination")


class SourcePairs:
    """The pairs of a source, and what was counted of them.

    Args:
        source: The source.
        screen: What keeps texts out.
        config: Settings of the stage.
    """

    def __init__(self, source: HubPairs | FilePairs, screen: _Screen, config: PreferencesConfig) -> None:
        self.source, self.screen, self.config = source, screen, config
        self.licenses, self.allowed = source.reader().licenses, AllowedLicenses(source.license_allow)
        self.read = 0
        self.left, self.kept = Counter[str](), Counter[str]()
        self.by_license, self.by_domain = Counter[str](), Counter[str]()

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yields the rows of preferences.parquet.

        Raises AtomError if hardly any row is a pair.
        """
        salt = f"{seed_of(f'preferences/{self.source.name}', self.config.seed)}/"
        pairs: Iterator[dict[str, Any]] = self._pairs()
        if self.source.count is not None:
            hashed = ((hashlib.sha256((salt + row["id"]).encode()).digest(), row["id"], row) for row in pairs)
            # By hash, so that the same rows are drawn from any order of the files, in bounded memory.
            pairs = (row for _, _, row in heapq.nsmallest(self.source.count, hashed))
        for row in pairs:
            self.kept["heldout" if row["heldout"] else "trained"] += 1
            # A tie of lengths counts half.
            gap = len(row["chosen"]) - len(row["rejected"])
            self.kept["longer"] += 2 if gap > 0 else int(gap == 0)
            self.by_license[row["license"]] += 1
            self.by_domain[row["domain"]] += 1
            yield row
        wrong = sum(count for reason, count in self.left.items() if reason not in ASKED)
        filtered = sum(self.left.values()) - wrong
        if self.read - filtered - wrong < MIN_SHARE * (self.read - filtered) or self.read == 0:
            raise AtomError(
                f"preferences {self.source.name}: of {self.read} rows only {self.read - filtered - wrong} are pairs "
                f"(left out: {dict(sorted(self.left.items()))}); correct the fields, or where"
            )

    def facts(self) -> dict[str, Any]:
        """Returns what summary.json says of the source."""
        pairs = self.kept["heldout"] + self.kept["trained"]
        return {
            "preferred_by": self.source.preferred_by,
            "license_evidence": self.source.license_evidence,
            "rows": self.read,
            "pairs": pairs,
            "heldout": self.kept["heldout"],
            "left_out": dict(sorted(self.left.items())),
            "licenses": dict(sorted(self.by_license.items())),
            "domains": dict(sorted(self.by_domain.items())),
            "longer_is_better": self.kept["longer"] / 2 / pairs if pairs else None,
        }

    def _pairs(self) -> Iterator[dict[str, Any]]:
        for row, origin in self.source.read():
            self.read += 1
            try:
                yield self._pair(row, origin)
            except _Left as reason:
                self.left[str(reason)] += 1

    def _pair(self, row: DataRow, origin: str) -> dict[str, Any]:
        source, license = self.source, self._license(row)
        messages, chosen, rejected, strength = self._answers(row.fields)
        texts = [*(message["content"] for message in messages), chosen, rejected]
        self.screen.check(texts)
        domain = "" if source.domain_field is None else field_at(row.fields, source.domain_field)
        prompt = json.dumps(messages, ensure_ascii=False)
        # As a reward model reads them, with the token of its score.
        prompt_tokens = len(self.screen.template.encode_question(messages)) + 2
        tokens = [prompt_tokens + len(self.screen.template.encode_text(text)) for text in (chosen, rejected)]
        return {
            "id": f"{source.name}/{row.name}",
            "source": source.name,
            "preferred_by": source.preferred_by,
            "messages": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "strength": strength,
            "domain": "" if domain is None else str(domain),
            "license": license,
            "origin": origin,
            "chosen_tokens": tokens[0],
            "rejected_tokens": tokens[1],
            "heldout": hash_fraction(prompt) < self.config.heldout_fraction,
        }

    def _license(self, row: DataRow) -> str:
        """Returns the license of a row. Raises _Left if it is unknown or not allowed."""
        license: str | None = self.source.license
        if self.source.license_field is not None:
            stated = field_at(row.fields, self.source.license_field)
            license = license if stated in (None, "", []) else self.licenses.expression(stated)
        if license is None:
            raise _Left("license/unmapped")
        if self.source.license_allow and not self.allowed.allows(license):
            raise _Left(NOT_ALLOWED)
        return license

    def _answers(self, fields: Mapping[str, Any]) -> tuple[list[dict[str, str]], str, str, float]:
        """Returns messages, better answer, other answer and strength. Raises _Left for a row that is no pair."""
        source, strength = self.source, 1.0
        if source.preference_field is not None:
            stated = field_at(fields, source.preference_field)
            if isinstance(stated, bool) or not isinstance(stated, int | float) or stated != stated:
                raise _Left("without a preference")
            strength = float(stated)
        names = source.answer_fields or (source.chosen_field or "", source.rejected_field or "")
        if source.answer_fields:
            # Negative: the first answer is better; positive: the second one.
            names, strength = names if strength < 0 else names[::-1], abs(strength)
        if strength == 0:
            raise _Left("tie")
        if strength < max(source.min_strength, 0):
            raise _Left("weak")
        (asked, chosen), (asked_too, rejected) = (_answer(field_at(fields, name)) for name in names)
        prompt = asked if source.prompt_field is None else _messages(field_at(fields, source.prompt_field))
        if source.prompt_field is None and asked != asked_too:
            raise _Left("no pair")
        if chosen == rejected:
            raise _Left("tie")
        texts = [*prompt, *({"role": "assistant", "content": text} for text in (chosen, rejected))]
        try:
            chat.check(texts)
        except ValueError:
            raise _Left("special token") from None
        if not prompt or prompt[-1]["role"] != "user" or not is_unicode(json.dumps(texts, ensure_ascii=False)):
            raise _Left("no pair")
        return prompt, chosen, rejected, strength


def _messages(value: object) -> list[dict[str, str]]:
    """Returns the messages of a prompt. Raises _Left if it is none."""
    values = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(m, dict) for m in values):
        raise _Left("no pair")
    messages = [{"role": m.get("role"), "content": m.get("content")} for m in values]
    if not all(isinstance(text, str) and text.strip() for m in messages for text in m.values()):
        raise _Left("no pair")
    return messages


def _answer(value: object) -> tuple[list[dict[str, str]], str]:
    """Returns the messages before an answer, if the value is a list, and the answer. Raises _Left if it is none."""
    if isinstance(value, str) and value.strip():
        return [], value
    messages = _messages(value) if isinstance(value, list) else []
    if not messages or messages[-1]["role"] != "assistant":
        raise _Left("no pair")
    return messages[:-1], messages[-1]["content"]


def read(artifact: Artifact, heldout: bool, max_tokens: int) -> pa.Table:
    """Returns the pairs of preferences.parquet of which neither answer has more tokens, held out or not.

    Raises:
        AtomError: A column is missing, or there is no such pair.
    """
    import pyarrow.compute as pc

    from stages.formats.table import read_table

    path = artifact / FILE
    require_columns(path, arrow_schema(COLUMNS))
    table = read_table(path)
    longest = pc.max_element_wise(table["chosen_tokens"], table["rejected_tokens"])
    chosen = table.filter(pc.and_(pc.equal(table["heldout"], heldout), pc.less_equal(longest, max_tokens)))
    if not chosen.num_rows:
        kind = "held-out pair" if heldout else "pair to learn from"
        raise AtomError(
            f"{path} has no {kind} of at most {max_tokens} tokens an answer; raise max_tokens, or add pairs"
        )
    return chosen


def estimate(config: PreferencesConfig) -> Estimate:
    """Returns the resources: some seconds a thousand pairs, and a pair of some thousand characters."""
    pairs = sum(source.count or 50_000 for source in config.sources)
    # Pairs that a count chooses are held in memory until all rows are read.
    held = max(source.count or 0 for source in config.sources)
    # So are all messages of trees.
    trees = sum(isinstance(source, TreePairs) for source in config.sources)
    memory = 500_000_000 + 100 * pairs + 3 * PAIR_BYTES * held + 1_000_000_000 * trees
    return Estimate(cpu_seconds=30 + pairs / 100, memory_bytes=memory, disk_bytes=10_000_000 + PAIR_BYTES * pairs)


STAGE = Stage("preferences", VERSION, PreferencesConfig, run, estimate=estimate)
