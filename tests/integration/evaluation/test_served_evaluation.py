"""What is asked of a vLLM server in an evaluation, and what is made of its answers: with a server that answers in
vLLM's form from a transformers model. `make test-vllm` does the same with the real one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.core.errors import AtomError, MachineError
from pipeline.run_secret import atom_secret
from stages.evaluation.harness import language_model
from stages.evaluation.harness_chat import InConversation
from stages.evaluation.harness_vllm import Served
from stages.generation.in_process import InProcess
from stages.generation.protocols import Prompt
from stages.generation.transformers_model import TransformersModel
from stages.generation.vllm_model import Client, ServedModel, ServedSampler
from stages.generation.vllm_server import Server
from tests.fixtures import release_fixtures
from tests.fixtures.signed_server_fixtures import SignedHandler

pytestmark = pytest.mark.numeric
CONTEXT, STOPS = release_fixtures.CONTEXT, (1, 3)


class Answers(SignedHandler):
    """Greedy answers, and log-probabilities of the prompt if they are asked for; `spoil` changes an answer."""

    model: Any
    spoil: Any = staticmethod(lambda answer: answer)
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.read_body()
        self.bodies.append(body)
        self.reply(self.spoil(self.answer(body["token_ids"], **body["sampling_params"])))

    def answer(self, ids: list[int], max_tokens: int, **sampling: Any) -> dict[str, Any]:
        prompt, drawn, content = None, list[int](), []
        if "prompt_logprobs" in sampling:
            prompt = [None, *map(self.entries, self.logprobs(ids)[:-1], ids[1:])]
        while len(drawn) < max_tokens and not (drawn and drawn[-1] in sampling.get("stop_token_ids", ())):
            row = self.logprobs([*ids, *drawn])[-1]
            drawn.append(int(row.argmax()))
            content.append({"token_id": drawn[-1], "logprob": float(row.max())})
        choice = {"token_ids": drawn, "logprobs": {"content": content}, "finish_reason": "stop"}
        return {"choices": [choice], "prompt_logprobs": prompt}

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), -1)

    @staticmethod
    def entries(row: torch.Tensor, token: int) -> dict[str, dict[str, float]]:
        """The likeliest token and the given one, as vLLM states them."""
        return {
            str(n): {"logprob": float(row[n]), "rank": int((row >= row[n]).sum())} for n in {int(row.argmax()), token}
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    release_fixtures.save_model(folder, 1, initializer_range=0.3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, padding_side="left")


@pytest.fixture(scope="module")
def oracle(folder: Path, tokenizer: Any) -> TransformersModel:
    return TransformersModel.load(folder, tokenizer)


@pytest.fixture
def answers(oracle: TransformersModel) -> type[Answers]:
    return type("OfThisTest", (Answers,), {"model": oracle.model, "bodies": []})


@pytest.fixture
def client(answers: type[Answers], tmp_path: Path) -> Iterator[Client]:
    atom_secret.make(tmp_path / "secret")
    answers.key = atom_secret.read(tmp_path / "secret")
    server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield Client(Server(f"http://127.0.0.1:{server.server_port}", tmp_path / "secret"), CONTEXT, CONTEXT + 1)
    server.shutdown()
    server.server_close()


def rows_of(count: int, length: int) -> list[list[int]]:
    make = torch.Generator().manual_seed(length)
    rows: list[list[int]] = torch.randint(4, release_fixtures.VOCAB, (count, length), generator=make).tolist()
    return rows


def test_a_served_model_measures_what_transformers_does(
    client: Client, oracle: TransformersModel, tokenizer: Any
) -> None:
    served = ServedModel(client, tokenizer)
    full, short = rows_of(3, CONTEXT), rows_of(5, 9)
    rows = [(full[0], 0), (full[1], 30), (full[2], CONTEXT), ([7], 0), ([], 0), *((row, 0) for row in short)]
    assert served.bits(rows) == pytest.approx(oracle.bits(rows), rel=1e-5)
    assert torch.allclose(served.token_bits(full[0]), oracle.token_bits(full[0]), atol=1e-4)
    assert served.likeliest(full[1], 9) == oracle.likeliest(full[1], 9)
    assert served.continue_greedily(short, 6) == oracle.continue_greedily(short, 6)
    with pytest.raises(AtomError, match=f"a row has {CONTEXT + 2} tokens, and the vLLM server reads at most"):
        served.token_bits([5] * (CONTEXT + 2))


def test_a_served_sampler_asks_for_what_the_stages_need(client: Client, answers: type[Answers], folder: Path) -> None:
    prompts = [Prompt(tuple(row), 2**63 + n) for n, row in enumerate(rows_of(4, 11))]
    sampler = ServedSampler(client, STOPS, 6)
    greedy, expected = (
        sampler.generate(prompts, greedy=True),
        InProcess(folder, STOPS, 6).generate(prompts, greedy=True),
    )
    assert [(c.ids, c.finished) for c in greedy] == [(c.ids, c.finished) for c in expected]
    assert all("seed" not in body["sampling_params"] for body in answers.bodies)
    answers.bodies.clear()
    sampler.generate(prompts[1:2])
    assert answers.bodies == [{
        "token_ids": list(prompts[1].ids),
        "sampling_params": {
            "temperature": 1.0, "max_tokens": 6, "stop_token_ids": [1, 3], "logprobs": 0, "detokenize": False, "seed": 1,
        },
    }]  # fmt: skip
    (long,) = rows_of(1, CONTEXT - 2)
    assert len(sampler.generate([Prompt(tuple(long), 0)], greedy=True)[0].ids) <= 4, "an answer ends with the context"


def test_the_harness_scores_as_in_transformers(client: Client, folder: Path, tokenizer: Any) -> None:
    """Choices, a text in windows, and an answer that a stop string cuts."""
    served, plain = Served(client, tokenizer), language_model(folder)

    def requests(*arguments: Any) -> list[Any]:
        return [type("Request", (), {"args": arguments})]

    for context, choice in (("one two", " three"), ("", "four"), ("x " * CONTEXT, "end")):
        ((ours, our_greedy),), ((theirs, their_greedy),) = (
            lm.loglikelihood(requests(context, choice), disable_tqdm=True) for lm in (served, plain)
        )
        assert ours == pytest.approx(theirs, rel=1e-4) and our_greedy == their_greedy
    text = requests("one two three " * 20)
    assert served.loglikelihood_rolling(text) == pytest.approx(plain.loglikelihood_rolling(text), rel=1e-4)
    settings = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    outputs = [lm.generate_until(requests("two and two", settings), disable_tqdm=True) for lm in (served, plain)]
    assert outputs[0] == outputs[1]
    with pytest.raises(AtomError, match="a task asks for answers of 999 tokens"):
        served.generate_until(requests("two", settings | {"max_gen_toks": 999}))


def test_the_harness_in_conversation_asks_as_in_transformers(
    client: Client, answers: type[Answers], folder: Path, tokenizer: Any
) -> None:
    """The same ids, and so the same answers: up to a token that ends one, whatever the stop strings of the task."""
    both = [InConversation(model, 12) for model in (Served(client, tokenizer), language_model(folder))]
    settings = {"until": ["e"], "max_gen_toks": 9, "do_sample": False}
    texts = [both[0].apply_chat_template([{"role": "user", "content": text}]) for text in ("a", "b c")]
    requests = [type("Request", (), {"args": (text, settings)}) for text in texts]
    outputs = [model.generate_until(requests, disable_tqdm=True) for model in both]
    assert outputs[0] == outputs[1]
    asked = sorted((body["token_ids"], body["sampling_params"]) for body in answers.bodies)
    assert [ids for ids, _ in asked] == sorted(both[1].tok_encode(text)[-(CONTEXT - 12) :] for text in texts)
    assert all((s["max_tokens"], s["stop_token_ids"], s["temperature"]) == (12, [1, 3], 0.0) for _, s in asked)
    without_number = InConversation(Served(client, tokenizer), None)
    with pytest.raises(AtomError, match="a task asks for answers of 256 tokens, and the model's context has 64"):
        without_number.generate_until([type("Request", (), {"args": (texts[0], {"do_sample": True})})])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer: {},
        lambda answer: {**answer, "prompt_logprobs": answer["prompt_logprobs"][:-1]},
        lambda answer: {**answer, "prompt_logprobs": [None, *({"9999": x} for x in answer["prompt_logprobs"][1:])]},
    ],
)
def test_an_answer_that_is_not_whole_is_no_result(
    client: Client, answers: type[Answers], tokenizer: Any, spoil: Any
) -> None:
    answers.spoil = staticmethod(spoil)
    with pytest.raises(MachineError, match="gave no whole answer"):
        ServedModel(client, tokenizer).token_bits([5, 6, 7])


def test_a_drawn_answer_without_its_log_probabilities_is_no_result(client: Client, answers: type[Answers]) -> None:
    answers.spoil = staticmethod(lambda answer: {"choices": [{**answer["choices"][0], "logprobs": {"content": []}}]})
    with pytest.raises(MachineError, match="gave no whole answer"):
        ServedSampler(client, STOPS, 6).generate([Prompt((5, 6), 0)])
