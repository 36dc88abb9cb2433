"""An engine of one process on given servers, and the reference that its answers are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_hdpo.rollout.sglang.answers import ExpertChoice
from megatron_hdpo.rollout.sglang.config import SGLangConfig
from megatron_hdpo.rollout.sglang.engine import SGLangEngine
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.servers.fleet import ServerFleet
from megatron_hdpo.rollout.sglang.watch import Watch
from megatron_hdpo.rollout.sglang.weights.gate import Gate
from megatron_hdpo.rollout.sglang.weights.push import WeightPush
from megatron_hdpo.rollout.sglang.weights.transports import TensorTransport
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult, SamplingParams

VOCAB, CONTEXT, KV_HEADS = 17, 128, 2
TOLERANCE = 1e-4
"""Of the log-probs of the model in float32: in one of some thousand samples of 110 tokens, rounding alone reaches 1e-5.
With the weights of the next version they differ by a thousand times more."""


class Weights:
    """A model whose weights of version v are its checkpoint's times 1 + v / 20."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
        self._state = {name: value.clone() for name, value in self.model.state_dict().items()}

    def stream(self, version: int) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._state.items():
            yield name, (value * (1 + version / 20)).float()

    def logprobs(self, prompt: np.ndarray, completion: Completion, version: int) -> np.ndarray:
        """[T, V] in float64."""
        self.model.load_state_dict(dict(self.stream(version)))
        ids = torch.tensor([*prompt.tolist(), *completion.token_ids.tolist()])[None]
        with torch.no_grad():
            return self.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).numpy()

    def of_sampled(self, prompt: np.ndarray, completion: Completion, version: int) -> np.ndarray:
        """Log-probs [T] of the completion's tokens in float64."""
        rows = self.logprobs(prompt, completion, version)
        return rows[np.arange(len(rows)), completion.token_ids]

    def worst(self, prompt: np.ndarray, completion: Completion, version: int) -> float:
        """Largest difference of the sampled log-probs."""
        return float(np.abs(self.of_sampled(prompt, completion, version) - completion.logprobs).max())


@contextmanager
def one_engine(
    urls: Sequence[str],
    servers: ServerFleet | None = None,
    gate: bool = True,
    kv_heads: int = KV_HEADS,
    experts: ExpertChoice | None = None,
    **settings: Any,
) -> Iterator[tuple[SGLangEngine, WeightPush]]:
    """An engine, and the push that fills it."""
    config = SGLangConfig.model_validate({"placement": "given", "urls": list(urls)} | settings)
    engine = SGLangEngine(config, urls, VOCAB, CONTEXT, servers=servers, experts=experts)
    num_experts = experts.experts if experts else 0
    checks = Gate(kv_heads, VOCAB, "cpu", 600.0, num_experts=num_experts) if gate else None
    try:
        yield engine, WeightPush(engine, TensorTransport(600.0), checks)
    finally:
        engine.close()


@contextmanager
def kept_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No server that was lost is let back before the end of the block, however soon it answers again."""

    async def not_yet(self: Watch, replica: Replica) -> None:
        return

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "_readmit", not_yet)
        yield


def request(key: str = "p#0", n: int = 1, tokens: int = 8, prompt: Sequence[int] = (2, 3, 4), **kw: Any) -> Any:
    params = SamplingParams(tokens, n=n, **kw)
    return GenerationRequest(key, np.array(prompt, dtype=np.int32), params, affinity=key)


def collect(engine: SGLangEngine, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
    """All results of the requests."""
    engine.submit(requests)
    return [result for result in engine.results() if result is not None]


def completions(results: Sequence[GenerationResult]) -> list[Completion]:
    """The samples among them; fails on errors."""
    assert not [error for result in results for error in result.errors], results
    return [completion for result in results for completion in result.completions]
