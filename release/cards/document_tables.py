"""The data card's tables about documents: licenses, lengths, languages, scores, opt-outs, filters, and examples."""

from __future__ import annotations

from typing import Any

from pipeline.core.text import escaped
from release.cards.tables import count, explained_table, table
from release.facts.data_facts import DataFacts, SourceFacts
from release.facts.document_facts import LanguageFacts, LicenseFacts

MOST_LICENSES = 30
"""Licenses with a row of their own, those of most tokens; the others share one."""
MOST_LANGUAGES = 10
"""Languages of a source with a row of their own, those of most tokens; the others share one."""
EXAMPLE_CHARACTERS = 240
"""Characters of an example document that are shown."""
OPT_OUT_KINDS = ("id", "content_hash", "url", "host", "copy", "near_duplicate", "derived")
OPT_OUTS = (
    "Documents that were left out because somebody asked for it, by the SHA-256 of the reference of each request; a "
    "document of several requests counts for each. Copies, near duplicates and rewrites of a document are those of its "
    "request. The receipt of a request is in the evidence repository."
)
BASES = {
    "": "declared by the source",
    "field": "in a field of the document",
    "file": "in a file of its package",
    "page": "on its page",
    "parent": "of the document that it was made from",
    "notice": "in a notice in its text",
    "none": "none was found",
}
"""{basis of a license: where it was found}"""


def licenses(data: DataFacts) -> list[str]:
    """Returns documents and tokens after curation by license, and how the license was found."""
    rows = list(data.documents.licenses.items())
    total = sum(row.tokens for _, row in rows)
    shown, others = rows[:MOST_LICENSES], [row for _, row in rows[MOST_LICENSES:]]
    if others:
        # The rows are sorted by tokens, so the smallest share one row.
        rest = LicenseFacts(sum(row.documents for row in others), sum(row.tokens for row in others))
        for row in others:
            rest.bases.update(row.bases)
        shown.append((f"{count(len(others))} other expressions", rest))
    body = [
        [escaped(name), count(row.documents), count(row.tokens), _share(row.tokens, total), _bases(row)]
        for name, row in shown
    ]
    return table(["license of the document", "documents", "tokens", "share of tokens", "found"], body)


