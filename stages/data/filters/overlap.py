"""Which runs of consecutive words of some items occur in a corpus: the items are indexed once, documents streamed.

Words are those of decontamination (`searched_words`): spacing, case and most punctuation do not count, signs of
arithmetic do. What says the same in other words is not found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stages.data.filters.words import searched_words

LONGEST = 64
"""Words of a run at most; a longer match counts as one of these."""


class ItemRuns:
    """A trie of every run of an item's words. A node stands for a run and is called by its number; 0 is the empty one.

    Memory and time to build grow with LONGEST times the words of all items, search with the words of the corpus.
    """

    def __init__(self, items: Mapping[str, str]) -> None:
        """items: text by id."""
        self.words = {id: searched_words(text) for id, text in items.items()}
        self.after: list[dict[str, int]] = [{}]
        self.parent = [0]
        for words in self.words.values():
            for start in range(len(words)):
                node = 0
                for word in words[start : start + LONGEST]:
                    found = self.after[node].get(word)
                    if found is None:
                        found = self.after[node][word] = len(self.after)
                        self.after.append({})
                        self.parent.append(node)
                    node = found

    def search(self, text: str) -> set[int]:
        """The longest runs that begin anywhere in a text; the beginning of a run that is found is found too."""
        words, found, after = searched_words(text), set(), self.after
        for start, word in enumerate(words):
            node = after[0].get(word)
            if node is None:
                continue
            for word in words[start + 1 : start + LONGEST]:
                further = after[node].get(word)
                if further is None:
                    break
                node = further
            found.add(node)
        return found

    def closed(self, found: Iterable[int]) -> set[int]:
        """The runs with all their beginnings."""
        every = {0}
        for node in found:
            while node not in every:
                every.add(node)
                node = self.parent[node]
        return every

    def lengths(self, id: str, closed: set[int]) -> list[int]:
        """For each word of an item, the length of the longest found run that begins with it."""
        words, lengths = self.words[id], []
        for start in range(len(words)):
            node = length = 0
            for word in words[start : start + LONGEST]:
                node = self.after[node][word]
                if node not in closed:
                    break
                length += 1
            lengths.append(length)
        return lengths

    def overlap(self, id: str, closed: set[int], ngram: int) -> tuple[float, int]:
        """(share of an item's n-grams that are found, longest found run in words). An item of fewer than `ngram` words
        is one n-gram as a whole; one without words overlaps with nothing."""
        lengths = self.lengths(id, closed)
        if not lengths:
            return 0.0, 0
        n = min(ngram, len(lengths), LONGEST)
        places = lengths[: len(lengths) - n + 1]
        return sum(length >= n for length in places) / len(places), max(lengths)
