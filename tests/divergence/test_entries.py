"""Both forms of the entries of a shard: the list that a CPU has, and the mask that a device has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hdpo.divergence import (
    DivergenceSpec,
    FullLogits,
    Hidden,
    TopK,
    dense_pass,
    head_loss,
    logit_losses,
    teacher_rows,
    topk_pass,
)
from megatron_hdpo.divergence.entries import Entries, MaskedEntries, OwnedEntries
from megatron_hdpo.divergence.shard import VocabShard

TOKENS, WIDTH, K = 11, 20, 6
ROWS = torch.tensor([1, 2, 5, 6, 9])
BLOCKS = [slice(0, 3), slice(3, 8), slice(8, 11)]


def ids_of(vocab_size: int, gen: torch.Generator) -> Tensor:
    """Rows with all entries in the first shard, with padding, with nothing but padding, and over both shards."""
    ids = torch.stack([torch.randperm(vocab_size, generator=gen)[:K] for _ in ROWS])
    ids[0] = torch.arange(K)
    ids[2, 3:] = -1
    ids[4] = -1
    return ids


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("vocab_size", [40, 33])
def test_a_mask_does_what_a_list_does(rank: int, vocab_size: int) -> None:
    gen = torch.Generator().manual_seed(0)
    shard = VocabShard(None, rank, 2, WIDTH, vocab_size)
    ids, logits = ids_of(vocab_size, gen), torch.randn(TOKENS, WIDTH, generator=gen)
    values = torch.randn(len(ROWS), K, generator=gen)
    forms: list[Entries] = [OwnedEntries.find(ids, ROWS, shard), MaskedEntries.find(ids, ROWS, shard, ROWS)]
    assert torch.equal(*(form.gather(logits, torch.float32) for form in forms))

    def after(form: Entries, change: Callable[[Entries, Tensor], None], blocks: list[slice] | None) -> Tensor:
        out = logits.clone()
        parts = [(form, slice(None))] if blocks is None else list(zip(form.within(blocks), blocks, strict=True))
        for part, block in parts:
            change(part, out[block])
        return out

    for blocks in (None, BLOCKS):
        written = [after(form, lambda part, out: part.write(values, out), blocks) for form in forms]
        cleared = [after(form, lambda part, out: part.clear(out), blocks) for form in forms]
        assert torch.equal(*written) and torch.equal(*cleared)
        assert not torch.equal(written[0], logits) and not torch.equal(cleared[0], logits)


@pytest.mark.parametrize("rank", [0, 1])
def test_values_are_added_at_the_sampled_tokens(rank: int) -> None:
    shard, gen = VocabShard(None, rank, 2, WIDTH, 40), torch.Generator().manual_seed(0)
    ids, values = torch.randint(-1, 40, (TOKENS, 1), generator=gen), torch.randn(TOKENS, generator=gen)
    found = []
    for kind in (OwnedEntries, MaskedEntries):
        out = torch.zeros(TOKENS, WIDTH)
        for part, block in zip(kind.find(ids, None, shard).within(BLOCKS), BLOCKS, strict=True):
            part.add(values, out[block])
        found.append(out)
    assert torch.equal(*found) and found[0].any()


def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every pass on a CPU take the entries that a pass on a device has."""
    for module in (dense_pass, teacher_rows, topk_pass):
        monkeypatch.setattr(module, "find_entries", MaskedEntries.find)


SPECS = [DivergenceSpec("akl", tail="bucket"), DivergenceSpec(tail="bucket"), DivergenceSpec(tail="renormalise")]


@pytest.mark.parametrize(
    "spec", [*SPECS, DivergenceSpec(tail="outside", clip=0.05)], ids=lambda spec: spec.kind + spec.tail
)
def test_passes_of_a_top_k_are_the_same_on_both(spec: DivergenceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, 40, generator=gen)
    target = TopK(ids_of(40, gen), torch.randn(len(ROWS), K, generator=gen).log_softmax(-1) - 0.1, ROWS)
    assert_same(lambda z: logit_losses(z, torch.arange(TOKENS), target, spec=spec), logits, monkeypatch)


@pytest.mark.parametrize("kind", ["jsd", "akl"])
@pytest.mark.parametrize("rows", [None, ROWS])
def test_passes_of_a_whole_vocabulary_are_the_same_on_both(
    kind: Any, rows: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, 40, generator=gen)
    target = FullLogits(torch.randn(TOKENS if rows is None else len(rows), 40, generator=gen), rows)
    spec = DivergenceSpec(kind)
    assert_same(lambda z: logit_losses(z, torch.arange(TOKENS), target, spec=spec), logits, monkeypatch)


def assert_same(run: Callable[[Tensor], Any], logits: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for masks in (False, True):
        if masks:
            masked(monkeypatch)
        z = logits.clone().requires_grad_()
        losses = run(z)
        (losses.logprobs_T + losses.divergence_T + losses.entropy_T).sum().backward()
        found.append([losses.logprobs_T, losses.divergence_T, losses.student_mass_T, z.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_chunk_of_the_head_knows_its_rows_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With them a pass on a device cuts its rows into blocks without waiting."""
    gen, seen = torch.Generator().manual_seed(0), []
    real = dense_pass.rows_within
    monkeypatch.setattr(dense_pass, "rows_within", lambda rows, blocks: seen.append(rows) or real(rows, blocks))
    hidden, weight = (torch.randn(n, 8, generator=gen, requires_grad=True) for n in (TOKENS, 40))
    target = Hidden(torch.randn(len(ROWS), 8, generator=gen), torch.randn(40, 8, generator=gen), ROWS)
    loss, _ = head_loss(
        hidden, weight, torch.arange(TOKENS), lambda losses, chunk: losses.divergence_T.sum(), target, chunk=4
    )
    loss.backward()
    assert [rows.tolist() for rows in seen] == [[1, 2], [1, 2], [1]]
