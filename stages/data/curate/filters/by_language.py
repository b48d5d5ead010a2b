"""Filter `by_language`: other steps for each language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter

from pipeline.core.bounds import Share
from pipeline.core.stage import Inputs
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Record, Removal
from stages.data.curate.filters.language import LANGUAGES, MEASURES, Identified, identify

MOST_STEPS = 100


def _parse(steps: Any) -> Any:
    """The steps of one language, which may be any but this one."""
    from stages.data.curate.steps import AnyFilter

    return tuple(TypeAdapter(tuple[AnyFilter, ...]).validate_python(steps))


Steps = Annotated[tuple[Any, ...], Field(max_length=MOST_STEPS), BeforeValidator(_parse)]


class ByLanguage(Filter):
    """Run the steps of the language that fastText identifies in a document."""

    step: Literal["by_language"] = Field(description="selects this step")
    rules: dict[Identified, Steps] = Field(
        min_length=1, max_length=len(LANGUAGES), description="steps by language; a language may have none"
    )
    language_threshold: Share = Field(0.65, description="score that the most probable language must exceed")
    others: Literal["remove", "keep"] = Field("remove", description="treatment of documents in other languages")

    @property
    def held(self) -> tuple[Filter, ...]:
        return tuple(step for steps in self.rules.values() for step in steps)

    @property
    def classifiers(self) -> tuple[str, ...]:
        return tuple(name for step in self.held for name in step.classifiers)

    def with_inputs(self, inputs: Inputs) -> Self:
        return self._with_steps(lambda step: step.with_inputs(inputs))

    @property
    def measures(self) -> dict[str, str]:
        return MEASURES | {name: kind for step in self.held for name, kind in step.measures.items()}

    def recorded(self, record: Record) -> Self:
        return super().recorded(record)._with_steps(lambda step: step.recorded(record))

    def changed(self, change: Callable[[Filter], Filter]) -> Filter:
        return change(self._with_steps(lambda step: step.changed(change)))

    def _with_steps(self, change: Callable[[Filter], Filter]) -> Self:
        rules = {language: tuple(map(change, steps)) for language, steps in self.rules.items()}
        return self.model_copy(update={"rules": rules})

    def function(self) -> FilterFunction:
        """A removal is named by the language, the step and its reason."""
        record = self._record
        functions = {
            language: [(step.name, step.function()) for step in steps] for language, steps in self.rules.items()
        }

        def function(document: Document) -> str | Removal:
            score, language = identify(document.text)
            document.metadata["language"] = language
            record("language", language)
            record("language_score", score)
            if language not in functions or score <= self.language_threshold:
                return document.text if self.others == "keep" else Removal("other", score, self.language_threshold)
            for name, apply in functions[language]:
                result = apply(document)
                if isinstance(result, Removal):
                    reason = "/".join(filter(None, (language, name, result.reason)))
                    return Removal(reason, result.value, result.threshold)
                document.text = result
            return document.text

        return function


FILTER = ByLanguage
