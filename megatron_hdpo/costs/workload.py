"""Work of one step, and the place where its rollouts are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.types.learning import ModelRole

TeacherKind = Literal["none", "policy", "frozen", "snapshot", "ema", "external"]
Engine = Literal["embedded", "colocated", "separate"]
TrainerMemory = Literal["keep", "optimizer", "all"]
MODEL_ROLES: tuple[ModelRole, ...] = ("policy", "teacher", "reference")


@dataclass(frozen=True)
class StudentScoring:
    """Forward passes of the trainer over student rollouts.

    role: which model scores. per_rollout: mean number of passes. prompt_tokens: of the prompt before the response.
    """

    role: ModelRole
    per_rollout: float
    prompt_tokens: int


@dataclass(frozen=True)
class Workload:
    """Work of one step. Lengths are means, in tokens.

    cliff_rate: share of prompts that all samples fail; solved_rate: that all samples solve; neither has a surrogate
    gradient. privileged_share: share of prompts that get privileged rollouts; None: the cliffs. privileged_success:
    share of those rollouts that become distillation data. teacher: none for GRPO; teacher_model: of an external one.
    scored_by_trainer: whether the teacher's top k needs a forward pass of the trainer. student_support: whether the
    policy scores those rollouts first, for its own top k; full: targets over the whole vocabulary. student_scorings: of
    student rollouts. trained_share: share of student rollouts that are trained; None: those with an advantage.
    distilled: whether these have targets.
    """

    prompts: int
    samples: int
    prompt_tokens: int
    response_tokens: int
    longest_response: int
    privileged_prompt_tokens: int = 0
    cliff_rate: float = 0.0
    solved_rate: float = 0.0
    privileged_rollouts: int = 0
    privileged_share: float | None = None
    privileged_success: float = 0.5
    max_cliffs: int | None = None
    micro_batch_tokens: int = 8192
    head_chunk: int = 1024
    top_k: int = 64
    updates: int = 1
    teacher: TeacherKind = "policy"
    scored_by_trainer: bool = True
    student_support: bool = False
    full: bool = False
    student_scorings: tuple[StudentScoring, ...] = ()
    teacher_model: Architecture | None = None
    trained_share: float | None = None
    distilled: bool = False

    def __post_init__(self) -> None:
        for what in ("prompts", "samples", "prompt_tokens", "response_tokens"):
            if getattr(self, what) < 1:
                raise PlanError(f"{what.replace('_', ' ')}: {getattr(self, what)}, at least 1 is needed")
        if not 0 <= self.privileged_success <= 1:
            raise PlanError(f"privileged success {self.privileged_success}: a share from 0 to 1")
        if self.prompt_tokens + self.response_tokens > self.micro_batch_tokens:
            raise PlanError(
                f"micro_batch_tokens {self.micro_batch_tokens} cannot hold one sequence of {self.prompt_tokens} + "
                f"{self.response_tokens} tokens"
            )
        if not 0 <= self.cliff_rate + self.solved_rate <= 1:
            raise PlanError(f"cliff rate {self.cliff_rate} and solved rate {self.solved_rate}: together at most 1")

    @property
    def privileged_prompts(self) -> float:
        """Return the number of prompts per step that get privileged rollouts."""
        if self.teacher == "none":
            return 0.0
        prompts = self.prompts * (self.cliff_rate if self.privileged_share is None else self.privileged_share)
        return prompts if self.max_cliffs is None else min(prompts, self.max_cliffs)

    @property
    def student_sequences(self) -> float:
        """Return the number of student sequences sampled per step."""
        return float(self.prompts * self.samples)

    @property
    def privileged_sequences(self) -> float:
        """Return the number of privileged sequences sampled per step."""
        return self.privileged_prompts * self.privileged_rollouts

    @property
    def kept(self) -> float:
        """Return the number of privileged rollouts that the teacher scores and the student learns from."""
        return self.privileged_sequences * self.privileged_success

    @property
    def surrogate_sequences(self) -> float:
        """Return the number of trained student rollouts; by default those of mixed groups."""
        if self.trained_share is not None:
            return self.student_sequences * self.trained_share
        return self.student_sequences * (1.0 - self.cliff_rate - self.solved_rate)

    @property
    def trained_sequences(self) -> float:
        """Return the number of sequences with a forward and a backward pass."""
        return self.surrogate_sequences + self.kept

    @property
    def sequence_tokens(self) -> int:
        """Return the tokens of one trained sequence."""
        return self.prompt_tokens + self.response_tokens

    def training_work(self, layout: Layout) -> Repeated:
        """Return the micro-batches of one rank in one optimizer step, its targets spread evenly over them."""
        share = self.trained_sequences / layout.data / self.updates
        aimed = self.trained_sequences if self.distilled else self.kept
        targets = aimed / self.trained_sequences if self.trained_sequences else 0.0
        return self._packed(share, self.prompt_tokens, targets, layout)

    def scorer(self, role: ModelRole, policy: Architecture) -> Architecture:
        """Return the architecture of the model that scores."""
        return self.teacher_model if role == "teacher" and self.teacher_model is not None else policy

    def scored(self, role: ModelRole) -> tuple[float, int]:
        """Return the number of responses that a model scores in a step, and the mean tokens of their prompts."""
        parts = [
            (one.per_rollout * self.student_sequences, one.prompt_tokens)
            for one in self.student_scorings
            if one.role == role
        ]
        if role == "teacher" and self.scored_by_trainer:
            parts.append((self.kept, self.privileged_prompt_tokens))
        if role == "policy" and self.student_support:
            parts.append((self.kept, self.prompt_tokens))
        sequences = sum(count for count, _ in parts)
        return sequences, round(sum(count * prompt for count, prompt in parts) / sequences) if sequences else 0

    def scoring_work(self, role: ModelRole, layout: Layout) -> Repeated:
        """Return the micro-batches of one rank in a step's scoring by a model; a count of 0 if it scores nothing."""
        sequences, prompt = self.scored(role)
        if not sequences:
            return Repeated(PackedShape(0, 0, 0), 0)
        return self._packed(sequences / layout.data, prompt, 1.0, layout)

    def _packed(self, sequences: float, prompt: int, targets: float, layout: Layout) -> Repeated:
        """Return micro-batches of whole sequences, of nearly equal size.

        Context-parallel ranks share each sequence, padded to two chunks per rank.
        """
        length = prompt + self.response_tokens
        length += -length % (2 * layout.context) if layout.context > 1 else 0
        count = max(1, round(sequences + 0.4999))
        per_batch = max(1, self.micro_batch_tokens // length)
        batches = -(-count // per_batch)
        each = -(-count // batches)
        responses = -(-each * self.response_tokens // layout.context)
        rows = each * length // layout.context
        shape = PackedShape(rows, length, responses, round(responses * targets), self.top_k, full=self.full)
        return Repeated(shape, batches)


@dataclass(frozen=True)
class RolloutSetup:
    """Engine that samples the rollouts.

    embedded: on every GPU of the trainer, with a whole copy of the model. colocated: SGLang servers of `tensor` GPUs on
    the trainer's GPUs; saver: they release their memory while the trainer works. separate: SGLang on `gpus` GPUs of
    their own. memory_fraction: of a GPU, for a server's weights and cache; None: what is left. fp8: servers quantise.
    trainer_memory: what of the trainer leaves the GPUs of colocated servers while these sample.
    """

    engine: Engine = "colocated"
    tensor: int = 1
    gpus: int = 0
    max_concurrency: int = 256
    saver: bool = True
    memory_fraction: float | None = None
    ahead: bool = False
    fp8: bool = False
    trainer_memory: TrainerMemory = "keep"

    def __post_init__(self) -> None:
        if self.trainer_memory != "keep" and (self.engine != "colocated" or not self.saver):
            raise PlanError("the trainer's memory leaves only GPUs of colocated servers that release theirs in turn")
        if (self.engine == "separate") != (self.gpus > 0):
            raise PlanError("separate servers need their number of GPUs (--rollout-gpus), and only they have one")
        if self.engine == "separate" and self.gpus % self.tensor:
            raise PlanError(f"{self.gpus} rollout GPUs are no multiple of servers of {self.tensor}")
        if self.engine == "embedded" and self.tensor != 1:
            raise PlanError("the embedded engine holds a whole model on every GPU: it has no tensor parallelism")