def _share(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else ""


def _bases(row: LicenseFacts) -> str:
    """Returns the ways in which the license was found; of several, each with its number of acquired documents."""
    ways = [(BASES.get(basis, escaped(basis)), number) for basis, number in sorted(row.bases.items())]
    return "; ".join(way if len(ways) == 1 else f"{way}: {count(number)}" for way, number in ways)


def by_reference(data: DataFacts) -> list[str]:
    """Returns the sources whose texts are not published, and where they come from; none without such sources."""
    body = [[name, count(data.sources[name].kept), origin] for name, origin in data.by_reference.items()]
    sentence = (
        "The license or the size of these sources does not allow to publish their texts. `kept/` has the id, the "
        "origin and the SHA-256 of each; `atom rebuild-data` reads the files of `references.json` again, and compares "
        "every text with its hash."
    )
    lines = explained_table(sentence, ["source", "documents", "origin"], body)
    if lines and data.published_reasons:
        sentence = "A model wrote further texts from them. The maker says why these are published:"
        reasons = [[name, escaped(reason)] for name, reason in data.published_reasons.items()]
        lines += ["", *explained_table(sentence, ["source", "reason"], reasons)]
    return lines


def synthetic(data: DataFacts) -> list[str]:
    """Returns documents and tokens that generators wrote, by generator and digest; none without such a source."""
    by_generator: dict[tuple[str, ...], list[SourceFacts]] = {}
    for row in data.sources.values():
        if row.generated is not None:
            stated = (row.generated[name] for name in ("generator", "digest", "generator_license", "generator_terms"))
            # Sources of one generator with equal files and terms are one item.
            by_generator.setdefault(tuple(map(str, stated)), []).append(row)
    total = sum(sum(row.tokens.values()) for row in data.sources.values())
    items = []
    for (generator, digest, license, terms), rows in sorted(by_generator.items()):
        tokens = sum(sum(row.tokens.values()) for row in rows)
        parents = sorted({str(row.generated["from_source"]) for row in rows if row.generated})
        share = f" ({tokens / total:.1%} of all)" if total else ""
        items.append(
            f"- **{escaped(generator)}**: {count(sum(row.kept for row in rows))} documents, {count(tokens)} tokens"
            f"{share}, made from {escaped(', '.join(parents))}. Its license: {escaped(license)}. "
            f"Its terms for outputs: {escaped(terms)}. Digest of its files: `{escaped(digest)}`."
        )
    if not items:
        return []
    sentence = (
        "Language models wrote these texts from documents of other sources. `generated/` has for each the document, "
        "the generator, the prompt, the settings of the sampler and the seed, and `dispositions/` names the generator."
    )
    return [sentence, "", *items]


def notice(data: DataFacts) -> list[str]:
    """Returns the paragraph of the data recipe on its corpus, such as on licenses; none without one."""
    return [escaped(" ".join(text.split()))] if (text := data.curation.get("notice")) else []


def pipelines(data: DataFacts) -> list[str]:
    """Returns the steps of each pipeline with their settings, and its sources; none without pipelines."""
    sources_of_steps: dict[tuple[str, str], list[str]] = {}
    for source, row in data.curation.get("sources", {}).items():
        steps = ", then ".join(map(_step, row["steps"])) or "no steps"
        sources_of_steps.setdefault((row["pipeline"] or "no pipeline", steps), []).append(source)
    items = [f"- **{escaped(name)}** ({', '.join(of)}): {steps}." for (name, steps), of in sources_of_steps.items()]
    sentence = (
        "The steps that each document passed, in their order. Settings that a step does not show are the defaults of "
        "its class. Documents with access tokens or private keys were removed from every source. Toxicity was not "
        "measured."
    )
    return [sentence, "", *items] if items else []


def _step(step: dict[str, Any]) -> str:
    stated = step.get("parameters", step)
    settings = [f"{name} {value}" for name, value in stated.items() if name not in ("name", "step")]
    return f"`{_code(step['name'])}`" + (f" ({escaped(', '.join(settings))})" if settings else "")


def classifiers(data: DataFacts) -> list[str]:
    """Returns what the classifiers of the data recipe measured on held-out examples; none without classifiers."""
    body = []
    for row in data.curation.get("classifiers", {}).values():
        settings, examples = row["classifier"], row["examples"]
        names = [settings["name"], ", ".join(settings["positive"]), ", ".join(settings["negative"])]
        heldout = f"{examples['positive_heldout']:,} + {examples['negative_heldout']:,}"
        figures = [f"{value:.3f}" for value in (settings["keep"], row["threshold"], row["precision"], row["recall"])]
        body.append([escaped(cell) for cell in (*names, heldout, *figures)])
    sentence = (
        "fastText models, trained on documents of sources of this corpus. A document is kept if it scores above the "
        "threshold, as the share `keep` of the held-out negative examples does. Precision and recall are those on the "
        "held-out positive + negative examples."
    )
    head = ["classifier", "positive", "negative", "held out", "keep", "threshold", "precision", "recall"]
    return explained_table(sentence, head, body)


def languages(data: DataFacts) -> list[str]:
    """Returns documents and tokens by language, for the sources in which a step identified it."""
    body = []
    for source, by_language in data.documents.languages.items():
        total = sum(row.tokens for row in by_language.values())
        rows = [(escaped(language) or "not identified", row) for language, row in by_language.items()]
        shown, others = rows[:MOST_LANGUAGES], [row for _, row in rows[MOST_LANGUAGES:]]
        if others:
            rest = LanguageFacts(sum(row.documents for row in others), sum(row.tokens for row in others))
            # The languages are sorted by tokens, so the smallest share one row.
            shown.append((f"{count(len(others))} other languages", rest))
        for name, row in shown:
            body.append([source, name, count(row.documents), count(row.tokens), _share(row.tokens, total)])
    sentence = "The language of a document is what fastText's lid.176 took it for when it was filtered."
    if names := [name for name in data.sources if name not in data.documents.languages]:
        sentence += f" No step identified it in {', '.join(names)}."
    head = ["source", "language", "documents", "tokens", "share of the source's tokens"]
    return explained_table(sentence, head, body)


def opt_outs(data: DataFacts) -> list[str]:
    """Returns one row for each request; none for a corpus without a deny-list."""
    body = []
    for row in data.opt_outs:
        # The first kinds name the document itself; the others follow from it.
        named = sum(number for kind, number in row.removed.items() if kind not in OPT_OUT_KINDS[4:])
        # Each kind that follows from the named documents has a column.
        others = [count(row.removed[kind]) for kind in OPT_OUT_KINDS[4:]]
        body.append([f"`{escaped(row.request[:16])}`", escaped(row.date), count(named), *others])
    # A request is known by the hash of its reference, which names no person.
    head = ["request", "date", "named", "copies", "near duplicates", "rewrites"]
    return explained_table(OPT_OUTS, head, body)


def examples(data: DataFacts) -> list[str]:
    """Returns the beginning of the first document of each source that has one with a text."""
    items = []
    for source, example in data.first_documents.items():
        prompt, text = (_code(each)[:EXAMPLE_CHARACTERS] for each in (example.prompt, example.text))
        # The form of this line finds the example of a retracted document (`is_example_of`).
        line = f"- `{_code(example.id)}` of {source}: "
        items.append(line + (f"no loss on `{prompt}`, loss on `{text}`" if prompt else f"`{text}`"))
    rule = (
        "The first training document of each source, in the order of its table and cut off at "
        f"{count(EXAMPLE_CHARACTERS)} characters, with line breaks as spaces; of one with a prompt, what the model "
        "reads and what it learns. Nobody chose them:"
    )
    return [rule, "", *items] if items else []


def is_example_of(line: str, id: str) -> bool:
    """Returns True if a line of a data card shows the document with this id."""
    return line.startswith(f"- `{_code(id)}` of ")


def _code(text: str) -> str:
    """Returns a text as code in one line."""
    return escaped(" ".join(text.split()).replace("`", "'"))
