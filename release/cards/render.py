"""Renders the cards with huggingface_hub's card classes, and checks a card's numbers against the facts.

The templates contain only words: numbers come from `card_tables` or the metadata, and both come from facts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.hub.client import load
from release import schema
from release.cards import card_tables, chat_tables, tables
from release.cards.card_tables import ReleaseFacts
from release.facts.data_facts import DataFacts
from release.facts.message_tables import FOLDER as MESSAGES
from release.facts.model_facts import ModelFacts
from release.facts.score_facts import ExampleAnswer
from release.facts.variant_facts import VariantFacts
from release.layout import MODEL, VARIANT
from release.opened_release import Release
from release.schema import CARD, ReleaseInfo
from stages.evaluation.scores import ModelScores

TEMPLATES = Path(__file__).parent
OF_DATA = ": data"
"""The end of the title of a release's data."""
WHERE_FROM = "atom, in the version that made this release; a copy that you trust already is better"
"""The remark beside the commands that install `atom`."""
HUB_LICENSES = frozenset(tables.WORDS["hub_licenses"])
"""The Hub's identifiers that equal the SPDX identifier in lower case."""
METRICS: dict[Literal["bits_per_byte", "accuracy"], tuple[str, str, str]] = {
    "bits_per_byte": ("bits_per_byte", "Bits per byte", "held-out documents"),
    "accuracy": ("exact_match", "Exact match", "held-out problems"),
}
"""{kind of score: metric of the card's metadata, its title, its data}"""


def render_all(release: Release) -> Iterator[tuple[str, str]]:
    """Yields (path in the release, text) of each card of a release, which has all files that the cards describe."""
    info = release.info
    example = None
    for name in release.models:
        facts = card_tables.release_facts(release, name)
        if name == MODEL:
            example = facts.example
        yield f"{name}/{CARD}", model_card(name, info, facts)
    for suffix, variant in release.variants.items():
        yield f"{VARIANT}{suffix}/{CARD}", variant_card(suffix, info, variant, example)
    yield f"dataset/{CARD}", data_card(info, release.data, release.canary)
    steps = tables.checkpoints(release.checkpoints)
    yield f"checkpoints/{CARD}", plain_card("checkpoints", info, info.license.weights, checkpoints=steps)
    places = [
        [place.id(info.namespace, info.name), place.kind, place.branch, f"`{place.folder or '.'}`"]
        for place in release.repositories
    ]
    repository_table = tables.table(["repository", "kind", "branch", "place in the release"], places)
    yield CARD, plain_card("evidence", info, info.license.code, repositories=repository_table)


def license_fields(spdx: str) -> dict[str, Any]:
    """Returns the Hub's license metadata for an SPDX expression: its own identifier, or `other` with name and link."""
    if spdx.lower() in HUB_LICENSES:
        return {"license": spdx.lower()}
    # The Hub refuses unknown identifiers, and shows the name of `other`.
    return {"license": "other", "license_name": spdx.lower(), "license_link": "LICENSE"}


def install_commands(release: ReleaseInfo) -> str:
    """Returns the shell commands that install `atom` from the code of a release."""
    folder = f"{release.name}-evidence"
    download = f"hf download {release.repository}-evidence --repo-type dataset --revision v{release.version}"
    download += " --include 'code/*'"
    return f"{download} --local-dir {folder}\npip install ./{folder}/code    # {WHERE_FROM}"


def code_readme(release: ReleaseInfo) -> str:
    """Returns the README of `code/` in a release, which the build of its wheel needs."""
    import jinja2

    template = jinja2.Template((TEMPLATES / "code.md.jinja").read_text("utf-8"), keep_trailing_newline=True)
    return str(template.render(release=release))


def model_index(scores: ModelScores, dataset: str) -> list[Any]:
    """Returns one EvalResult for each number of `scores.json`, at full precision."""
    hub = load()

    return [
        hub.EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=f"{name} ({measured_on})",
            dataset_config=name,
            dataset_split="heldout",
            metric_type=metric,
            metric_name=title,
            metric_value=row["value"],
            metric_args={"standard_error": row["se"]},
        )
        for kind, (metric, title, measured_on) in METRICS.items()
        for name, row in scores[kind].items()
    ]


