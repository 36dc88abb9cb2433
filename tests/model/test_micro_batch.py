"""Micro-batches: which row of logits predicts which token, and where each example's numbers come to lie."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import make_examples

from megatron_hdpo.model.micro_batch import example_micro_batch, loss_inputs, response_micro_batch, scoring_micro_batch
from megatron_hdpo.model.packing import RowLayout
from megatron_hdpo.types.learning import Scoring

CPU = torch.device("cpu")
pairs_of = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=5)


@settings(deadline=None)
@given(pairs_of, st.integers(1, 3), st.randoms())
def test_every_row_predicts_its_token(lengths: list[tuple[int, int]], multiple: int, random) -> None:
    """Row r sees its sequence up to r; what comes next must be the sampled token, for each token of each response."""
    prompts = [np.array([random.randrange(99) for _ in range(p)], dtype=np.int32) for p, _ in lengths]
    responses = [np.array([random.randrange(99) for _ in range(r)], dtype=np.int32) for _, r in lengths]
    batch = response_micro_batch(prompts, responses, CPU, RowLayout(multiple))
    assert batch.rows_N.dtype == batch.sampled_ids_N.dtype == torch.int64
    assert batch.responses == tuple(map(len, responses))
    packed, n = batch.packed, 0
    for start, prompt, response in zip(packed.starts, prompts, responses, strict=True):
        for t, token in enumerate(response.tolist()):
            row = int(batch.rows_N[n])
            seen = packed.tokens_M[start : row + 1].tolist()
            assert seen == [*prompt.tolist(), *response[:t].tolist()]
            assert int(packed.tokens_M[row + 1]) == token == int(batch.sampled_ids_N[n])
            n += 1
    assert len(batch.rows_N) == len(batch.sampled_ids_N) == n


def test_scorings_and_examples_pack_alike() -> None:
    examples = make_examples()
    scorings = [Scoring((0, "", i, ""), e.prompt_ids, e.response_ids) for i, e in enumerate(examples)]
    first, second = example_micro_batch(examples, CPU, RowLayout(2)), scoring_micro_batch(scorings, CPU, RowLayout(2))
    assert torch.equal(first.packed.tokens_M, second.packed.tokens_M)
    assert torch.equal(first.rows_N, second.rows_N)


def test_numbers_of_examples_lie_at_their_tokens() -> None:
    examples = make_examples()
    inputs = loss_inputs(examples, CPU)
    targets = {int(row): i for i, row in enumerate(inputs.target.rows)}
    n = 0
    for example in examples:
        for t in range(len(example.response_ids)):
            assert inputs.advantages_N[n] == example.advantages_T[t]
            assert inputs.surrogate_weights_N[n] == example.surrogate_weights_T[t]
            for values, own in ((inputs.old_N, example.old_logprobs_T), (inputs.rollout_N, example.rollout_logprobs_T)):
                assert values[n].isnan() if own is None else values[n] == own[t]
            weight = 0.0 if example.distill_weights_T is None else example.distill_weights_T[t]
            assert inputs.distill_weights_N[n] == weight
            assert (n in targets) == (example.target is not None)
            if example.target is not None:
                assert inputs.target.ids_TK[targets[n]].tolist() == example.target.ids_TK[t].tolist()
                assert inputs.target.logprobs_TK[targets[n]].tolist() == example.target.logprobs_TK[t].tolist()
            n += 1
    for values in (inputs.advantages_N, inputs.old_N, inputs.rollout_N, inputs.distill_weights_N):
        assert values.shape == (n,) and values.dtype == torch.float32


def test_a_batch_without_examples_is_padding() -> None:
    batch, inputs = example_micro_batch([], CPU, RowLayout(2)), loss_inputs([], CPU)
    assert batch.packed.num_tokens == 2 and len(batch.rows_N) == 0 and batch.responses == ()
    assert inputs.target is None and inputs.advantages_N.shape == (0,)


def test_examples_without_targets_have_none() -> None:
    assert loss_inputs(make_examples()[:4], CPU).target is None
