"""eu_summary.json and eu_summary.md: the public summary of training content of the EU's AI Act, Article 53(1)(d).

It follows the sections of the template in the Commission's Communication C(2025) 8311 of 5 December 2025; the words of
the fields are our own. Each answer has its basis: `computed` from the files of the release, `maker` (a statement in the
recipe), or `not stated`. It is no legal advice.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.core.errors import CheckFailed
from pipeline.core.text import escaped
from release import layout
from release.facts.data_facts import BATCH
from release.facts.published_tables import stream_rows
from release.layout import MODEL, WITHOUT_ORDER, numbered, over_parts
from release.standards.standard_facts import NOT_STATED, StandardFacts

Json = dict[str, Any]
TEMPLATE = "C(2025) 8311 final, 5.12.2025"
SIZES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))
"""(upper bound of tokens, range of the template)"""
MOST_DOMAINS = 1_000_000
"""Domains that are counted in memory; of more, none are listed."""
LANGUAGES = 50
NO, YES = "No", "Yes"
INTERACTIONS = {"model": "Interactions of users with the model", "services": "Interactions with other services"}
"""{interaction in `release.maker`: the question of the template that it answers}"""


def summary(facts: StandardFacts) -> Json:
    """Returns the content of eu_summary.json."""
    sections = [
        _section("1.1", "Provider", _provider(facts)),
        _section("1.2", "Model", _model(facts)),
        _section("1.3", "Modalities, size and other characteristics of the training data", _characteristics(facts)),
        _section("2.1", "Publicly available datasets", _of_category(facts, "public")),
        _section("2.2.1", "Private datasets under commercial licenses", _of_category(facts, "licensed")),
        _section("2.2.2", "Private datasets of other third parties", _of_category(facts, "third-party")),
        _section("2.3", "Data crawled and scraped from online sources", _crawled(facts)),
        _section("2.4", "User data", _user_data(facts)),
        _section("2.5", "Synthetic data", _synthetic(facts)),
        _section("2.6", "Other sources of data", _of_category(facts, "other")),
        _section("3.1", "Reservations of rights against text and data mining", _rights(facts)),
        _section("3.2", "Removal of illegal content", _illegal(facts)),
        _section("3.3", "Other information", _other(facts)),
    ]
    return {
        "template": TEMPLATE,
        "summary_of": f"{facts.release.name} {facts.release.version}",
        "version": facts.release.version,
        "last_update": facts.ended[:10],
        "sections": sections,
    }


def _section(number: str, title: str, fields: list[Json]) -> Json:
    return {"number": number, "title": title, "fields": fields}


def _computed(label: str, answer: Any) -> Json:
    """Returns a field that follows from the files of the release."""
    return {"label": label, "answer": answer, "basis": NOT_STATED if answer == NOT_STATED else "computed"}


def _stated(label: str, answer: Any) -> Json:
    """Returns a field with a statement of the maker, or without one."""
    if answer is None:
        return {"label": label, "answer": NOT_STATED, "basis": NOT_STATED}
    if isinstance(answer, bool):
        answer = YES if answer else NO
    return {"label": label, "answer": answer, "basis": "maker"}


def _provider(facts: StandardFacts) -> list[Json]:
    return [
        _stated("Name of the provider", facts.maker.provider),
        _stated("Address and contact of the provider", facts.maker.address or facts.release.contact),
        _stated("Authorized representative in the EU", facts.maker.representative),
    ]


def _model(facts: StandardFacts) -> list[Json]:
    names = [f"{facts.release.name}{folder.removeprefix('model')} {facts.release.version}" for folder in facts.models]
    # The template asks for models that this one is a modification of.
    origin = "None: the weights were initialized at random and trained in this run"
    if base := facts.models[MODEL].base:
        begin = "training" if facts.models[MODEL].on_published else "pre-training"
        origin = f"{base['repo']}, digest {base['digest']}: {begin} began with its weights and tokenizer"
    return [
        _computed("Versioned names of the models", names),
        _computed("Models that it depends on", origin),
        _stated("Date of placement on the market of the EU", facts.maker.market_date),
    ]


def _characteristics(facts: StandardFacts) -> list[Json]:
    # Held-out documents are no training data.
    trained = {name: row.tokens.get("train", 0) for name, row in facts.data.sources.items()}
    total = sum(trained.values())
    # The template asks for a range; the exact number follows it.
    size = next((text for bound, text in SIZES if total < bound), "more than 10 trillion tokens")
    languages = Counter[str]()
    for by_language in facts.data.documents.languages.values():
        for language, row in by_language.items():
            languages[language or "unknown"] += row.tokens
    ranked = sorted(languages.items(), key=lambda item: (-item[1], item[0]))[:LANGUAGES]
    measured = [{"language": name, "tokens": count} for name, count in ranked]
    return [
        _computed("Modality", "Text"),
        _computed("Size of the training data", f"{size}: {total:,} tokens of distinct documents"),
        _computed("Types of content", _kinds(facts, facts.declared)),
        _computed("Last date of acquisition", facts.acquired[:10] or NOT_STATED),
        _stated("Further training on newer data", facts.maker.continuous_training),
        _computed("Languages that the release declares", list(facts.release.languages)),
        _computed("Measured languages", measured or NOT_STATED),
        _stated("Other characteristics of the training data", facts.maker.characteristics),
    ]


def _kinds(facts: StandardFacts, names: Iterable[str]) -> list[str] | str:
    """Returns the kinds of content of sources."""
    return sorted({str(facts.declared.get(name, {}).get("kind", "")) for name in names} - {""}) or NOT_STATED


def _rows(facts: StandardFacts, names: list[str]) -> list[Json]:
    """Returns a row for each of some sources."""
    rows = []
    for name in names:
        source = facts.data.sources[name]
        rows.append(
            {
                "source": name,
                "origin": source.origin or NOT_STATED,
                "licenses": source.licenses,
                "documents": source.kept,
                "tokens": sum(source.tokens.values()),
                "basis of the category": facts.category(name)[1],
            }
        )
    return rows


def _of_category(facts: StandardFacts, category: Any) -> list[Json]:
    """Returns the fields of a section that asks about a category of sources."""
    names = facts.of_category(category)
    if not names:
        return [_computed("Used for training", f"{NO}: no source is of this category")]
    return [
        _computed("Used for training", YES),
        _computed("Modality", "Text"),
        _computed("Sources", _rows(facts, names)),
    ]


def _crawled(facts: StandardFacts) -> list[Json]:
    fields, names = _of_category(facts, "crawled"), facts.of_category("crawled")
    if not names:
        return fields
    crawler = facts.maker.crawler
    for label in ("Crawler", "Purpose", "Behavior", "Period"):
        name = "name" if label == "Crawler" else label.lower()
        fields.append(_stated(label, getattr(crawler, name) if crawler else None))
    fields.append(_computed("Types of content", _kinds(facts, names)))
    fields.append(_stated("The content and the online sources in words", crawler.content if crawler else None))
    label = "The tenth of the domains with the most text"
    if hidden := [name for name in names if name in facts.data.by_reference]:
        return [*fields, _computed(label, f"not listed: the texts of {', '.join(hidden)} are by reference")]
    return [*fields, _computed(label, _domains(facts, tuple(names)))]


@lru_cache(maxsize=1)  # two documents have it
def _domains(facts: StandardFacts, sources: tuple[str, ...]) -> list[Json] | str:
    """Returns the largest tenth of the domains with the bytes of their kept documents as read, or why it has none."""
    # No text is read: the sizes stand in the dispositions, in the order of the kept documents.
    dataset, sizes = facts.folder / "dataset", Counter[str]()
    parts = [part for part in layout.document_parts(dataset) if part.source in sources]
    for of_part in over_parts(_domains_of_part, parts, [part.dispositions for part in parts]):
        sizes.update(of_part)
        if len(sizes) > MOST_DOMAINS:
            return f"not listed: there are more than {MOST_DOMAINS:,} domains"
    ranked = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    tenth = ranked[: math.ceil(len(ranked) / 10)]
    return [{"domain": domain, "bytes": size} for domain, size in tenth] or NOT_STATED


def _domains_of_part(part: layout.Part) -> Counter[str]:
    """Returns the bytes of each domain of a part; at most one domain more than MOST_DOMAINS.

    Raises:
        CheckFailed: If the kept documents are not those that the dispositions keep.
    """
    sizes = Counter[str]()
    kept = stream_rows(part.kept, ["id", "origin"], BATCH)
    rows = stream_rows(part.dispositions, ["id", "disposition", "bytes"], BATCH)
    read = (row for row in rows if row["disposition"] == "kept")
    # Both tables have the documents in one order, so one pass over each is enough.
    for row, disposition in zip_longest(kept, read):
        if row is None or disposition is None or row["id"] != disposition["id"]:
            name = part.kept.relative_to(part.dispositions.parents[2]).as_posix()
            raise CheckFailed(f"{name} has other documents than its dispositions keep")
        try:
            domain = urlsplit(row["origin"] or "").hostname
        except ValueError:  # an origin may be any text
            continue
        if domain:
            sizes[domain] += disposition["bytes"]
            if len(sizes) > MOST_DOMAINS:
                # One domain more than allowed tells the caller that there are too many.
                break
    return sizes


def _user_data(facts: StandardFacts) -> list[Json]:
    fields, stated = _of_category(facts, "user"), facts.maker.user_interactions
    for name, label in INTERACTIONS.items():
        if facts.of_category("user"):
            fields.append(_stated(label, None if stated is None else name in stated))
        else:
            fields.append(_computed(label, NO))
    return [*fields, _stated("Statement on data of users", facts.maker.user_data)]


def _synthetic(facts: StandardFacts) -> list[Json]:
    names = facts.of_category("synthetic")
    # Phases without an order read no documents of the sources.
    sampled = [phase for phase in facts.phases if numbered(phase)[0] in WITHOUT_ORDER]
    if not names and not sampled:
        return [_computed("Used for training", f"{NO}: no source is of this category, and no phase samples answers")]
    models = sorted({str((facts.data.sources[name].generated or {}).get("generator", NOT_STATED)) for name in names})
    itself = [f"the model of this release itself, in {', '.join(sampled)}"] if sampled else []
    return [
        _computed("Used for training", YES),
        _computed("Modality", "Text"),
        _computed("Published models that wrote the data", models or "none"),
        _computed("Other models that wrote the data, those of the provider among them", itself or "none"),
        _computed("Sources", _rows(facts, names) or "none: the answers are in dataset/rl of the release"),
    ]


def _rights(facts: StandardFacts) -> list[Json]:
    opted = sum(count for row in facts.data.sources.values() for rule, count in row.removed.items() if "opt" in rule)
    return [
        _stated("Signatory of the code of practice", facts.maker.code_of_practice),
        _stated("Measures before training", facts.maker.rights_reservations),
        _computed("Documents that a rule on opt-outs removed", opted),
    ]


def _illegal(facts: StandardFacts) -> list[Json]:
    rules = Counter[str]()
    for row in facts.data.sources.values():
        rules.update(row.removed)
    rows = [{"rule": rule, "documents": count} for rule, count in sorted(rules.items())]
    removed = _computed("Documents that rules of curation removed", rows or "none")
    return [_stated("Measures", facts.maker.illegal_content), removed]


def _other(facts: StandardFacts) -> list[Json]:
    return [
        _stated("Comments", facts.maker.comments),
        _computed("Every document with its license and decision", [facts.data_url, facts.evidence_url]),
    ]


def page(facts: StandardFacts) -> str:
    """Returns the content of eu_summary.md, for readers."""
    import jinja2  # which `verify` needs for the documents alone

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters["words"] = _text
    return environment.get_template("eu_summary.md.jinja").render(summary(facts))


def _text(value: Any) -> str:
    """Returns a value as one line of Markdown, in which it is only text."""
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    text = f"{value:,}" if isinstance(value, int) else escaped(str(value))
    # What is special in Markdown or HTML would otherwise be markup from a stranger's text.
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", text)
