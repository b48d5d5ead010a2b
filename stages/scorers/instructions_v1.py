"""Scorer `instructions`, version 1. Frozen: a change is a new version in a new file.

Constraints on an answer's form that a program can check: those of IFEval (arXiv 2311.07911), by its names and
arguments, so that rows of NeMo Gym's instruction_following can be used as they are.

Differences: sentences end with `.`, `!` or `?` before white space (IFEval asks a trained splitter); keywords are taken
literally (there as regular expressions); no language is detected, so `language:response_language` is left out and the
`change_case` ones look at the case alone; `startend:start_checker` is added. Each check takes time linear in the
answer, for answers are hostile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def related(found: int, relation: str, wanted: int) -> bool:
    """A range is two instructions: at least the one bound, less than the other. Raises ValueError."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")
    return found >= wanted if relation == "at least" else found < wanted


def count(pattern: str, text: str) -> int:
    return sum(1 for _ in re.finditer(pattern, text, re.MULTILINE))


def occurrences(text: str, keyword: str) -> int:
    return text.lower().count(keyword.lower())


def has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def parts(text: str, divider: str) -> list[str]:
    """Between dividers, less an empty first and last part."""
    found = [part.strip() for part in text.split(divider)]
    return found[not found[0] : len(found) - (not found[-1])]


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    found = [part for part in text.split("\n\n") if part.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= len(found):
        return False
    words = re.findall(r"[\w'-]+", found[nth_paragraph - 1][:1000])
    return bool(words) and words[0].strip("'").lower() == first_word.lower()


def is_json(text: str) -> bool:
    """All of it, once a code fence around it is taken off."""
    text = text.strip()
    for fence in ("```json", "```JSON", "```Json", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


def has_title(text: str) -> bool:
    spans = ((line, line.find("<<"), line.rfind(">>")) for line in text.splitlines())
    return any(line[start + 2 : end].strip("<> \t") for line, start, end in spans if -1 < start < end)


def two_responses(text: str) -> bool:
    found = parts(text, "******")
    return len(found) == 2 and all(found) and found[0] != found[1]


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(occurrences(text, word) for word in keywords),
    "keywords:frequency": lambda text, keyword, frequency, relation: related(
        occurrences(text, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(has_word(text, word) for word in forbidden_words),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: related(
        occurrences(text, letter), let_relation, let_frequency
    ),
    "length_constraints:number_words": lambda text, num_words, relation: related(
        count(r"\w+", text), relation, num_words
    ),
    "length_constraints:number_sentences": lambda text, num_sentences, relation: related(
        len(re.split(r"(?<=[.!?])\s+", text.strip())), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: (
        all(found := parts(text, "***")) and len(found) == num_paragraphs
    ),
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        count(r"\[[^\[\]\n]*\]", text) >= num_placeholders
    ),
    "detectable_content:postscript": lambda text, postscript_marker: postscript_marker.lower() in text.lower(),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: (
        count(r"^[ \t]*(?:\*(?!\*)|-)[ \t]*\S", text) == num_bullets
    ),
    "detectable_format:constrained_response": lambda text: any(option in text for option in CONSTRAINED),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        sum(bool(span.strip()) for span in re.findall(r"\*([^*\n]+)\*", text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: (
        count(rf"{re.escape(section_spliter)}\s?\d", text) >= num_sections
    ),
    "detectable_format:json_format": is_json,
    "detectable_format:title": has_title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.strip().lower().startswith(prompt_to_repeat.strip().lower())
    ),
    "startend:start_checker": lambda text, start_phrase: text.strip().lower().startswith(start_phrase.strip().lower()),
    "startend:end_checker": lambda text, end_phrase: (
        text.strip().strip('"').lower().endswith(end_phrase.strip().lower())
    ),
    "startend:quotation": lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"',
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: related(
        sum(word.isupper() for word in re.findall(r"\w+", text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda text: "," not in text,
}


def followed(text: str, instructions: list[str], arguments: list[dict[str, Any] | None]) -> list[bool]:
    """Whether an answer follows each instruction; an empty one follows none. Arguments that are None count as absent.

    Raises ValueError if an instruction is unknown or its arguments do not fit.
    """
    if len(instructions) != len(arguments) or not instructions:
        raise ValueError(f"{len(instructions)} instructions with {len(arguments)} sets of arguments")
    if unknown := sorted(set(instructions) - set(CHECKS)):
        raise ValueError(f"unknown instruction {unknown[0]!r}; known: {', '.join(sorted(CHECKS))}")
    found = []
    for name, given in zip(instructions, arguments, strict=True):
        wanted = {key: value for key, value in (given or {}).items() if value is not None}
        try:
            found.append(CHECKS[name](text, **wanted) and bool(text.strip()))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"instruction {name!r} with the arguments {wanted}: {error}") from error
    return found


def score(row: Mapping[str, Any], answer: str, finished: bool) -> dict[str, float]:
    """`reward` is 1 if all are followed, `fraction` the share that is. Raises ValueError for a row that cannot be
    scored."""
    if missing := [name for name in ("instruction_id_list", "kwargs") if name not in row]:
        raise ValueError(f"no field {missing[0]!r}")
    each = followed(answer, row["instruction_id_list"], row["kwargs"])
    if not finished:
        return {"reward": 0.0, "fraction": 0.0, "finished": 0.0}
    return {"reward": float(all(each)), "fraction": sum(each) / len(each), "finished": 1.0}
