"""How stock SGLang stores a Hugging Face checkpoint's tensors: names, fusion and shards of a server's parameters.

Valid for the families that this package trains (Llama, Qwen2, Qwen3, Qwen3-MoE): query, key and value become qkv_proj,
gate and up become gate_up_proj, and the vocabulary is padded to a multiple of 64; columns, rows and heads are split
over the server's ranks, and key-value heads are repeated where there are fewer of them than ranks. A layer's experts
are two parameters, one expert after the other, each split over the ranks like the layer of a dense model. With expert
parallelism (`ep_size`) consecutive ranks form that many groups; a group holds consecutive experts, split over its ranks
alone. Experts are so for SGLang's Triton kernels, and on a CPU; other kernels rearrange them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import Tensor

from megatron_hdpo.rollout.sglang.weights.digests import Digests

VOCABULARY_MULTIPLE = 64
_QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_GATE_UP = {"gate_proj": 0, "up_proj": 1}
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<module>gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Part:
    """Where a checkpoint's tensor belongs: parameter `name`, as its `index`-th of `count` parts, split by `kind`.

    expert: number of the expert that it is of, None outside of them.
    """

    name: str
    index: int
    count: int
    kind: str
    expert: int | None = None


def part_of(name: str, num_experts: int = 0) -> Part:
    """Return the part that a checkpoint's tensor fills.

    Biases are split like the rows of their weight; the bias of a row-parallel layer is whole on every rank.
    num_experts: per layer; without it the count of an expert's parts is unknown (0).
    """
    if match := _EXPERT.fullmatch(name):
        return _expert_part(match["experts"], int(match["number"]), match["module"], num_experts)
    stem, _, leaf = name.rpartition(".")
    module = stem.rpartition(".")[2]
    if module in _QKV:
        fused = f"{stem.removesuffix(module)}qkv_proj.{leaf}"
        return Part(fused, _QKV[module], 3, "query" if module == "q_proj" else "key_value")
    if module in _GATE_UP:
        return Part(f"{stem.removesuffix(module)}gate_up_proj.{leaf}", _GATE_UP[module], 2, "rows")
    if module in ("o_proj", "down_proj"):
        return Part(name, 0, 1, "columns" if leaf == "weight" else "whole")
    return Part(name, 0, 1, "vocabulary" if module in ("embed_tokens", "lm_head") else "whole")


def _expert_part(experts: str, number: int, module: str, num_experts: int) -> Part:
    if module == "down_proj":
        return Part(f"{experts}.w2_weight", number, num_experts, "columns", number)
    return Part(f"{experts}.w13_weight", 2 * number + _GATE_UP[module], 2 * num_experts, "rows", number)


def cut(tensor: Tensor, kind: str, rank: int, ranks: int, kv_heads: int) -> Tensor:
    """Return the part of a full tensor that rank `rank` of a server of `ranks` ranks holds; a view."""
    if kind == "whole" or (ranks == 1 and kind != "vocabulary"):
        return tensor
    if kind == "columns":
        return tensor.chunk(ranks, dim=1)[rank]
    if kind == "vocabulary":
        rows = _vocabulary_rows(tensor, ranks)
        return tensor[rank * rows : (rank + 1) * rows]
    if kind == "key_value" and kv_heads < ranks:
        return tensor.chunk(kv_heads, dim=0)[rank * kv_heads // ranks]
    return tensor.chunk(ranks, dim=0)[rank]


def _vocabulary_rows(tensor: Tensor, ranks: int) -> int:
    """Return the rows of the vocabulary that each rank holds, with those of padding."""
    return -(-len(tensor) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // ranks


@dataclass
class _Arrived:
    """Parts of a parameter: how many there are, how many are digested, and those that wait for an earlier one."""

    count: int
    digested: int = 0
    waiting: dict[int, tuple[Tensor, Part]] = field(default_factory=dict)


class ServedParameters:
    """Digests of the parameters that a server of `ranks` ranks holds, computed from the stream of full tensors.

    digests: the server's own hash function, of bytes alone. A part is digested as soon as all parts before it are; only
    parts that come too early are stored. num_experts: per layer, 0 in a dense model. groups: of ranks, over which the
    experts are distributed; it divides the ranks and the experts.
    """

    def __init__(self, ranks: int, kv_heads: int, digests: Digests, num_experts: int = 0, groups: int = 1) -> None:
        self.ranks, self.kv_heads, self.digests, self.num_experts = ranks, kv_heads, digests, num_experts
        self.groups = groups
        self._arrived: dict[str, _Arrived] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of the stream."""
        part = part_of(name, self.num_experts)
        arrived = self._arrived.setdefault(part.name, _Arrived(part.count))
        arrived.waiting[part.index] = (tensor, part)
        while arrived.digested in arrived.waiting:
            self._digest(*arrived.waiting.pop(arrived.digested))
            arrived.digested += 1

    def by_rank(self) -> list[dict[str, str]]:
        """Return, for each rank of the server, the digest of every parameter of which all parts were added."""
        complete = {name for name, arrived in self._arrived.items() if arrived.digested == arrived.count}
        ranks: list[dict[str, str]] = [{} for _ in range(self.ranks)]
        for (rank, name), value in self.digests.result().items():
            if name in complete:
                ranks[rank][name] = value
        return ranks

    def _digest(self, tensor: Tensor, part: Part) -> None:
        rows = _vocabulary_rows(tensor, self.ranks) if part.kind == "vocabulary" else 0
        holders = self._holders(part)
        for place, rank in enumerate(holders):
            piece = cut(tensor, part.kind, place, len(holders), self.kv_heads)
            padding = (rows - len(piece)) * tensor[0].numel() * tensor.itemsize if rows else 0
            self.digests.append((rank, part.name), piece, padding)

    def _holders(self, part: Part) -> range:
        """Return the ranks over which a part is split."""
        if part.expert is None:
            return range(self.ranks)
        size = self.ranks // self.groups
        group = part.expert * self.groups // self.num_experts
        return range(group * size, (group + 1) * size)
