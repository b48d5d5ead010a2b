"""All tables of the cards, one line each. A line puts its table on the card, into the comparison of `atom verify`, and
into the versions of the cards.

A table is at `{{ t.<name> }}` of the card's template, or in a section of its own. Each has the card schema that added
it (`added`), and that in which its lines last changed (`changed`): a published card is compared only with the tables of
its own schema. A new or changed table has the number of the next schema; see `versions.SCHEMA`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from release.assembly.changes import Changes, read_changes
from release.assembly.checkpoint_facts import Intervention
from release.assembly.costs import Costs
from release.assembly.data_facts import DataFacts
from release.assembly.example_answers import ExampleAnswer, best_example, read_examples
from release.assembly.model_facts import ModelFacts
from release.assembly.published_tables import read_json
from release.assembly.score_facts import ChatScores
from release.assembly.variant_facts import VariantFacts, read_variants
from release.cards import caveats, chat_tables, document_tables, measurement_tables, tables, training_tables
from release.layout import RECIPE

F = TypeVar("F")


@dataclass(frozen=True)
class CardTable(Generic[F]):
    """One table of a card. lines: of Markdown, from facts; none for an empty table. heading: of a section of its own,
    in the part of the card that `part` names; without one, the template places the table. until: the first card schema
    without the table, which only older cards are compared with; 0 for none."""

    name: str
    lines: Callable[[F], list[str]]
    added: int
    changed: int = 0
    heading: str = ""
    part: Literal["results", "use", "data", "training"] = "results"
    until: int = 0


@dataclass(frozen=True)
class ReleaseFacts:
    """The facts of the whole release for a model's card: of that model, of the data, of resumptions from earlier runs,
    the cost of each stage, the model's variants by the end of their repository's name, some of its answers, the
    resolved recipe, and what changed since the version before, if it is known."""

    model: ModelFacts
    data: DataFacts
    interventions: list[Intervention]
    costs: Costs
    variants: Mapping[str, VariantFacts] = field(default_factory=dict)
    examples: Sequence[ExampleAnswer] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    changes: Changes | None = None

    @property
    def example(self) -> ExampleAnswer | None:
        """The answer that the card shows how to draw again."""
        return best_example(self.examples)

    @property
    def new_tokens(self) -> int:
        """The tokens that such an answer may have, by the recipe."""
        if self.example is None:
            return 32
        evaluation = self.recipe["evaluation"]
        return int((evaluation["chat"] if self.example.in_conversation else evaluation)["max_new_tokens"])

    def interventions_of_model(self) -> list[Intervention]:
        """The interventions in the phases that trained the model."""
        return [row for row in self.interventions if row.phase in self.model.training]


def release_facts(
    release: Path, folder: str, model: ModelFacts, data: DataFacts, interventions: list[Intervention], costs: Costs
) -> ReleaseFacts:
    """The facts for the card of the model in a folder of a release; model, data, interventions, costs: as read."""
    examples = read_examples(release / "dataset", model.name())
    recipe = read_json(release / RECIPE)
    variants, changes = read_variants(release, folder), read_changes(release)
    return ReleaseFacts(model, data, interventions, costs, variants, examples, recipe, changes)


def _preferences(facts: ModelFacts | DataFacts) -> ChatScores:
    return facts.chat.get("preferences", {})


MODEL_TABLES: tuple[CardTable[ModelFacts], ...] = (
    CardTable("summary", tables.summary, added=5),
    CardTable("caveats_rule", lambda model: [caveats.RULE], added=3, changed=4),
    CardTable("caveats", caveats.caveat_sentences, added=3, changed=6),
    CardTable("headline", tables.headline, added=5),
    CardTable("evaluation", lambda model: tables.evaluation(model.scores), added=2, changed=5),
    CardTable("samples", lambda model: tables.samples(model.scores), added=2),
    CardTable(
        "engines",
        lambda model: tables.engines(model.scores, model.chat, model.memorization, model.harness),
        added=4,
    ),
    CardTable("prediction", measurement_tables.prediction, added=4, changed=5, heading="Prediction and result"),
    CardTable("architecture", tables.architecture, added=2),
    CardTable("parity", tables.parity, added=2),
    CardTable("context", tables.context, added=2, changed=6),
    CardTable("tokenizer", tables.tokenizer, added=5),
    CardTable("chat_format", tables.chat_format, added=5, changed=7),
    CardTable("passkeys", lambda model: tables.passkeys(model.scores), added=2, changed=5),
    CardTable("passkeys_by_depth", lambda model: tables.passkeys_by_depth(model.scores), added=2, changed=5),
    CardTable("retrieval", lambda model: tables.retrieval(model.scores), added=6),
    CardTable("positions", lambda model: tables.positions(model.scores), added=2, changed=5),
    CardTable("experts_by_phase", training_tables.experts_by_phase, added=2, changed=5),
    CardTable("experts", training_tables.experts, added=2, changed=6),
    CardTable("experts_verdict", training_tables.verdict, added=2, changed=5),
    CardTable("start", training_tables.start, added=4, changed=5, heading="Where training began", part="training"),
    CardTable(
        "process_rewards",
        training_tables.process_rewards,
        added=4,
        changed=5,
        heading="Verified steps",
        part="training",
    ),
    CardTable("spikes", training_tables.spikes, added=2, changed=5),
    CardTable("chat_test", lambda model: chat_tables.answers(model.chat.get("test", {})), added=2, changed=5),
    CardTable("chat_fresh", lambda model: chat_tables.answers(model.chat.get("fresh", {})), added=2, changed=5),
    CardTable("preferences", lambda model: chat_tables.wins(_preferences(model)), added=2, changed=5),
    CardTable("reward_parts", lambda model: chat_tables.reward_parts(model.chat), added=3, changed=5),
    CardTable("preference_samples", lambda model: chat_tables.samples(_preferences(model)), added=2, changed=5),
    CardTable("contamination", lambda model: chat_tables.overlaps(model.contamination), added=2, changed=4),
    CardTable(
        "clean_scores",
        lambda model: chat_tables.clean(model.contamination, tables.titles(model.scores)),
        added=2,
        changed=5,
    ),
    CardTable("detector", lambda model: chat_tables.detector(model.contamination), added=2, changed=4),
    CardTable(
        "given_away",
        lambda model: measurement_tables.memorization(model.memorization),
        added=4,
        changed=6,
        heading="Memorization",
    ),
    CardTable(
        "harness",
        lambda model: measurement_tables.task_sets(model.harness),
        added=4,
        changed=5,
        heading="Task sets of lm-evaluation-harness",
    ),
)
"""Tables of model.md.jinja that a model repository alone can prove."""

DATA_TABLES: tuple[CardTable[DataFacts], ...] = (
    CardTable("sources", tables.sources, added=2, changed=6),
    CardTable("example_documents", document_tables.examples, added=6),
    CardTable("removals", tables.funnel, added=5),
    CardTable("funnel", tables.funnel_by_source, added=2, until=5),
    CardTable("order", tables.order, added=2, changed=5),
    CardTable("packing", tables.packing, added=2, changed=6),
    CardTable("long_documents", tables.long_documents, added=2, changed=5),
    CardTable("licenses", tables.license_evidence, added=2, changed=5),
    CardTable("document_licenses", document_tables.licenses, added=4, changed=5, heading="Licenses of the documents"),
    CardTable("synthetic", document_tables.synthetic, added=4, changed=5, heading="Synthetic text"),
    CardTable("attribution", document_tables.attribution, added=4, changed=5, heading="Attribution"),
    CardTable("by_reference", document_tables.by_reference, added=4, heading="Texts by reference"),
    CardTable("lengths", document_tables.lengths, added=4, changed=5, heading="Lengths of the documents"),
    CardTable("languages", document_tables.languages, added=4, changed=5, heading="Languages of the documents"),
    CardTable(
        "quality_scores",
        document_tables.quality_scores,
        added=4,
        changed=5,
        heading="Quality scores of the documents",
    ),
    CardTable("probes", chat_tables.probes, added=6, heading="Rewards without solving"),
    CardTable("opt_outs", document_tables.opt_outs, added=4, changed=5, heading="Opt-outs"),
    CardTable(
        "filter_agreement", document_tables.filter_agreement, added=4, changed=5, heading="Agreement of the filters"
    ),
)
"""Tables of data.md.jinja that the dataset repository alone can prove."""


def _shares(release: ReleaseFacts) -> list[str]:
    """None of a copy of a published model, which no phase trained."""
    return [] if release.model.is_copy else tables.shares(release.data, release.model.training)


def _licenses(release: ReleaseFacts) -> list[str]:
    return [] if release.model.is_copy else tables.licenses_in_short(release.data)


def _waived_gates(release: ReleaseFacts) -> list[str]:
    """The gates that the recipe waives, with its reasons. None for a recipe that waives none."""
    waived = release.recipe.get("evaluation", {}).get("waived_gates", {})
    reasons = "; ".join(f"`{gate}` ({reason})" for gate, reason in sorted(waived.items()))
    return [f"The recipe waives gates that other releases must pass: {reasons}."] if waived else []


RELEASE_TABLES: tuple[CardTable[ReleaseFacts], ...] = (
    CardTable("waived_gates", _waived_gates, added=6),
    CardTable("funnel", lambda release: tables.funnel_by_source(release.data), added=2, until=5),
    CardTable("examples", lambda release: chat_tables.examples(release.examples), added=5),
    CardTable("request", lambda release: chat_tables.request(release.example), added=7),
    CardTable("output", lambda release: chat_tables.output(release.example), added=7),
    CardTable("shares", _shares, added=5),
    CardTable("licenses", _licenses, added=5),
    CardTable("changes", lambda release: tables.changes(release.changes), added=5),
    CardTable("settings", lambda release: training_tables.settings(release.recipe, release.model), added=5, changed=6),
    CardTable(
        "conversations", lambda release: tables.conversations(release.data, release.model.training), added=4, changed=5
    ),
    CardTable(
        "interventions", lambda release: tables.interventions(release.interventions_of_model()), added=2, changed=5
    ),
    CardTable("cost", lambda release: tables.cost(release.costs), added=2, changed=5),
    CardTable(
        "variants",
        lambda release: measurement_tables.variants(release.variants),
        added=4,
        changed=5,
        heading="Other forms of the weights",
        part="use",
    ),
    CardTable(
        "data_of_regressions",
        lambda release: caveats.data_of_regressions(release.model.scores, release.data.order),
        added=5,
    ),
)
"""Tables of model.md.jinja that only the whole release can prove."""


VARIANT_TABLES: tuple[CardTable[VariantFacts], ...] = (
    CardTable("loss", measurement_tables.variant_loss, added=4, changed=5),
    CardTable("serving", measurement_tables.variant_serving, added=4),
)
"""Tables of variant.md.jinja."""


def lines_by_table(registered: Iterable[CardTable[F]], facts: F) -> dict[str, list[str]]:
    """The lines of the tables that a card of the present schema has."""
    return {table.name: table.lines(facts) for table in registered if not table.until}


LONG = 15
"""Lines of a table above which a card shows it folded."""


def folded(summary: str, text: str) -> str:
    """A table below its summary; a long one is shown when a reader opens it."""
    if text.count("\n") < LONG:
        return f"{summary}\n\n{text}".lstrip()
    return f"<details>\n<summary>{summary or 'Show the table'}</summary>\n\n{text}\n\n</details>"


def sections(registered: Iterable[CardTable[Any]], texts: Mapping[str, str], mark: str) -> dict[str, str]:
    """{part of the card: its nonempty tables with a section of their own}; mark: of their headings"""
    parts: dict[str, list[str]] = {}
    for table in registered:
        if table.heading and not table.until and texts[table.name]:
            lines = f"{mark} {table.heading}\n\n{folded('', texts[table.name])}"
            parts.setdefault(table.part, []).append(lines)
    return {part: "\n\n".join(lines) for part, lines in parts.items()}
