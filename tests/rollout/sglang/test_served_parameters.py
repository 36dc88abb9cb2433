"""What a server of 1, 2 and 4 ranks holds of a checkpoint, against splits made by hand."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_hdpo.rollout.sglang.weights.gate import quantised
from megatron_hdpo.rollout.sglang.weights.served_parameters import ServedParameters, part_of

HEADS, HEAD_DIM, HIDDEN, FFN, VOCAB = 8, 4, 6, 8, 70
LAYER = "model.layers.3."
Tensors = dict[str, Tensor]


def checkpoint(kv_heads: int, family: str) -> Tensors:
    """A layer, its embedding and head; every element has a value of its own."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        LAYER + "input_layernorm.weight": (HIDDEN,),
        LAYER + "post_attention_layernorm.weight": (HIDDEN,),
        LAYER + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        LAYER + "self_attn.k_proj.weight": (kv_heads * HEAD_DIM, HIDDEN),
        LAYER + "self_attn.v_proj.weight": (kv_heads * HEAD_DIM, HIDDEN),
        LAYER + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        LAYER + "mlp.gate_proj.weight": (FFN, HIDDEN),
        LAYER + "mlp.up_proj.weight": (FFN, HIDDEN),
        LAYER + "mlp.down_proj.weight": (HIDDEN, FFN),
    }
    if family == "qwen2":
        for name, rows in (("q", HEADS), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{LAYER}self_attn.{name}_proj.bias"] = (rows * HEAD_DIM,)
    if family == "qwen3":
        shapes |= {f"{LAYER}self_attn.{name}_norm.weight": (HEAD_DIM,) for name in "qk"}
    start = 1.0
    tensors = {}
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        tensors[name] = torch.arange(start, start + count).view(shape)
        start += count
    return tensors


def by_hand(full: Tensors, family: str, rank: int, ranks: int, kv_heads: int) -> Tensors:
    """Row by row, head by head."""
    heads = range(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
    # A rank needs the key-value heads that its query heads read.
    kv = sorted({head * kv_heads // HEADS for head in heads})
    ffn = range(rank * FFN // ranks, (rank + 1) * FFN // ranks)

    def rows(name: str, wanted: list[int] | range, width: int = 1) -> Tensor:
        return torch.stack([full[name][i * width + j] for i in wanted for j in range(width)])

    def vocabulary(name: str) -> Tensor:
        padded = 128 // ranks
        wanted = range(rank * padded, (rank + 1) * padded)
        return torch.stack([full[name][i] if i < VOCAB else torch.zeros(HIDDEN) for i in wanted])

    held = {name: full[name] for name in full if "norm" in name}
    held |= {name: vocabulary(name) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    for leaf in ("weight", "bias") if family == "qwen2" else ("weight",):
        parts = [rows(f"{attention}q_proj.{leaf}", heads, HEAD_DIM)]
        parts += [rows(f"{attention}{name}_proj.{leaf}", kv, HEAD_DIM) for name in "kv"]
        held[f"{attention}qkv_proj.{leaf}"] = torch.cat(parts)
    held[mlp + "gate_up_proj.weight"] = torch.cat([rows(f"{mlp}{name}_proj.weight", ffn) for name in ("gate", "up")])
    columns = [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]
    held[attention + "o_proj.weight"] = full[attention + "o_proj.weight"][:, columns]
    held[mlp + "down_proj.weight"] = full[mlp + "down_proj.weight"][:, list(ffn)]
    return held


class Contents:
    """In place of digests, the bytes themselves."""

    def __init__(self) -> None:
        self.bytes: dict[tuple[int, str], bytes] = {}

    def append(self, key: tuple[int, str], piece: Tensor, padding: int = 0) -> None:
        self.bytes[key] = self.bytes.get(key, b"") + _bytes(piece) + bytes(padding)

    def result(self) -> dict[tuple[int, str], str]:
        return {key: content.hex() for key, content in self.bytes.items()}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def bits(tensor: Tensor) -> str:
    return _bytes(tensor).hex()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_rank_holds_its_part(ranks: int, kv_heads: int, family: str) -> None:
    full = checkpoint(kv_heads, family)
    order = list(full.items())
    random.Random(ranks).shuffle(order)
    parameters = ServedParameters(ranks, kv_heads, Contents())
    for name, tensor in order:
        parameters.add(name, tensor)
    for rank in range(ranks):
        wanted = {name: bits(t.contiguous()) for name, t in by_hand(full, family, rank, ranks, kv_heads).items()}
        assert parameters.by_rank()[rank] == wanted


def test_a_parameter_is_digested_when_its_last_part_has_come() -> None:
    full = checkpoint(2, "llama")
    parameters = ServedParameters(2, 2, Contents())
    attention = LAYER + "self_attn."
    for name in "qv":
        parameters.add(f"{attention}{name}_proj.weight", full[f"{attention}{name}_proj.weight"])
    assert parameters.by_rank() == [{}, {}]
    parameters.add(f"{attention}k_proj.weight", full[f"{attention}k_proj.weight"])
    assert [list(held) for held in parameters.by_rank()] == [[f"{attention}qkv_proj.weight"]] * 2
    assert not any(arrived.waiting for arrived in parameters._arrived.values()), "parts are let go of"


@pytest.mark.parametrize(("ranks", "groups"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (4, 4)])
def test_experts_are_two_parameters(ranks: int, groups: int) -> None:
    """[experts, gate above up, hidden] and [experts, hidden, channels], of which a rank has its channels.

    In groups each has the next of the experts, and its ranks have all channels together.
    """
    experts, names = 8, {"gate_proj": (FFN, HIDDEN), "up_proj": (FFN, HIDDEN), "down_proj": (HIDDEN, FFN)}
    full = {
        (expert, name): torch.arange(FFN * HIDDEN).view(shape) + 100.0 * expert + 1000.0 * number
        for expert in range(experts)
        for number, (name, shape) in enumerate(names.items())
    }
    order = list(full.items())
    random.Random(ranks).shuffle(order)
    parameters = ServedParameters(ranks, 2, Contents(), experts, groups)
    parameters.add(LAYER + "mlp.gate.weight", torch.ones(experts, HIDDEN))
    for (expert, name), tensor in order:
        parameters.add(f"{LAYER}mlp.experts.{expert}.{name}.weight", tensor)
    for rank in range(ranks):
        group, place = divmod(rank, ranks // groups)
        width = FFN * groups // ranks
        mine = slice(place * width, (place + 1) * width)
        held = range(group * experts // groups, (group + 1) * experts // groups)
        w13 = [torch.cat([full[e, "gate_proj"][mine], full[e, "up_proj"][mine]]) for e in held]
        w2 = [full[e, "down_proj"][:, mine] for e in held]
        assert parameters.by_rank()[rank] == {
            LAYER + "mlp.gate.weight": bits(torch.ones(experts, HIDDEN)),
            LAYER + "mlp.experts.w13_weight": bits(torch.stack(w13)),
            LAYER + "mlp.experts.w2_weight": bits(torch.stack(w2)),
        }


@pytest.mark.parametrize("rows", [64, 65, 128, 129])
def test_a_vocabulary_is_padded_to_64_rows(rows: int) -> None:
    tensor = torch.ones(rows, 2)
    for ranks in (1, 2, 4):
        parameters = ServedParameters(ranks, 2, Contents())
        parameters.add("lm_head.weight", tensor)
        padded = {64: 64, 65: 128, 128: 128, 129: 192}[rows]
        held = [held["lm_head.weight"] for held in parameters.by_rank()]
        assert [len(content) for content in held] == [padded // ranks * 2 * 4 * 2] * ranks
        assert "".join(held) == bits(torch.cat([tensor, torch.zeros(padded - rows, 2)]))


def test_a_bias_behind_a_sum_over_ranks_is_whole() -> None:
    assert part_of(LAYER + "self_attn.o_proj.bias").kind == "whole"
    assert part_of(LAYER + "self_attn.o_proj.weight").kind == "columns"


def test_experts_are_quantised_and_routers_are_not() -> None:
    assert quantised(LAYER + "mlp.experts.w13_weight") and quantised(LAYER + "mlp.experts.w2_weight")
    assert not quantised(LAYER + "mlp.gate.weight") and not quantised(LAYER + "input_layernorm.weight")