def model_metadata(title: str, release: ReleaseInfo, model: ModelFacts) -> Any:
    """Returns the metadata of a model's card. `title` is the end of its name, which is "" for the final model."""
    dataset = data_id(release)
    base: str | None = None
    if model.base and (title == "base" or model.on_published):
        # These models were trained on a published model directly; all others on the release's base.
        base = model.base["repo"]
    elif title != "base":
        base = f"{release.repository}-base"
    # A copy is no finetune: nothing was trained.
    relation = {"base_model_relation": "finetune"} if model.on_published and not model.is_copy else {}
    return load().ModelCardData(
        model_name=f"{release.name}-{title}".rstrip("-"),
        **license_fields(model.license(release.license.weights)),
        library_name="transformers",
        pipeline_tag="text-generation",
        language=list(release.languages) or None,
        # Nothing of this release's data trained a copy of a published model.
        datasets=None if model.is_copy else [dataset],
        base_model=base,
        **relation,
        metrics=[metric for metric, _, _ in METRICS.values()],
        tags=[*(["mixture-of-experts"] if model.has_experts else []), "open-data", "reproducible"],
        eval_results=model_index(model.own_scores(), dataset),
        **schema.head(),
    )


def model_card(folder: str, release: ReleaseInfo, facts: ReleaseFacts) -> str:
    """Returns the card of a folder that holds a model. `facts` are those of the release and this model."""
    model, dataset = facts.model, data_id(release)
    title = folder.removeprefix("model").removeprefix("-")
    card_data = model_metadata(title, release, model)
    texts = _texts(card_tables.lines_by_table(card_tables.MODEL_TABLES, model))
    texts |= _texts(card_tables.lines_by_table(card_tables.RELEASE_TABLES, facts))
    text = load().ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATES / "model.md.jinja"),
        release=release,
        install=install_commands(release),
        model=model,
        title=title,
        trained_by=_listed_phases(model),
        repo=f"{release.namespace}/{card_data.model_name}",
        dataset=dataset,
        dispositions="dispositions/*/*.parquet",
        prefix=release.repository,
        t=texts,
        sections=card_tables.sections((*card_tables.MODEL_TABLES, *card_tables.RELEASE_TABLES), texts, "###"),
        folded=card_tables.folded,
        example=facts.example,
        conversation=chat_tables.conversation(facts.example),
        new_tokens=facts.new_tokens,
        gguf=next((suffix for suffix, variant in facts.variants.items() if variant.file), None),
    )
    return _normalize_text(str(text))


def variant_metadata(suffix: str, release: ReleaseInfo, facts: VariantFacts) -> Any:
    """Returns the metadata of the card of a variant. `suffix` is the end of its repository's name."""
    library = "gguf" if facts.file else "transformers"
    encoding = facts.variant.encoding.lower()
    tags = [facts.variant.writer, encoding, "open-data", "reproducible"]
    return load().ModelCardData(
        model_name=f"{release.name}{suffix}",
        **license_fields(release.license.weights),
        library_name="peft" if facts.base else library,
        pipeline_tag="text-generation",
        language=list(release.languages) or None,
        datasets=[data_id(release)],
        # The Hub knows no relation of a student to its teacher: its weights are not made of the teacher's.
        base_model=None if facts.is_student else facts.base or release.repository,
        base_model_relation=None if facts.is_student else "adapter" if facts.base else "quantized",
        tags=[tag for tag in tags if tag],
        **schema.head(),
    )


def variant_card(suffix: str, release: ReleaseInfo, facts: VariantFacts, example: ExampleAnswer | None) -> str:
    """Returns the card of a variant of the final model.

    Args:
        suffix: The end of its repository's name.
        release: The statement of its release.
        facts: The facts of the variant.
        example: An answer of the final model, whose request the card takes.
    """
    text = load().ModelCard.from_template(
        variant_metadata(suffix, release, facts),
        template_path=str(TEMPLATES / "variant.md.jinja"),
        release=release,
        install=install_commands(release),
        facts=facts,
        prefix=release.repository,
        repo=f"{release.repository}{suffix}",
        conversation=chat_tables.conversation(example),
        t=_texts(card_tables.lines_by_table(card_tables.VARIANT_TABLES, facts)),
    )
    return _normalize_text(str(text))


def data_id(release: ReleaseInfo) -> str:
    """Returns the id of the release's data repository."""
    return f"{release.repository}-data"


