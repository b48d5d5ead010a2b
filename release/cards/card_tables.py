"""All tables of the cards, one line each. A line puts its table on the card and into the comparison of `atom verify`.

A table is at `{{ t.<name> }}` of the card's template, or in a section of its own. Whoever adds or changes one after a
release was published raises `release.schema.CARDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from release.cards import baseline_tables, caveats, chat_tables, document_tables, tables
from release.facts.data_facts import DataFacts
from release.facts.model_facts import ModelFacts
from release.facts.run_facts import Changes, Costs, Intervention, Rehearsal, Trained, find_optimizers
from release.facts.score_facts import ExampleAnswer, best_example, merge_effects, read_examples
from release.facts.variant_facts import VariantFacts
from release.layout import MODEL
from release.opened_release import Release
from stages.confidence import Figure

F = TypeVar("F")


@dataclass(frozen=True)
class CardTable(Generic[F]):
    """One table of a card.

    Attributes:
        name: Its name in the template.
        lines: Gives the lines of Markdown from facts; none for an empty table.
        heading: The heading of a section of its own; without one, the template places the table.
        part: The part of the card that has this section.
    """

    name: str
    lines: Callable[[F], list[str]]
    heading: str = ""
    part: Literal["results", "use", "data", "training"] = "results"


@dataclass(frozen=True)
class ReleaseFacts:
    """The facts of the whole release for a model's card.

    Attributes:
        model: The facts of that model.
        data: The facts of the data.
        interventions: Resumptions from earlier runs.
        costs: The cost of each stage.
        variants: The model's variants by the end of their repository's name.
        merge_effects: The change of bits per byte by averaging checkpoints, by phase.
        examples: Some of its answers.
        recipe: The resolved recipe.
        changes: The changes since the version before, if it is known.
        sizes: The model after pre-training, and its smaller ones if there are any.
        optimizers: The optimizer's settings by phase that trained the model, as its last checkpoint states them.
        rehearsals: The rehearsals of the phases that trained the model.
        reward_model: What the training of the reward model measured on held-out pairs; None without one.
    """

    model: ModelFacts
    data: DataFacts
    interventions: list[Intervention]
    costs: Costs
    variants: Mapping[str, VariantFacts] = field(default_factory=dict)
    merge_effects: Mapping[str, Figure] = field(default_factory=dict)
    examples: Sequence[ExampleAnswer] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    changes: Changes | None = None
    sizes: Sequence[Trained] = ()
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rehearsals: Sequence[Rehearsal] = ()
    reward_model: Mapping[str, Any] | None = None

    @property
    def example(self) -> ExampleAnswer | None:
        """The answer that the card shows how to draw again."""
        return best_example(self.examples)

    @property
    def new_tokens(self) -> int:
        """The tokens that such an answer may have, by the recipe."""
        # Without an example the card shows a short continuation.
        if self.example is None:
            return 32
        evaluation = self.recipe["evaluation"]
        return int((evaluation["chat"] if self.example.in_conversation else evaluation)["max_new_tokens"])

    def interventions_of_model(self) -> list[Intervention]:
        """Returns the interventions in the phases that trained the model."""
        return [row for row in self.interventions if row.phase in self.model.training]


def release_facts(release: Release, folder: str) -> ReleaseFacts:
    """Returns the facts for the card of the model in a folder of a release."""
    model = release.models[folder]
    return ReleaseFacts(
        model=model,
        data=release.data,
        interventions=release.interventions,
        costs=release.costs,
        variants=release.variants if folder == MODEL else {},
        merge_effects=merge_effects(release.dataset, model.scores),
        examples=read_examples(release.dataset, model.name()),
        recipe=release.recipe,
        changes=release.changes,
        sizes=release.sizes,
        optimizers=find_optimizers(release.checkpoints, model.training),
        rehearsals=[row for row in release.rehearsals if row.phase in model.training],
        # The earlier models learned nothing from it.
        reward_model=release.reward_model if folder == MODEL else None,
    )


MODEL_TABLES: tuple[CardTable[ModelFacts], ...] = (
    # Head of the card.
    CardTable("summary", tables.summary),
    CardTable("caveats_rule", lambda model: [caveats.RULE]),
    CardTable("caveats", caveats.caveat_sentences),
    CardTable("headline", tables.headline),
    # Scores, and what computed them.
    CardTable("evaluation", lambda model: tables.evaluation(model.scores)),
    CardTable("baselines", baseline_tables.comparison),
    CardTable("engines", tables.engines),
    CardTable("text_items", lambda model: tables.text_items(model.scores), heading="Items of held-out text"),
    CardTable("prediction", tables.prediction, heading="Prediction and result"),
    # The model itself.
    CardTable("chat_format", tables.chat_format),
    # Long contexts.
    CardTable("passkeys", lambda model: tables.passkeys(model.scores)),
    CardTable("context_gain", lambda model: tables.context_gain(model.scores), heading="Gain from context"),
    # Training.
    CardTable("experts_verdict", tables.verdict),
    CardTable("start", tables.start, heading="Where training began", part="training"),
    CardTable("merges", tables.merges, heading="Averages of checkpoints", part="training"),
    CardTable("spikes", tables.spikes),
    CardTable("task_filter", tables.task_filter, heading="Tasks of reinforcement learning", part="training"),
    CardTable("termination", tables.termination, heading="How answers ended in training", part="training"),
    # Answers in conversation.
    CardTable("chat_test", lambda model: chat_tables.answers(model.chat.get("test", {}))),
    CardTable("chat_fresh", lambda model: chat_tables.answers(model.chat.get("fresh", {}))),
    CardTable(
        "sharpening",
        lambda model: chat_tables.sharpening(model.chat.get("test", {})),
        heading="Learning or sharpening",
    ),
    CardTable("preferences", lambda model: chat_tables.wins(model.chat.get("preferences", {}))),
    # Contamination.
    CardTable("contamination", lambda model: chat_tables.overlaps(model.contamination)),
    CardTable("clean_scores", lambda model: chat_tables.clean(model.contamination, tables.titles(model.scores))),
    CardTable(
        "harness",
        lambda model: tables.task_sets(model.harness),
        heading="Task sets of lm-evaluation-harness",
    ),
    CardTable("benchmark_changes", tables.benchmark_changes, heading="What each phase changed on task sets"),
)
"""Tables of model.md.jinja that a model repository alone can prove."""

DATA_TABLES: tuple[CardTable[DataFacts], ...] = (
    # What was read, and what was kept.
    CardTable("sources", tables.sources),
    CardTable("example_documents", document_tables.examples),
    CardTable("removals", tables.funnel),
    CardTable("order", tables.order),
    # Licenses and origins.
    CardTable("licenses", tables.license_evidence),
    CardTable("notice", document_tables.notice, heading="About these texts"),
    CardTable("document_licenses", document_tables.licenses, heading="Licenses of the documents"),
    CardTable("synthetic", document_tables.synthetic, heading="Synthetic text"),
    CardTable("by_reference", document_tables.by_reference, heading="Texts by reference"),
    CardTable("pipelines", document_tables.pipelines, heading="Steps of curation"),
    CardTable("classifiers", document_tables.classifiers, heading="Classifiers"),
    CardTable("languages", document_tables.languages, heading="Languages of the documents"),
    CardTable("opt_outs", document_tables.opt_outs, heading="Opt-outs"),
    CardTable("pairs", lambda data: chat_tables.pairs(data.preferences), heading="Pairs of answers"),
)
"""Tables of data.md.jinja that the dataset repository alone can prove."""


def _shares(release: ReleaseFacts) -> list[str]:
    # No phase trained a copy of a published model.
    return [] if release.model.is_copy else tables.shares(release.data, release.model.training)


def _licenses(release: ReleaseFacts) -> list[str]:
    return [] if release.model.is_copy else tables.licenses_in_short(release.data)


def _waived_gates(release: ReleaseFacts) -> list[str]:
    """Returns the gates that the recipe waives, with its reasons; none for a recipe that waives none."""
    waived = release.recipe.get("evaluation", {}).get("waived_gates", {})
    reasons = "; ".join(f"`{gate}` ({reason})" for gate, reason in sorted(waived.items()))
    return [f"The recipe waives gates that other releases must pass: {reasons}."] if waived else []


RELEASE_TABLES: tuple[CardTable[ReleaseFacts], ...] = (
    CardTable("waived_gates", _waived_gates),
    CardTable("twins", lambda release: tables.twins(release.sizes), heading="Beside a dense model"),
    # Answers that a reader can draw again.
    CardTable("examples", lambda release: chat_tables.examples(release.examples)),
    CardTable("request", lambda release: chat_tables.request(release.example)),
    CardTable("output", lambda release: chat_tables.output(release.example)),
    CardTable("reward_model", lambda release: chat_tables.reward_model(release.reward_model), heading="Reward model"),
    # Data and settings.
    CardTable("shares", _shares),
    CardTable("licenses", _licenses),
    CardTable("notice", lambda release: document_tables.notice(release.data), heading="About the training texts"),
    CardTable("changes", lambda release: tables.changes(release.changes)),
    CardTable("interventions", lambda release: tables.interventions(release.interventions_of_model())),
    CardTable(
        "merge_effects",
        lambda release: tables.merge_effects(release.merge_effects),
        heading="What averaging checkpoints changed",
        part="training",
    ),
    CardTable("cost", lambda release: tables.cost(release.costs)),
    CardTable(
        "rehearsals",
        lambda release: tables.rehearsals(release.rehearsals),
        heading="Rehearsals",
        part="training",
    ),
    CardTable(
        "optimizers",
        lambda release: tables.optimizers(release.optimizers),
        heading="Optimizers",
        part="training",
    ),
    CardTable(
        "variants",
        lambda release: tables.variants(release.variants),
        heading="Other forms of the weights",
        part="use",
    ),
)
"""Tables of model.md.jinja that only the whole release can prove."""


VARIANT_TABLES: tuple[CardTable[VariantFacts], ...] = (
    CardTable("loss", tables.variant_loss),
    CardTable("serving", tables.variant_serving),
)
"""Tables of variant.md.jinja."""


def lines_by_table(registered: Iterable[CardTable[F]], facts: F) -> dict[str, list[str]]:
    """Returns the lines of each table by its name."""
    return {table.name: table.lines(facts) for table in registered}


LONG = 15
"""Lines of a table above which a card shows it folded."""


def folded(summary: str, text: str) -> str:
    """Returns a table below its summary; a long one is shown when a reader opens it."""
    # The Hub renders `details`, and a reader without it still sees the table.
    if text.count("\n") < LONG:
        return f"{summary}\n\n{text}".lstrip()
    return f"<details>\n<summary>{summary or 'Show the table'}</summary>\n\n{text}\n\n</details>"


def sections(registered: Iterable[CardTable[Any]], texts: Mapping[str, str], mark: str) -> dict[str, str]:
    """Returns {part of the card: its nonempty tables with a section of their own}. Their headings begin with `mark`."""
    parts: dict[str, list[str]] = {}
    for table in registered:
        if table.heading and texts[table.name]:
            lines = f"{mark} {table.heading}\n\n{folded('', texts[table.name])}"
            # An empty table has no section, so that no card has a heading without content.
            parts.setdefault(table.part, []).append(lines)
    return {part: "\n\n".join(lines) for part, lines in parts.items()}
