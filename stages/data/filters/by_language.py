"""Filter `by_language`: other steps for each language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter

from pipeline.core.bounds import Share
from pipeline.core.stage import Inputs
from stages.data.filters.base import Filter, FilterFunction, Record, Removal
from stages.data.filters.language import LANGUAGES, MEASURES, Identified, identify

MOST_STEPS = 100


def _parse(steps: Any) -> Any:
    """The steps of one language, which may be any but this one."""
    from stages.data.steps import AnyFilter

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
    def classifiers(self) -> tuple[str, ...]:
        return tuple(name for steps in self.rules.values() for step in steps for name in step.classifiers)

    def with_inputs(self, inputs: Inputs) -> Self:
        return self._with_steps(lambda step: step.with_inputs(inputs))

    @property
    def measures(self) -> dict[str, str]:
        nested = (step.measures for steps in self.rules.values() for step in steps)
        return MEASURES | {name: kind for measures in nested for name, kind in measures.items()}

    def recorded(self, record: Record) -> Self:
        return super().recorded(record)._with_steps(lambda step: step.recorded(record))

    def _with_steps(self, change: Callable[[Filter], Filter]) -> Self:
        rules = {language: tuple(map(change, steps)) for language, steps in self.rules.items()}
        return self.model_copy(update={"rules": rules})

    def function(self) -> FilterFunction:
        """A removal is named by the language, the step and its reason."""
        record = self._record
        functions = {
            language: [(step.step, step.function()) for step in steps] for language, steps in self.rules.items()
        }

        def function(text: str) -> str | Removal:
            score, language = identify(text)
            record("language", language)
            record("language_score", score)
            if language not in functions or score <= self.language_threshold:
                return text if self.others == "keep" else Removal("other", score, self.language_threshold)
            for step, apply in functions[language]:
                result = apply(text)
                if isinstance(result, Removal):
                    return Removal(f"{language}/{step}/{result.reason}", result.value, result.threshold)
                text = result
            return text

        return function


FILTER = ByLanguage
