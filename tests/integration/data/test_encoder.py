"""tiktoken gives the ids of `tokenizers` for any text, and tokenizers that it cannot represent are left to `tokenizers`."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from stages.data.order import tokenize_stage as encoders
from stages.data.order.tokenize_stage import Encoder
from stages.formats import tokenizer as training

SPECIALS = st.sampled_from([*training.SPECIAL_TOKENS, "<|", "|>", "<", "think", " "])
CHARACTERS = st.characters(exclude_categories=["Cs"])
AWKWARD = st.sampled_from(" \t\r\n\u00a0\u2028\u3000\x1c\x85\x00'sStTlLreveD0129ſİıK.,!-_=e\u0301\u200d\ufeff中あ한👩")
PIECES = SPECIALS | st.text(CHARACTERS, max_size=12) | st.text(AWKWARD, max_size=20)
RUNS = st.builds(lambda character, count: character * count, CHARACTERS | AWKWARD, st.integers(1, 2000))


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = training.untrained()
    tokenizer.train_from_iterator(texts, training.bpe_trainer(vocab_size))
    return tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    texts = [path.read_text() for path in sorted(Path(training.__file__).parent.rglob("*.py"))]
    texts += ["".join(rng.choices("naïve café Übergröße 中文字 über ааб", k=300)) for _ in range(200)]
    texts += [" " * n + "=" * n + "a" * n + "\n" * n for n in range(64)]  # tokens that are runs
    path = tmp_path_factory.mktemp("encoder") / "tokenizer.json"
    train(texts, 3000).save(str(path))
    return path


@pytest.fixture(scope="module")
def both(file: Path) -> dict[bool, Encoder]:
    return {special_tokens: Encoder(file, special_tokens) for special_tokens in (False, True)}


def assert_equal(both: dict[bool, Encoder], *texts: str) -> None:
    for special_tokens, encoder in both.items():
        assert encoder.fast
        for text, ours, theirs in zip(texts, encoder.encode(texts), encoder.reference(texts), strict=True):
            assert ours.tolist() == theirs.tolist(), (special_tokens, text)


@settings(max_examples=1000, deadline=None)
@given(pieces=st.lists(PIECES | RUNS, max_size=8))
def test_any_text_has_the_ids_of_tokenizers(both: dict[bool, Encoder], pieces: list[str]) -> None:
    assert_equal(both, "".join(pieces))


@pytest.mark.parametrize("form", ["a{}a", "1{}1 ", "'{}", " {}{}\n"])
def test_every_character_has_the_ids_of_tokenizers(both: dict[bool, Encoder], form: str) -> None:
    """In blocks of characters, each beside the same neighbors: both libraries bring tables of Unicode of their own."""
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    characters += [chr(code) for code in range(0xE0000, 0xE0200)]
    forms = [form.replace("{}", character) for character in characters]
    texts = ["\n.\n".join(forms[start : start + 4096]) for start in range(0, len(forms), 4096)]
    assert_equal({False: both[False]}, *texts)


@pytest.mark.parametrize("text", ["", *training.SPECIAL_TOKENS, "<|im_start|><|im_start|>user", "a<think></think>b"])
def test_special_tokens_are_tokens_only_where_they_are_meant(both: dict[bool, Encoder], text: str) -> None:
    assert_equal(both, text)
    specials = set(range(len(training.SPECIAL_TOKENS)))
    assert not specials & set(both[False].encode([text])[0].tolist())
    assert bool(specials & set(both[True].encode([text])[0].tolist())) == bool(text)


@pytest.mark.parametrize("character", [" ", "\n", "a", "-", "7", "\x00", "é", "中", "\t \n"])
def test_long_runs_have_the_ids_of_tokenizers(both: dict[bool, Encoder], character: str) -> None:
    assert_equal({False: both[False]}, "x" + character * 150_000 + "x")


def test_blanks_on_which_regular_expressions_fail_have_the_ids_of_tokenizers(both: dict[bool, Encoder]) -> None:
    text = "x" + " " * 1_200_000 + "x"
    assert encoders.has_blank_block(text) and not encoders.has_blank_block(" " * encoders.BLOCK)
    assert not encoders.has_blank_block("word " * encoders.BLOCK)
    assert_equal({False: both[False]}, text)


def rewritten(file: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Encoder:
    description = json.loads(file.read_text())
    change(description)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(description))
    return Encoder(path)


def test_ids_in_another_order_than_the_merges_are_mapped(file: Path, tmp_path: Path) -> None:
    def shuffle(description: dict[str, Any]) -> None:
        vocab = description["model"]["vocab"]
        tokens = [token for token in vocab if token not in training.SPECIAL_TOKENS]
        ids = [vocab[token] for token in tokens]
        random.Random(0).shuffle(ids)
        vocab |= dict(zip(tokens, ids, strict=True))

    shuffled, plain = rewritten(file, tmp_path, shuffle), Encoder(file)
    texts = [file.read_text()[-20_000:], "Übergröße, 中文字 and 12 tokens", Path(__file__).read_text()]
    assert_equal({False: shuffled}, *texts)
    assert shuffled.encode(texts)[0].tolist() != plain.encode(texts)[0].tolist()


def other_merge(model: dict[str, Any]) -> list[str]:
    """A second merge that makes a token."""
    for first, second in reversed(model["merges"]):
        token = first + second
        for cut in range(1, len(token)):
            if cut != len(first) and token[:cut] in model["vocab"] and token[cut:] in model["vocab"]:
                return [token[:cut], token[cut:]]
    raise AssertionError("no token can be cut in two ways")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(normalizer={"type": "NFC"}),
        lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\\p{N}{1,3}|\\P{N}+"),
        lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda d: d["model"].update(ignore_merges=True),
        lambda d: d["model"].update(byte_fallback=True),
        lambda d: d["added_tokens"][2].update(lstrip=True),
        lambda d: d["added_tokens"][2].update(normalized=True),
        lambda d: d["model"]["merges"].reverse(),
        lambda d: d["model"]["merges"].append(other_merge(d["model"])),
        lambda d: d["model"]["vocab"].update({"Ġunreachable": 3000}),
    ],
)
def test_a_tokenizer_of_another_kind_is_left_to_tokenizers(
    file: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    encoder = rewritten(file, tmp_path, change)
    assert not encoder.fast
    texts = ["e\u0301 12345 café", "<|endoftext|> x", ""]
    assert [ids.tolist() for ids in encoder.encode(texts)] == [ids.tolist() for ids in encoder.reference(texts)]


def test_merges_in_another_order_keep_their_ids(file: Path, tmp_path: Path) -> None:
    """Whether tiktoken can represent them depends on the merge."""
    for place in (0, 100, 1000):
        encoder = rewritten(
            file, tmp_path, lambda d, p=place: d["model"]["merges"].insert(p, d["model"]["merges"].pop())
        )
        texts = [Path(training.__file__).read_text(), "e\u0301 12345 café"]
        assert [ids.tolist() for ids in encoder.encode(texts)] == [ids.tolist() for ids in encoder.reference(texts)]


def test_a_special_token_that_begins_another_is_left_to_tokenizers(file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken("<think", special=True, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert not Encoder(tmp_path / "tokenizer.json").fast


def test_a_token_that_its_own_bytes_do_not_give_is_left_to_tokenizers(file: Path, tmp_path: Path) -> None:
    """`abc` is made of `ab` and `c`, but the bytes of `abc` alone give `a` and `bc`, which comes earlier."""

    def change(description: dict[str, Any]) -> None:
        model = description["model"]
        names = [*training.SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "bc", "ab", "abc"]
        model["vocab"] = {name: number for number, name in enumerate(names)}
        model["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]

    assert not rewritten(file, tmp_path, change).fast
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("abc").tokens == ["a", "bc"]
