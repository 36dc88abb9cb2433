"""What really happens on gloo ranks: the bytes that the trainer holds, what autograd keeps of a micro-batch, and
the collectives of an optimizer step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.learning import Example, HiddenOnHost
from megatron_hdpo.types.rollouts import TopKArrays

# Operator of c10d -> (name, which tensors of its arguments are counted).
_KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
    "barrier": "barrier",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_": "reduce",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
}


class Collectives(TorchDispatchMode):
    """Counts (kind, group) -> number and bytes of every collective while it is entered.

    Bytes are those of the larger side on one rank: of what an all-gather gives and a reduce-scatter takes; of an
    all-to-all what the rank sends.
    """

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        self.names = _group_names(context)
        self.count: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._opname
            assert name in _KINDS, f"{name} is not counted"
            key = _KINDS[name], self._group(args, kwargs or {})
            self.count[key] += 1
            self.bytes[key] += _larger_side(args[1:2] if key[0] == "all_to_all" else args)
        return function(*args, **(kwargs or {}))

    def _group(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
                group = dist.ProcessGroup.unbox(value)
                return self.names.get(group.group_name, group.group_name)
        raise AssertionError("a collective without a group")

    def table(self) -> dict[tuple[str, str], tuple[int, int]]:
        return {key: (count, self.bytes[key]) for key, count in self.count.items()}


def _larger_side(args: tuple[Any, ...]) -> int:
    sides = [sum(t.nbytes for t in _tensors(argument)) for argument in args[:2]]
    return max(sides)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _group_names(context: ParallelContext) -> dict[str, str]:
    groups = context.groups
    named = {context.host.group_name: "host", context.replica_host.group_name: "host"}
    # Two interleaved stages send one way in the group of all ranks, so that the two ways do not wait for each other.
    named[dist.group.WORLD.group_name] = "pp"
    names = "mp intra_dist_opt dp_cp dp embd expt_dp tp_ep ep expt_tp pp cp tp"
    for name in names.split():
        group = getattr(groups, name, None)
        if isinstance(group, dist.ProcessGroup):
            named[group.group_name] = name
    return named


class Kept:
    """What autograd keeps for the backward pass while it is entered: bytes of storages, each counted once as long as
    any graph holds it. Parameters are left out. live: now; peak: at most."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._holders: Counter[int] = Counter()
        self.live = self.peak = 0

    @contextmanager
    def watching(self) -> Iterator[Kept]:
        """Watch every graph that is made."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor):
            yield self

    def _pack(self, tensor: Tensor) -> _Held:
        return _Held(self, tensor)

    def hold(self, storage: torch.UntypedStorage, change: int) -> None:
        """One holder more or less."""
        address = storage.data_ptr()
        if address in self._own:
            return
        before = self._holders[address] > 0
        self._holders[address] += change
        self.live += storage.nbytes() * ((self._holders[address] > 0) - before)
        self.peak = max(self.peak, self.live)


class _Held:
    """A tensor in a graph; it tells when the graph lets go."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.hold(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self.kept.hold(self.tensor.untyped_storage(), -1)


def build(architecture: Architecture, context: ParallelContext, budget: int, head_chunk: int, **model: Any) -> Policy:
    """A policy in bfloat16 of random weights that trains. model: more of the recipe's model section."""
    config = ModelConfig(path="", dtype="bfloat16", **model)
    model = build_model(architecture, context, config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    ddp = wrap_data_parallel(model, context)
    pair = build_optimizer(OptimizerConfig(), ddp, context, 10)
    return Policy(architecture, context, ddp, budget, *pair, head_chunk=head_chunk)


def examples(count: int, prompt: int, response: int, top_k: int, vocab: int, hidden: int = 0) -> list[Example]:
    """Examples of one length, each with an advantage and a target: a top k, or hidden states of `hidden` channels."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((response, vocab)), axis=-1)[:, :top_k].astype(np.int32)
    flat = np.full((response, top_k), -np.log(2.0 * max(top_k, 1)), dtype=np.float32)
    ones = np.ones(response, dtype=np.float32)
    states = torch.from_numpy(rng.normal(size=(response, hidden))).bfloat16()
    return [
        Example(
            prompt_ids=rng.integers(0, vocab, prompt).astype(np.int32),
            response_ids=rng.integers(0, vocab, response).astype(np.int32),
            advantages_T=ones,
            surrogate_weights_T=ones,
            surrogate_count=float(response),
            rollout_logprobs_T=-ones,
            distill_weights_T=ones,
            distill_count=float(response),
            target=HiddenOnHost(states) if hidden else TopKArrays(ids, flat),
        )
        for _ in range(count)
    ]
