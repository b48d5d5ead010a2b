"""Generate: texts that a language model, the generator, writes from the documents of another source.

    atom run RECIPE --until acquire-<source>

Seals what stage `acquire` seals of a source, and `generated/part-NNNNN.parquet`: of each text the document that it was
made from, the generator with its digest, the prompt, the settings of the sampler and the seed. The texts are drawn
batch by batch. A batch is sealed as soon as it is drawn, and memory holds one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from functools import cached_property, partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import AtomError
from pipeline.core.parts import Part, part_file, seal_part
from pipeline.core.stage import Estimate, Inputs, Report, Stage
from stages.data import estimates
from stages.data.acquire import acquire_stage
from stages.data.acquire.acquire_stage import AcquireConfig
from stages.data.acquire.licenses.expressions import forbids_derivatives
from stages.data.acquire.readers.generated import PLACE, Generated
from stages.data.acquire.sources import require_generator
from stages.formats.seeds import seed_of
from stages.formats.table import (
    DOCUMENTS,
    GENERATED,
    GENERATED_TEXTS,
    DocumentRow,
    GeneratedText,
    row_writer,
    stream_rows,
    write_rows,
)
from stages.scorers import answer_of

if TYPE_CHECKING:
    from stages.generation.protocols import Completion

VERSION = 1
# The table of a batch in the work folder.
TEXTS = "texts.parquet"
# Of a source, which chooses what draws the texts.
SETTING = "reader.engine"


def run(config: AcquireConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Draws the texts of a source, and seals them as stage `acquire` seals documents.

    `inputs["parent"]` holds the acquired documents of the source that the texts are made from.

    Resumes after the last sealed batch. Raises RecipeError if the generator's files are not those that are pinned, and
    AtomError if it cannot be loaded or there is no document.
    """
    with ExitStack() as stack:
        maker = _Maker(config, inputs, work, stack)
        parts = []
        for number in range(config.source.parts):
            parts.append(maker.seal(number))
            report.progress(number + 1, config.source.parts, "parts")
    acquire_stage.join(config, parts, len(maker.files), work, out, report)


def run_shard(config: AcquireConfig, inputs: Inputs, work: Path, shard: int) -> None:
    """Seals one part in `work`."""
    with ExitStack() as stack:
        _Maker(config, inputs, work, stack).seal(shard)


class _Maker:
    """Makes the parts of a source. The generator is loaded for the first batch that is missing."""

    def __init__(self, config: AcquireConfig, inputs: Inputs, work: Path, stack: ExitStack) -> None:
        """Checks the generator; `stack` closes it. Raises RecipeError if its files are not those that are pinned."""
        assert isinstance(config.source.reader, Generated)
        self.config, self.reader, self.name = config, config.source.reader, config.source.name
        self.parent, self.work, self.stack = inputs["parent"].path, work, stack
        self.files = config.source.files()
        require_generator(config.source, self.files)

    @cached_property
    def generator(self) -> Generator:
        return self.stack.enter_context(closing(Generator(self.reader, self.work)))

    def seal(self, number: int) -> Part:
        return seal_part(self.work, f"{self.name}-{number:05d}", partial(self._make_part, number))

    def _make_part(self, number: int, folder: Path) -> dict[str, Any]:
        """Writes the documents of a part, and how they were made."""
        # Every batch is drawn and sealed before the part is written, so a kill loses one batch at most.
        batches = list(self._batches(number))
        with row_writer(folder / "generated" / part_file(number), GENERATED) as write:
            for _, path in batches:
                for row in stream_rows(path, list(GENERATED)):
                    write(row)
        return acquire_stage.read_part(self.config, number, batches, folder)

    def _batches(self, number: int) -> Iterator[tuple[str, Path]]:
        """Yields (name, table) of each batch of a part, drawn unless it is sealed."""
        documents = self._chosen(self.parent / "documents" / part_file(number))
        for batch in count():
            if not (rows := list(islice(documents, self.reader.batch))):
                return
            name = f"{self.name}-{number:05d}-{batch:06d}"
            yield name, seal_part(self.work, name, partial(self._draw, rows)).folder / TEXTS

    def _chosen(self, table: Path) -> Iterator[DocumentRow]:
        """Yields the documents of the part that texts are made from."""
        # A hash of the id decides, so the choice is the same for any number of parts and tasks.
        bound = self.reader.share * 2**64
        for row in stream_rows(table, list(DOCUMENTS)):
            if self.reader.share == 1 or seed_of(f"generate/{self.name}/share/{row['id']}", self.config.seed) < bound:
                yield row

    def _draw(self, rows: Sequence[DocumentRow], folder: Path) -> dict[str, Any]:
        texts = [self._row(row) for row in rows]
        # The generator is not asked about documents whose license forbids derived texts.
        allowed = [i for i, text in enumerate(texts) if not text["reason"]]
        requests = []
        for i in allowed:
            ids, texts[i]["reason"] = self.generator.prompt(rows[i]["text"])
            texts[i]["prompt_tokens"] = len(ids)
            if not texts[i]["reason"]:
                requests.append((i, ids, texts[i]["seed"]))
        for (i, _, _), completion in zip(requests, self.generator.draw(requests), strict=True):
            text = texts[i]
            text["text"], text["reason"] = self.generator.read(completion)
            text["tokens"], text["finished"] = len(completion.ids), completion.finished
        write_rows(folder / TEXTS, GENERATED_TEXTS, texts)
        return {}

    def _row(self, row: DocumentRow) -> GeneratedText:
        """Returns the record of a text that is not drawn yet."""
        reader, id = self.reader, row["id"]
        is_forbidden = forbids_derivatives(row["license"])
        return {
            "id": f"{self.name}/{id}",
            "parent": id,
            "generator": reader.generator,
            "generator_digest": self.config.source.tree_digest,
            "prompt": reader.prompt,
            "form": reader.form,
            "temperature": 0.0 if reader.greedy else 1.0,
            "max_new_tokens": reader.max_new_tokens,
            # Samplers take seeds of 63 bits.
            "seed": seed_of(f"generate/{self.name}/{id}", self.config.seed) >> 1,
            "prompt_tokens": 0,
            "tokens": 0,
            "finished": False,
            "text": "",
            "license": row["license"],
            "kind": "derivatives" if is_forbidden else "generation",
            "reason": f"{row['license']} forbids derived texts" if is_forbidden else "",
        }


