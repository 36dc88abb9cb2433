"""A teacher may give no probability to a whole shard of the vocabulary (a mask): no NaN crosses the ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from distributed_helper import run_ranks

from megatron_hdpo.divergence import DivergenceSpec, FullLogits, divergence, head_losses, vocab_parallel_topk

KINDS = ("jsd", "forward_kl", "skew_forward", "skew_reverse")


def _logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    teacher = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    teacher[:, 16:] = -math.inf
    return student, teacher


def _on_a_rank() -> dict:
    dist.init_process_group("gloo")
    columns = slice(16 * dist.get_rank(), 16 * dist.get_rank() + 16)
    student, teacher = _logits()
    results = {"topk": vocab_parallel_topk(teacher[:, columns], 4, group=dist.group.WORLD).logprobs_TK.numpy()}
    for kind in KINDS:
        logits = student[:, columns].clone().requires_grad_()
        value = divergence(logits, FullLogits(teacher[:, columns]), DivergenceSpec(kind), group=dist.group.WORLD)
        value.sum().backward()
        results[kind] = value.detach().numpy(), logits.grad.numpy()
    dist.destroy_process_group()
    return results


def test_a_masked_shard_on_two_ranks_equals_one():
    ranks = run_ranks(2, _on_a_rank)
    student, teacher = _logits()
    torch.testing.assert_close(torch.from_numpy(ranks[0]["topk"]), teacher.log_softmax(-1).topk(4).values)
    for kind in KINDS:
        logits = student.clone().requires_grad_()
        value = divergence(logits, FullLogits(teacher), DivergenceSpec(kind))
        value.sum().backward()
        for rank, result in enumerate(ranks):
            torch.testing.assert_close(torch.from_numpy(result[kind][0]), value.detach())
            torch.testing.assert_close(torch.from_numpy(result[kind][1]), logits.grad[:, 16 * rank : 16 * rank + 16])


def test_a_second_derivative_is_refused():
    hidden = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    weight = torch.randn(32, 6, dtype=torch.float64)
    loss = head_losses(hidden, weight, torch.arange(5)).logprobs_T.sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        gradient.pow(2).sum().backward()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_the_temperature_of_a_topk_is_positive(temperature):
    with pytest.raises(ValueError, match="temperature"):
        vocab_parallel_topk(torch.randn(2, 8), 2, temperature=temperature)
