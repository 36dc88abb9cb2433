"""Tiny random checkpoints, policies on any layout, and hand-made examples: what tests of the training core share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from distributed_helper import leave_layout
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_hdpo.model.architecture import read_architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.chunks import chunks_of
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext, start
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.types.learning import DivergenceConfig, Example, LossSpec, Scoring, SurrogateConfig
from megatron_hdpo.types.rollouts import TopKArrays
from megatron_hdpo.weights.load import load_hf
from megatron_hdpo.weights.stream import stream_hf

# At TP 2 the padded vocabulary is 512: both shards hold real tokens, the second one padding too.
VOCAB = 299
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3_tied": lambda: Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=16, tie_word_embeddings=False),
}
# Adam divides by |g| + eps at its first step: a large eps keeps that smooth, so that equal gradients, up to rounding,
# give equal weights. The clip is below the norm of these examples' gradients. The warm-up makes every step's rate
# another one.
OPTIMIZER = OptimizerConfig(lr=0.04, warmup_start=0.5, warmup_steps=5, eps=0.01, weight_decay=0.1, clip_grad=0.25)
SPEC = LossSpec(
    SurrogateConfig(clip_low=0.2, clip_high=0.3, dual_clip=2.5, importance_cap=1.5),
    DivergenceConfig(coefficient=8.0, beta=0.4, temperature=1.2, top_k=5),
    temperature=0.9,
)


def make_checkpoint(name: str, folder: Path) -> Path:
    """A random model with random norms and biases too: at their defaults a mix-up would go unseen."""
    torch.manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 else 0.15
            if "mlp.gate." in parameter_name:
                scale = 0.5  # far from ties: float32 and float64 are to choose the same experts
            parameter.normal_(mean=1.0 if "norm" in parameter_name else 0.0, std=scale)
    model.save_pretrained(folder / name)
    return folder / name


@contextmanager
def joined(tensor: int = 1, pipeline: int = 1, sequence: bool = False, **more: int) -> Iterator[ParallelContext]:
    """Make Megatron's groups for one layout; the process group of all ranks stays for the next."""
    layout = ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence, **more, timeout_minutes=1.0)
    context = start(layout, device="cpu")
    try:
        yield context
    finally:
        leave_layout()


def build_policy(
    path: Path,
    context: ParallelContext,
    *,
    budget: int = 40,
    recompute: bool = False,
    optimizer: OptimizerConfig | None = None,
    total_steps: int = 10,
    head_chunk: int = 1024,
    dtype: str = "float32",
    model: dict[str, Any] | None = None,
) -> Policy:
    """The checkpoint as a policy; without an optimizer unless one is configured. model: more of its section."""
    architecture = read_architecture(path)
    config = ModelConfig(**({"path": str(path), "dtype": dtype, "recompute": recompute} | (model or {})))
    built = build_model(architecture, context, config)
    load_hf(built, architecture, context, path)
    ddp = wrap_data_parallel(built, context)
    pair = (None, None) if optimizer is None else build_optimizer(optimizer, ddp, context, total_steps)
    return Policy(architecture, context, ddp, budget, *pair, head_chunk=head_chunk)


def weights_of(policy: Policy) -> dict[str, np.ndarray]:
    """Full tensors by Hugging Face name, on every rank."""
    stream = stream_hf(policy.model, policy.architecture, policy.context)
    return {name: value.float().numpy().copy() for name, value in stream}


def gradients_of(policy: Policy) -> dict[str, np.ndarray]:
    """Full gradients by Hugging Face name, on every rank, after `accumulate_gradients`.

    They take the way of the weights: main_grad in the place of the parameters of a clone, which is streamed. Streaming
    raises where ranks that hold copies of one parameter hold different gradients. Overwrites the gradient buffers.
    """
    _complete_over_replicas(policy)
    clone = build_model(policy.architecture, policy.context, ModelConfig(path="", dtype="float32"))
    own = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            parameter.copy_(own[name].main_grad)
    return {name: value.numpy().copy() for name, value in stream_hf(clone, policy.architecture, policy.context)}


