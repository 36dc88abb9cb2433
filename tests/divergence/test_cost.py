"""Costs of a pass: number and size of collectives, no communication in the backward, memory."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from divergence_ranks import Ranks

from megatron_hdpo.divergence import (
    DivergenceSpec,
    FullLogits,
    TopK,
    divergence,
    head_loss,
    logit_losses,
    vocab_parallel_topk,
)

Calls = list[tuple[str, int]]


class Counter:
    """Records (collective, numbers) of every call that a rank makes."""

    def __enter__(self) -> Calls:
        calls: Calls = []

        def watch(name: str) -> Any:
            original = getattr(dist, name)

            def wrapped(*arguments: Any, **options: Any) -> Any:
                tensor = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[1]
                calls.append((name, tensor.numel()))
                return original(*arguments, **options)

            return mock.patch.object(dist, name, wrapped)

        self.patches = [watch(name) for name in ("all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast")]
        for patch in self.patches:
            patch.start()
        return calls

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def count(group: Any, rank: int, size: int, what: str, tokens: int) -> tuple[Calls, Calls]:
    """Collectives of a forward and of its backward."""
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 8, generator=gen).requires_grad_()
    ids, k = torch.zeros(tokens, dtype=torch.int64), 3
    topk = TopK(torch.arange(k).repeat(tokens, 1), torch.full((tokens, k), -2.0))
    with Counter() as forward:
        if what == "topk":
            vocab_parallel_topk(logits, k, group)
            return list(forward), []
        if what == "head":
            hidden, head = torch.randn(tokens, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
            loss, _ = head_loss(
                hidden, head, ids, lambda losses, _: losses.divergence_T.sum(), topk, chunk=2, group=group
            )
        elif what == "full":
            loss = logit_losses(logits, ids, FullLogits(logits.detach()), group=group).divergence_T.sum()
        else:
            spec = DivergenceSpec(tail="bucket")
            losses = logit_losses(logits, ids, topk, spec=spec, group=group, temperature=0.5)
            loss = losses.logprobs_T.sum() + losses.entropy_T.sum() + losses.divergence_T.sum()
    with Counter() as backward:
        loss.backward()
    return forward, backward


@pytest.mark.parametrize("tokens", [6, 0])
def test_collectives_of_each_pass(ranks: Ranks, tokens: int) -> None:
    """The numbers of docs/divergence.md; a rank without tokens joins the same collectives."""
    for forward, backward in ranks.run(2, count, "losses", tokens):
        assert forward == [("all_reduce", tokens), ("all_reduce", tokens * (5 + 3))]
        assert not backward
    for forward, backward in ranks.run(2, count, "full", tokens):
        assert forward == [("all_reduce", 2 * tokens), ("all_reduce", 5 * tokens), ("all_reduce", 6 * tokens)]
        assert not backward
    for forward, _ in ranks.run(2, count, "topk", tokens):
        assert forward == [("all_gather", tokens * (2 * 3 + 2))]


def test_collectives_of_the_head(ranks: Ranks) -> None:
    """Two per chunk of two tokens, and one for the gradient of the hidden states."""
    for forward, backward in ranks.run(2, count, "head", 6):
        assert forward == [("all_reduce", 2), ("all_reduce", 2 * (3 + 3))] * 3 + [("all_reduce", 6 * 4)]
        assert not backward


def peak_bytes(step: Any) -> int:
    """Largest sum of live allocations during a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


class AsOutput(torch.autograd.Function):
    """Storage as if a layer had just made it."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None]:
        return None, None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_place_gradient_needs_a_twentieth_of_the_logits(dtype: torch.dtype) -> None:
    logits = torch.randn(1024, 32768).to(dtype)
    topk = TopK(torch.arange(64).repeat(1024, 1), torch.full((1024, 64), -5.0))
    anchor = torch.zeros((), requires_grad=True)

    def step() -> None:
        divergence(AsOutput.apply(anchor, logits), topk, inplace_backward=True).sum().backward()

    before = logits.clone()
    extra = peak_bytes(step)
    assert not torch.equal(before, logits), "the gradient did not go into the logits' storage"
    assert extra <= 0.05 * logits.nbytes, f"{extra / 2**20:.1f} MiB"


def test_chunked_head_needs_a_tenth_of_the_logits() -> None:
    """The gradients that are returned do not count."""
    tokens, vocab, hidden = 2048, 8192, 16
    states, head = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=True)
    topk = TopK(torch.arange(8).repeat(tokens, 1), torch.full((tokens, 8), -5.0))
    ids = torch.zeros(tokens, dtype=torch.int64)

    def step() -> None:
        head_loss(states, head, ids, lambda losses, _: losses.divergence_T.sum(), topk, chunk=64)[0].backward()

    extra = peak_bytes(step) - 4 * hidden * (tokens + vocab)
    assert extra <= 0.1 * tokens * vocab * 4
