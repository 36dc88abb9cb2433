"""The distillation of NeMo-RL as contenders of bench_divergence.py, from a copy of its repository that the user has."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch.distributed as dist
from torch import Tensor

from megatron_hdpo.divergence import TopK

# In the order in which they import each other; neither needs the package around it, whose import needs Ray.
FILES = ("nemo_rl/algorithms/logits_sampling_utils.py", "nemo_rl/distributed/model_utils.py")


def contenders(repository: Path, topk: TopK) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return contenders by name, each a function from logits [T, V / tp] to the sum of the losses of T - 1 tokens.

    The log-probs, and the entropy that the reverse KL needs, come from NeMo-RL's functions for vocabulary-parallel
    logits; it leaves the last token out. Raises FileNotFoundError where the repository lacks one of its files.
    """
    module = _load(repository)
    ids_1TK, logprobs_1TK = topk.ids_TK.unsqueeze(0), topk.logprobs_TK.unsqueeze(0)

    def forward_kl(z: Tensor, outside: bool) -> Tensor:
        lq, lp, _ = _logprobs(z, outside, False)
        return (lp.exp() * (lp - lq)).sum()

    def reverse_kl(z: Tensor) -> Tensor:
        lq, lp, negative_entropy = _logprobs(z, True, True)
        q = lq.exp()
        rest = negative_entropy - (q * lq).sum(-1) + 100.0 * (1.0 - q.sum(-1))
        return (q * (lq - lp)).sum() + rest.sum()

    def _logprobs(z: Tensor, outside: bool, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        group = dist.group.WORLD
        return module.get_distillation_topk_logprobs_from_logits(
            z.unsqueeze(0), logprobs_1TK, ids_1TK, outside, entropy, dist.get_rank(group), group
        )

    return {
        "NeMo-RL forward KL, renormalise": lambda z: forward_kl(z, False),
        "NeMo-RL forward KL, outside": lambda z: forward_kl(z, True),
        "NeMo-RL reverse KL, outside": reverse_kl,
    }


def _load(repository: Path) -> ModuleType:
    for path in FILES:
        name = path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(name, repository / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module
