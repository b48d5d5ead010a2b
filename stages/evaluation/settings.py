"""The section `evaluation` of a recipe: the measurements, and the thresholds of the release gates.

No stage imports this module: a threshold changes a verdict of the release, not the result of a stage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from pipeline.core.bounds import Context, Line, Range
from pipeline.core.stage import Config, added
from stages.evaluation.bits_per_byte import HeldoutLimit
from stages.evaluation.estimates import DOCUMENT_TOKENS, QUESTION_TOKENS, count
from stages.evaluation.long_context import ContextSection
from stages.evaluation.model_evaluation import ROWS_PER_BATCH
from stages.evaluation.pass_at_k import NumSamples
from stages.generation.engine import Engine
from stages.tasks.benchmarks import HarnessSection
from stages.tasks.eval_set import ChatItems, Problems

# Standard errors beyond which a difference is significant in one direction, at 95 %.
SURE = 1.645
# The gates on the effect of training, and the section of the recipe with the phase that each judges. No other gate can
# be waived.
WAIVABLE_GATES = {
    "pretraining_lowers_bits_per_byte": "pretrain",
    "midtraining_raises_accuracy": "midtrain",
    "midtraining_keeps_bits_per_byte": "midtrain",
    "longcontext_keeps_bits_per_byte": "long_context",
    "longcontext_finds_passkeys": "long_context",
    "rlvr_raises_pass_at_1": "rlvr",
    "rlhf_keeps_skills": "dpo",
    "dpo_is_preferred": "dpo",
    "online-rlhf_is_preferred": "online_rlhf",
}
if TYPE_CHECKING:
    WaivableGate = str
else:
    WaivableGate = Literal[tuple(WAIVABLE_GATES)]
# A gain that must be exceeded. A recipe that wants none waives the gate.
Gain = Annotated[float, Range(0, 1, below=True)]


# The thresholds of the gates are settings of the recipe, so that a release states them.
class ChatSection(Config):
    """Evaluation in conversations, and the thresholds of its release gates."""

    items: ChatItems
    """evaluation items"""
    max_new_tokens: Context = 64
    """maximum number of tokens of an answer"""
    num_samples: NumSamples = 8
    """answers per problem, for pass@k"""
    min_gain: Gain = 0.0
    """gain in pass@1 from SFT to RLVR that must be exceeded, as far as there is room for it"""
    min_win_rate: Annotated[float, Range(0.5, 1, below=True)] = 0.5
    """value that the lower confidence bound of a win rate must exceed"""
    skill_tolerance: Annotated[float, Range(0, 0.25)] = 0.05
    """maximum loss of pass@1 in phases after RLVR"""


class EvaluationSection(Config):
    """Measurements after each phase, and the thresholds of the release gates."""

    problems: Problems
    """number of evaluation problems by task"""
    heldout_documents: HeldoutLimit = 60
    """maximum number of held-out documents per source"""
    max_new_tokens: Context = 64
    """maximum number of tokens generated per problem"""
    parity_tolerance: Annotated[float, Range(0, 0.1, above=True)] = 1e-4
    """maximum difference of any fp32 logit between an export and the trainer; rounding grows with the logits and
    the context"""
    bits_per_byte_tolerance: Annotated[float, Range(0, 0.5)] = 0.05
    """maximum increase in bits per byte of the sources that mid-training or a long-context phase reads"""
    min_accuracy_gain: Gain = 0.0
    """gain in accuracy from mid-training that must be exceeded, as far as there is room for it"""
    waived_gates: Annotated[dict[WaivableGate, Line], Field(max_length=len(WAIVABLE_GATES))] = Field({})
    """gates on the effect of training that do not refuse the release, each with the reason, which the cards state"""
    chat: ChatSection | None = added(None)
    """evaluation in conversations; null: none"""
    context: ContextSection | None = added(None)
    """evaluation on long texts: passkeys and loss by position; null: none"""
    harness: HarnessSection | None = added(None)
    """task sets of lm-evaluation-harness; null: none"""
    engine: Engine = Engine()
    """what computes evaluations: the stages' processes, or vLLM"""

    def tokens(self, sources: int) -> int:
        """Returns the most tokens that the evaluation of one model reads and draws, with this number of sources.

        They are those of the held-out documents, the long texts and the problems; the other sections are not counted.
        """
        documents = sources * self.heldout_documents * DOCUMENT_TOKENS
        long = 0 if self.context is None else self.context.tokens
        return documents + long + sum(self.problems.values()) * (QUESTION_TOKENS + self.max_new_tokens)

    def pieces(self, sources: int) -> int:
        """Returns the most pieces into which the evaluation of one model is divided, with this number of sources.

        They are those of the held-out documents, the long texts and the problems; the other sections are not counted.
        """
        documents = count(sources * self.heldout_documents, ROWS_PER_BATCH)
        long = 0 if self.context is None else self.context.pieces
        return documents + count(sum(self.problems.values()), ROWS_PER_BATCH) + long
