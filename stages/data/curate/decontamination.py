"""Evaluation items in training documents: the first item that a document contains, and all runs of their words.

Words are those of `searched_words`: spacing, case and most punctuation do not count, signs of arithmetic do.
Paraphrases are not detected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stages.data.curate.words import searched_words

# The maximum words of a run; a longer match counts as one of these.
MAX_RUN_WORDS = 64


class ContaminationIndex:
    """Word n-grams of the evaluation items, by their length, to the first item that has them.

    An item of fewer than `ngram` words is one n-gram of its own length; a longer one has an n-gram for every run of
    `ngram` words.
    """

    def __init__(self, items: Iterable[tuple[str, str]], ngram: int) -> None:
        self.ngram = ngram
        self.by_length: dict[int, dict[tuple[str, ...], str]] = {}
        for item_id, text in items:
            words = searched_words(text)
            n = min(len(words), ngram)
            # An item without words matches nothing.
            for i in range(len(words) - n + 1 if n else 0):
                self.by_length.setdefault(n, {}).setdefault(tuple(words[i : i + n]), item_id)

    def find(self, text: str) -> tuple[str, int] | None:
        """Returns (item id, length of the match in words) of the longest kind of match, else None."""
        words = searched_words(text)
        # Longer matches are the stronger evidence, so they are reported first.
        for n in sorted(self.by_length, reverse=True):
            table = self.by_length[n]
            for gram in zip(*(words[i:] for i in range(n)), strict=False):
                if gram in table:
                    return table[gram], n
        return None


class ItemRuns:
    """A trie of every run of an item's words. A node is a run, identified by its number; 0 is the empty run.

    Memory and time to build grow with LONGEST times the words of all items, search with the words of the corpus.
    """

    def __init__(self, items: Mapping[str, str]) -> None:
        """Builds the trie; `items` are the texts by id."""
        self.words = {id: searched_words(text) for id, text in items.items()}
        self.children: list[dict[str, int]] = [{}]
        self.parent = [0]
        for words in self.words.values():
            for start in range(len(words)):
                node = 0
                for word in words[start : start + MAX_RUN_WORDS]:
                    child = self.children[node].get(word)
                    if child is None:
                        child = self.children[node][word] = len(self.children)
                        self.children.append({})
                        self.parent.append(node)
                    node = child

    def search(self, text: str) -> set[int]:
        """Returns the longest runs at each position of a text; every prefix of such a run occurs as well."""
        words, runs, children = searched_words(text), set(), self.children
        for start, word in enumerate(words):
            node = children[0].get(word)
            if node is None:
                continue
            for word in words[start + 1 : start + MAX_RUN_WORDS]:
                child = children[node].get(word)
                if child is None:
                    break
                node = child
            runs.add(node)
        return runs

    def with_prefixes(self, runs: Iterable[int]) -> set[int]:
        """Returns the runs with all their prefixes."""
        closed_runs = {0}
        for node in runs:
            # A run in the set has all its prefixes there, so each is visited once.
            while node not in closed_runs:
                closed_runs.add(node)
                node = self.parent[node]
        return closed_runs

    def lengths(self, id: str, runs: set[int]) -> list[int]:
        """Returns for each word of an item the length of the longest matching run that begins with it."""
        words, lengths = self.words[id], []
        for start in range(len(words)):
            node = length = 0
            for word in words[start : start + MAX_RUN_WORDS]:
                node = self.children[node][word]
                if node not in runs:
                    break
                length += 1
            lengths.append(length)
        return lengths

    def overlap(self, id: str, runs: set[int], ngram: int) -> tuple[float, int]:
        """Returns the share of an item's n-grams that are found, and the longest found run in words.

        An item of fewer than `ngram` words is one n-gram as a whole; one without words overlaps with nothing.
        """
        lengths = self.lengths(id, runs)
        if not lengths:
            return 0.0, 0
        n = min(ngram, len(lengths), MAX_RUN_WORDS)
        places = lengths[: len(lengths) - n + 1]
        return sum(length >= n for length in places) / len(places), max(lengths)