class Generator:
    """The generator's tokenizer and model."""

    def __init__(self, reader: Generated, work: Path) -> None:
        """Loads the generator; `work` gets the log of a server.

        Raises AtomError if the files cannot be loaded, if the generator has no chat template or too short a context, or
        if a server cannot start.
        """
        import torch
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        from stages.generation.samplers import open_sampler

        # The order of additions, and so the bits of a text, depends on the number of threads.
        torch.set_num_threads(1)
        torch.set_deterministic_debug_mode("error")
        folder, self.reader = Path(reader.path), reader
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
            self.context = int(config.max_position_embeddings)
            # Chat models often end a turn by another token than the tokenizer's.
            stops = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
        except (OSError, ValueError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise AtomError(f"the generator {reader.generator} at {folder} cannot be loaded: {reason}") from error
        if reader.form == "chat" and not self.tokenizer.chat_template:
            raise AtomError(f"the generator {reader.generator} at {folder} has no chat template; use form: text")
        if reader.max_new_tokens >= self.context:
            raise AtomError(
                f"the generator {reader.generator} has a context of {self.context} tokens, of which max_new_tokens = "
                f"{reader.max_new_tokens} leaves none for a prompt; lower it"
            )
        stops = [stops] if isinstance(stops, int) else list(stops or [])
        self.special = sorted(self.tokenizer.get_added_vocab())
        self.model = open_sampler(reader.engine, folder, stops, reader.max_new_tokens, work, SETTING)

    def prompt(self, text: str) -> tuple[list[int], str]:
        """Returns the token ids of the prompt for a document, and the reason, if any, why it cannot be asked."""
        if token := next((token for token in self.special if token in text), None):
            # It would be read as a special token and not as text, so that the document could end the turn.
            return [], f"the document holds {token}, a token of the generator"
        prompt = self.reader.prompt.replace(PLACE, text)
        if self.reader.form == "chat":
            messages = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) + self.reader.max_new_tokens > self.context:
            return ids, f"the prompt and max_new_tokens need more than the generator's context of {self.context} tokens"
        return ids, ""

    def draw(self, requests: Sequence[tuple[int, list[int], int]]) -> list[Completion]:
        """Returns the completions of requests, each (number, token ids, seed)."""
        from stages.generation.protocols import Prompt

        # All texts of a batch are computed together, so that rounding does not depend on anything but the batch.
        prompts = [Prompt(tuple(ids), seed) for _, ids, seed in requests]
        return self.model.generate(prompts, self.reader.greedy) if prompts else []

    def read(self, completion: Completion) -> tuple[str, str]:
        """Returns the text that was drawn, or the reason why it is not used."""
        # The last id of a finished text is the stop token.
        ids = list(completion.ids[:-1] if completion.finished else completion.ids)
        # Special tokens stay, so that a text that holds one is found below.
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = (answer_of(text) if self.reader.form == "chat" else text).strip()
        if not completion.finished and self.reader.unfinished == "remove":
            return "", f"the text did not end within {self.reader.max_new_tokens} tokens"
        if not text:
            return "", "the text is empty"
        if token := next((token for token in self.special if token in text), None):
            return "", f"the text holds {token}, a token of the generator"
        return text, ""

    def close(self) -> None:
        self.model.close()


def _reader(config: AcquireConfig) -> Generated:
    assert isinstance(config.source.reader, Generated)
    return config.source.reader


def estimate(config: AcquireConfig) -> Estimate:
    """Returns the estimate of reading and writing; how long the generator takes is not known."""
    return estimates.estimate("acquire", config.source.expected)


STAGE = Stage(
    "generate",
    VERSION,
    AcquireConfig,
    run,
    promise=lambda c: _reader(c).engine.promise,
    lack=lambda c: _reader(c).engine.lack_of(SETTING),
    gpus=lambda c: _reader(c).engine.gpus,
    environment=lambda c: _reader(c).engine.environment,
    estimate=estimate,
    shards=lambda c: c.source.parts,
    run_shard=run_shard,
    code=lambda c: c.source.code,
)