def data_of(card: str) -> str:
    """Returns the data repository that a model's card names."""
    data: Any = load().ModelCard(card).data
    # A copy of a published model was only measured on these data.
    return str(data.datasets[0] if data.datasets else data.eval_results[0].dataset_type)


def _listed_phases(model: ModelFacts) -> str:
    """Returns the titles of a model's phases in full, as a clause."""
    titles = [tables.title(phase, tables.WORDS["phases_in_full"]) for phase in model.training]
    if len(titles) < 2:
        return "".join(titles)
    return f"{', '.join(titles[:-1])} and {titles[-1]}"


def data_metadata(release: ReleaseInfo, data: DataFacts) -> Any:
    """Returns the metadata of the card of the data, with the files of each configuration."""
    return load().DatasetCardData(
        pretty_name=f"{release.title}{OF_DATA}",
        language=list(release.languages) or None,
        # The Hub sorts data sets by the number of their rows.
        size_categories=size_category(sum(row.kept for row in data.sources.values())),
        task_categories=["text-generation"],
        configs=[
            *(_config(name, "kept", f"kept/{name}/*.parquet") for name in data.sources),
            _config("dispositions", "all_documents", "dispositions/*/*.parquet"),
            *(_config_of_messages(name, splits) for name, splits in data.messages.items()),
        ],
        **license_fields(release.license.data_compilation),
        **schema.head(),
    )


def data_card(release: ReleaseInfo, data: DataFacts, canary: Mapping[str, str] | None = None) -> str:
    """Returns the card of the data. `canary` is the string that identifies the evaluation problems."""
    texts = _texts(card_tables.lines_by_table(card_tables.DATA_TABLES, data))
    text = load().DatasetCard.from_template(
        data_metadata(release, data),
        template_path=str(TEMPLATES / "data.md.jinja"),
        release=release,
        install=install_commands(release),
        prefix=release.repository,
        sources=list(data.sources),
        messages=list(data.messages),
        attributed=bool(data.documents.attributed),
        notices=data.documents.notices,
        measured=data.documents.measured,
        generated=any(row.generated for row in data.sources.values()),
        earlier=any(len(phase.parts) > 1 for phase in data.order.values()),
        canary=canary and canary["canary"],
        chat=bool(data.chat),
        t=texts,
        sections=card_tables.sections(card_tables.DATA_TABLES, texts, "##"),
        folded=card_tables.folded,
    )
    return _normalize_text(str(text))


def _config(name: str, split: str, path: str) -> dict[str, Any]:
    """Returns a configuration of the data set for the Hub. `path` is the pattern of its files."""
    return {"config_name": name, "data_files": [{"split": split, "path": path}]}


def _config_of_messages(source: str, splits: list[str]) -> dict[str, Any]:
    """Returns the configuration of the conversations of a source, which training libraries read."""
    files = [{"split": split, "path": f"{MESSAGES}/{source}/{split}/*.parquet"} for split in splits]
    return {"config_name": f"{source}-messages", "data_files": files}


def plain_metadata(license: str) -> Any:
    """Returns the metadata of the cards of the checkpoint and evidence repositories."""
    return load().CardData(**license_fields(license), **schema.head())


def plain_card(kind: str, release: ReleaseInfo, license: str, **table_lines: list[str]) -> str:
    """Returns the card of the checkpoint or the evidence repository. `kind` is the name of the template."""
    text = load().RepoCard.from_template(
        plain_metadata(license),
        template_path=str(TEMPLATES / f"{kind}.md.jinja"),
        release=release,
        install=install_commands(release),
        prefix=release.repository,
        t=_texts(table_lines),
    )
    return _normalize_text(str(text))


def size_category(documents: int) -> str:
    """Returns the size category by the Hub's buckets, of which each after the first has one digit more."""
    names = ["n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B"]
    names += ["10B<n<100B", "100B<n<1T", "n>1T"]
    further_digits = max(len(str(documents)) - 3, 0)
    return names[min(further_digits, len(names) - 1)]


def _texts(table_lines: dict[str, list[str]]) -> dict[str, str]:
    return {name: "\n".join(lines) for name, lines in table_lines.items()}


def _normalize_text(text: str) -> str:
    # Empty tables and conditions of the templates leave empty lines.
    return re.sub(r"\n{3,}", "\n\n", text.replace("\r\n", "\n")).strip() + "\n"
