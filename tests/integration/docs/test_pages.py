"""The examples of all pages, on a release of atom-smoke: each runs, exits as its page says, and prints what it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import examples
from tests.fixtures import ROOT, page_fixtures
from tests.fixtures.page_fixtures import TUTORIALS, compare
from tests.fixtures.run_fixtures import at_length

README = ROOT / "README.md"
# The longest page: it starts runs of its own.
LONG = "operators.md"
PAGES = [
    pytest.param(page, marks=at_length("release", 45)) if page.name == LONG else page
    for page in examples.pages()
    if page != README and TUTORIALS not in page.parents and examples.examples_of(page.read_text("utf-8"))
]


@pytest.fixture(scope="module")
def place(smoke_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[examples.Place]:
    with page_fixtures.smoke_place(tmp_path_factory.mktemp("reader"), smoke_demo) as at:
        yield at


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_give_what_it_shows(place: examples.Place, page: Path) -> None:
    page_fixtures.check(page, place)


def test_every_block_is_an_example_or_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    """A block without a language is the output of an example, which the page shows, or says why nothing prints it."""
    reasons = []
    for page in examples.pages():
        text = page.read_text("utf-8")
        printed = [example.output for example in examples.examples_of(text)]
        for block in examples.blocks_of(text):
            place = f"{page.relative_to(ROOT)}:{block.line}"
            if reason := examples.reason_not_to_run(block, examples.SMOKE, ("at length",)):
                reasons.append(f"{place}: {reason}")
            elif not block.language:
                assert block in printed, f"{place}: which example prints this? Name it, or say why none does"
            assert block not in printed or block.text.strip(), f"{place} is empty: run `make docs`"
            assert not block.notes.keys() - KINDS, f"{place} has notes of unknown kinds: {block.notes.keys() - KINDS}"
    with capsys.disabled():
        print("\nexamples that these tests do not run:", *reasons, sep="\n  ")
    assert len(reasons) < 70


KINDS = {"not run", "run", "output of", "exit", "lines", "varies", "only", "names"}


def test_an_example_that_fails_is_named(tmp_path: Path) -> None:
    at = examples.Place(tmp_path, dict(examples.QUIET), "atom-smoke")
    with pytest.raises(examples.ExampleError, match=r"page.md:6 exits with 3, not 0\nwhy"):
        examples.run("page.md", "```bash\ntrue\n```\n\n```bash\necho why; (exit 3); echo no\n```\n", at)
    with pytest.raises(examples.ExampleError, match=r"page.md:4 exits with 0, not 1"):
        examples.run("page.md", "<!-- exit: 1 -->\n\n```bash\ntrue\n```\n", at)
    with pytest.raises(examples.ExampleError, match=r"(?s)page.md:2 exits with 1, not 0\none\n.*ValueError: two"):
        examples.run("page.md", "```python\nprint('one')\nraise ValueError('two')\n```\n", at)


def test_outputs_need_a_finished_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "ROOT", tmp_path)
    with pytest.raises(
        examples.ExampleError, match=r"runs/releases/atom-tiny-0\.1\.0, which is not there: run `make demo`"
    ):
        examples.main([])


def test_blocks_share_a_shell_and_a_python(tmp_path: Path) -> None:
    page = """<!-- names: word = one two; question = 1+1 -->

```bash
a=1; cd /
```

```bash
echo $a $PWD "one two" atom-tiny atom-tinny
```

```
```

<!-- exit: 2 -->

```bash
a=3; echo hidden >&2; (exit 2)
```

`b.yaml`:

```yaml
1+1
```

```python
b = 2
```

<!-- output of: echo $a
cat "$FOLDER/b.yaml"; printf 'x\\ry %s\\n' "$FOLDER/b.yaml" 0123456789abcdef0123456789abcdef
-->

```
```

<!-- not run: a reason -->

```python
1 / 0
```

```python
print(b + 1)
for n in range(30):
    print(n)
```

```
```
"""
    at = examples.Place(tmp_path, {**examples.QUIET, "FOLDER": str(tmp_path)}, "atom-smoke")
    at.names = {"one two": "three", "1+1": "2+2"}
    outputs = examples.run("page.md", page, at)
    written = examples.with_outputs("page.md", page, outputs, tmp_path)
    shown = [example.output.text for example in examples.examples_of(written) if example.output]
    numbers = "".join(f"{n}\n" for n in range(9))
    assert shown == [
        "1 / three atom-smoke atom-tinny\n",
        "1\n2+2\ny b.yaml\ny 01234567…\n",
        f"3\n{numbers}…\n26\n27\n28\n29\n",
    ]


def test_another_output_is_named() -> None:
    compare("here", "one 2\n…\ntwo: 1.5e-06 abcdef0123…\n", "one  17\nx\ny\ntwo: 3e-5 0123456789\nend\n")
    compare("here", "is sha256:916a3705… at 6535\n", "is sha256:b20f311a25a3fd80 at 13.7k\n")
    for promised in ("two\none\n", "one 2\nthree\n", "one\n"):
        with pytest.raises(AssertionError, match="is not printed, or not after the lines before it"):
            compare("here", promised, "one 2\ntwo\n")
    compare("here", "a question\nTrue\n", "another\nTrue\n", varies=True)
    with pytest.raises(AssertionError, match="'True' is not printed"):
        compare("here", "a question\nTrue\n", "a question\nFalse\n", varies=True)


NEEDS_MORE = {
    r"bash\nhf download \S+ serve\.yaml": "needs vLLM; `make test-vllm`",
    r"bash\nvllm serve": "needs vLLM; `make test-vllm`",
    r"python\nfrom openai": "needs a server",
}
"""{start of a block on a card: why it is not run here}"""
LOADED = """
```python
assert len(train) > 50 and set(train["split"]) == {"train"} and len(train) < len(documents)
assert len(conversations) > 50 and conversations[0]["messages"][-1]["role"] == "assistant"
```
"""


# One template writes the cards of all models.
CARDS = [
    "model", "dataset", "checkpoints", ".",
    *(pytest.param(folder, marks=at_length("release", 15)) for folder in ("model-sft", "model-mid", "model-base")),
]  # fmt: skip


@pytest.mark.parametrize("folder", CARDS)
def test_the_examples_of_a_card_run_against_the_hub(place: examples.Place, folder: str) -> None:
    """By the names of the repositories, with the packages of this environment. A model gives the answer on its card."""
    release = place.folder / "runs/releases/atom-smoke-0.1.0"
    place.names = {}  # a card names what is in its own release
    card = re.sub(r"^pip install .*\n", "", (release / folder / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    for start, reason in NEEDS_MORE.items():
        card = re.sub(f"^```(?={start})", f"<!-- not run: {reason} -->\n\n```", card, flags=re.MULTILINE)
    card = card.replace("BRANCH", "pretrain-step-60") + (LOADED if folder == "dataset" else "")
    outputs = list(examples.run(f"{folder}/README.md", card, place).values())
    assert outputs
    if folder.startswith("model"):
        answers = re.findall(
            r"^The evaluation has this answer:\n\n````text\n(.*?)````$", card, re.MULTILINE | re.DOTALL
        )
        assert [answer.strip() for answer in answers] in ([outputs[0].strip()], [] if folder == "model-base" else None)
        assert ("apply_chat_template" in card) == (folder in ("model", "model-sft"))
    if folder != "dataset":
        assert ": verified" in outputs[-1]


def test_the_examples_of_the_readme_give_what_it_shows(place: examples.Place) -> None:
    """Last: it builds the release again without the signature of the demo, which other pages check."""
    page_fixtures.check(README, place)
