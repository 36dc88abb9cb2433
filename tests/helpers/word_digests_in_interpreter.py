"""Run in a process of its own with TRITON_INTERPRET=1: the kernel's digests against the definition, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor
from word_digest_reference import RECORDED, SIZES, hashed_tensor, word_digest

from megatron_hdpo.rollout.sglang.weights.served_parameters import ServedParameters
from megatron_hdpo.rollout.sglang.weights.word_digests import WordDigests, as_words


def digest_of(*pieces: Tensor, padding: int = 0) -> str:
    digests = WordDigests()
    for piece in pieces[:-1]:
        digests.append((0, "w"), piece)
    digests.append((0, "w"), pieces[-1], padding)
    return digests.result()[0, "w"]


def whole_tensors() -> None:
    for size, recorded in zip(SIZES, RECORDED, strict=True):
        assert digest_of(hashed_tensor(size)) == recorded, size
    assert digest_of(torch.empty(0)) == "0" * 16
    tensor = torch.arange(20_000, dtype=torch.float32).view(100, 200)
    plain = digest_of(tensor)
    assert plain == word_digest(tensor)
    assert digest_of(tensor.T.contiguous().T) == plain, "of values, not of a layout in memory"
    for place in ((0, 0), (50, 100), (99, 199)):
        other = tensor.clone()
        other.view(torch.int32)[place] ^= 1
        assert digest_of(other) == word_digest(other) != plain, place


def pieces_of_a_parameter() -> None:
    """Joints within a tile and between tiles; zeros behind the last piece; views into larger tensors."""
    full = torch.randn(300, 210, generator=torch.Generator().manual_seed(1)).bfloat16()
    for joints in ([], [1], [78], [10, 11, 12], [100, 290]):
        pieces = [full[a:b] for a, b in zip([0, *joints], [*joints, 300], strict=True)]
        assert digest_of(*pieces) == word_digest(full), joints
    padded = torch.cat([full, torch.zeros(84, 210, dtype=torch.bfloat16)])
    assert digest_of(full, padding=84 * 210 * 2) == word_digest(padded)
    assert digest_of(full[300:], padding=84 * 210 * 2) == word_digest(padded[300:]), "nothing but padding"
    for columns in (slice(0, 70), slice(70, 140), slice(71, 140), slice(140, 209)):
        assert digest_of(full[:, columns]) == word_digest(full[:, columns]), columns
    assert as_words(full[:, 70:140]).data_ptr() == full[:, 70:140].data_ptr(), "read where it lies, not copied"
    upper, lower = full[:150, 70:140], full[150:, 70:140]
    assert digest_of(upper, lower) == word_digest(full[:, 70:140])
    odd = torch.ones(3, dtype=torch.bfloat16)
    assert digest_of(odd) == word_digest(odd)
    try:
        digest_of(odd, odd)
    except ValueError as error:
        assert "32-bit word" in str(error)
    else:
        raise AssertionError("a joint within a word gave a digest")


def parameters_of_a_server() -> None:
    full = {
        "model.embed_tokens.weight": torch.randn(70, 64),
        "model.layers.0.self_attn.o_proj.weight": torch.randn(64, 64),
        "model.layers.0.mlp.gate_proj.weight": torch.randn(96, 64),
        "model.layers.0.mlp.up_proj.weight": torch.randn(96, 64),
        "model.norm.weight": torch.randn(64),
    }
    full = {name: tensor.bfloat16() for name, tensor in full.items()}
    parameters = ServedParameters(2, 2, WordDigests())
    for name in reversed(full):
        parameters.add(name, full[name])
    for rank, held in enumerate(parameters.by_rank()):
        half = slice(rank * 48, (rank + 1) * 48)
        embedding = torch.cat([full["model.embed_tokens.weight"], torch.zeros(58, 64, dtype=torch.bfloat16)])
        gate_up = [full[f"model.layers.0.mlp.{name}_proj.weight"][half] for name in ("gate", "up")]
        columns = slice(rank * 32, (rank + 1) * 32)
        assert held == {
            "model.embed_tokens.weight": word_digest(embedding[rank * 64 : (rank + 1) * 64]),
            "model.layers.0.self_attn.o_proj.weight": word_digest(
                full["model.layers.0.self_attn.o_proj.weight"][:, columns]
            ),
            "model.layers.0.mlp.gate_up_proj.weight": word_digest(torch.cat(gate_up)),
            "model.norm.weight": word_digest(full["model.norm.weight"]),
        }


if __name__ == "__main__":
    whole_tensors()
    pieces_of_a_parameter()
    parameters_of_a_server()
    print("digests agree")