def _complete_over_replicas(policy: Policy) -> None:
    """The distributed optimizer leaves each replica the reduced gradients of its part of the buffer alone."""
    for chunk in chunks_of(policy.ddp):
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, own, group=group)


def padding_gradient(policy: Policy) -> float:
    """Largest gradient of this rank's vocabulary rows behind the last token."""
    tp = policy.context.groups.tp
    share = policy.architecture.padded_vocab_size(tp.size()) // tp.size()
    real = min(max(policy.architecture.vocab_size - tp.rank() * share, 0), share)
    largest = 0.0
    for name, parameter in policy.model.named_parameters():
        if ("word_embeddings" in name or "output_layer" in name) and real < share:
            largest = max(largest, float(parameter.main_grad[real:].abs().max()))
    return largest


# Prompt and response lengths; no two sequences fit into 16 tokens together.
_LENGTHS = [(5, 7), (3, 9), (11, 4), (2, 14), (8, 1), (1, 9), (4, 8), (6, 5), (7, 4), (4, 6)]
ONE_PER_MICRO_BATCH, SEVERAL, ALL_IN_ONE = 16, 40, 1000


def make_examples(seed: int = 0) -> list[Example]:
    """Ten examples that use every field: signs, ratios outside and inside the clip, missing log-probs, fractional and
    zero weights, targets alone and beside a surrogate, counts unlike the number of tokens, inert ones, and one that the
    student did not sample."""
    rng = np.random.default_rng(seed)
    return [_example(rng, index, *lengths) for index, lengths in enumerate(_LENGTHS)]


def _example(rng: np.random.Generator, index: int, prompt: int, length: int) -> Example:
    advantage = (1.2, -0.8, 0.5, 0.0, 0.0, 0.0, -1.5, 0.9, 0.0, 0.7)[index]
    advantages = np.full(length, advantage) if index != 3 else rng.normal(size=length)
    old = rng.normal(-6.5, 1.0, length).astype(np.float32)
    weights = (
        rng.choice([0.0, 0.5, 1.0, 2.0], length) if index in (0, 3) else np.full(length, float(index not in (4, 5)))
    )
    has_target = index in (4, 5, 6)
    return Example(
        prompt_ids=rng.integers(0, VOCAB, prompt).astype(np.int32),
        response_ids=rng.integers(0, VOCAB, length).astype(np.int32),
        advantages_T=advantages.astype(np.float32),
        surrogate_weights_T=(weights * (index != 9)).astype(np.float32),
        surrogate_count=(1.0 if index == 3 else float(length)) * (index not in (4, 5, 9)),
        old_logprobs_T=None if index in (2, 4, 5) else old,
        rollout_logprobs_T=None if index in (1, 4, 5) else (old + rng.normal(0, 0.4, length)).astype(np.float32),
        distill_weights_T=rng.choice([0.0, 0.5, 1.0], length, p=[0.2, 0.3, 0.5]).astype(np.float32)
        if has_target and length > 1
        else (np.ones(length, dtype=np.float32) if has_target else None),
        distill_count=float(length) if has_target else 0.0,
        target=_target(rng, length) if has_target else None,
        own_rollout=index != 5,
    )


def _target(rng: np.random.Generator, length: int, k: int = 5) -> TopKArrays:
    """The k best of a random full distribution; their mass is below 1."""
    logits = rng.normal(0, 2.5, (length, VOCAB))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    ids = np.argsort(-logprobs, axis=-1)[:, :k]
    return TopKArrays(ids.astype(np.int32), np.take_along_axis(logprobs, ids, -1).astype(np.float32))


def make_scorings(seed: int = 1) -> list[Scoring]:
    """Seven scorings of different lengths, temperatures and k, one without top-k."""
    rng = np.random.default_rng(seed)
    return [
        Scoring(
            (index, "student", 0, "old"),
            rng.integers(0, VOCAB, prompt).astype(np.int32),
            rng.integers(0, VOCAB, length).astype(np.int32),
            top_k=(0, 6, 1, 6, 6, 40, 3)[index],
            temperature=(1.0, 1.0, 0.7, 1.6, 1.0, 1.0, 0.9)[index],
        )
        for index, (prompt, length) in enumerate(_LENGTHS[:7])
    ]
