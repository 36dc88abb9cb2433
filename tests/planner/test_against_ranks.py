"""Memory and communication that the planner says, against what Megatron, autograd and c10d really do on gloo ranks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from distributed_helper import run_ranks
from recorded import Collectives, Kept, build, examples
from tiny_policy import joined

from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.objectives.interface import DistillConfig, LossSpec, SurrogateConfig
from megatron_hdpo.planner.activations import in_flight, recomputed_bytes, stage_bytes
from megatron_hdpo.planner.collectives import step_collectives
from megatron_hdpo.planner.layout import Layout
from megatron_hdpo.planner.parameters import stage_parameters
from megatron_hdpo.planner.shape_of_work import PackedShape, Repeated

MODEL = Architecture("qwen2", 4, 256, 688, 8, 2, 32, 1000, 4096, 1e-6, 1e4, None, True, False, False)
TIED = dataclasses.replace(MODEL, tied=True)
QWEN3 = dataclasses.replace(MODEL, family="qwen3", qkv_bias=False, qk_norm=True)
PROMPT, RESPONSE, TOP_K, CHUNK = 24, 40, 8, 64
# Two sequences of 64 tokens fill a micro-batch.
BUDGET, EXAMPLES = 128, 8
SHAPE = PackedShape(BUDGET, PROMPT + RESPONSE, 2 * RESPONSE, 2 * RESPONSE, TOP_K)
OTHER_LOSS = DistillConfig(top_k=TOP_K, temperature=1.3, tail="bucket", kind="forward_kl")
OTHER_SHAPE = dataclasses.replace(SHAPE, two_temperatures=True, bucket=True)

# name: world, tensor, pipeline, sequence parallel, architecture, recompute, loss of the divergence, its shape
CASES: dict[str, tuple[int, int, int, bool, Architecture, bool, DistillConfig, PackedShape]] = {
    "one": (1, 1, 1, False, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
    "one_tied": (1, 1, 1, False, TIED, True, DistillConfig(top_k=TOP_K), SHAPE),
    "dp2": (2, 1, 1, False, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2": (2, 2, 1, False, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_qk_norm": (2, 2, 1, False, QWEN3, False, OTHER_LOSS, OTHER_SHAPE),
    "tp2_recompute": (2, 2, 1, False, MODEL, True, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_sp": (2, 2, 1, True, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_sp_qk_norm": (2, 2, 1, True, QWEN3, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_sp_recompute": (2, 2, 1, True, MODEL, True, DistillConfig(top_k=TOP_K), SHAPE),
    "pp2": (2, 1, 2, False, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
    "pp2_tied": (2, 1, 2, False, TIED, False, DistillConfig(top_k=TOP_K), SHAPE),
    "pp4": (4, 1, 4, False, TIED, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_pp2_sp": (4, 2, 2, True, TIED, False, DistillConfig(top_k=TOP_K), SHAPE),
    "tp2_dp2_sp": (4, 2, 1, True, MODEL, False, DistillConfig(top_k=TOP_K), SHAPE),
}


def _layout(name: str) -> Layout:
    world, tensor, pipeline, sequence, _, recompute, _, _ = CASES[name]
    return Layout(tensor, pipeline, world // tensor // pipeline, sequence, recompute, spec="torch")


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """By case, what one rank holds, keeps and sends."""
    return {name: _measure(name) for name in names}


def _measure(name: str) -> dict[str, Any]:
    _, tensor, pipeline, sequence, architecture, recompute, distill, _ = CASES[name]
    with joined(tensor, pipeline, sequence) as context:
        policy = build(architecture, context, BUDGET, CHUNK, recompute)
        spec = LossSpec(SurrogateConfig(), distill, temperature=1.0)
        own = examples(EXAMPLES, PROMPT, RESPONSE, TOP_K, architecture.vocab_size)[context.dp_rank :: context.dp_size]
        policy.update(own, spec)
        with Collectives(context) as collectives:
            policy.update(own, spec)
        [optimizer] = policy.optimizer.chained_optimizers
        states = list(optimizer.optimizer.state.values())
        weights = [buffer.param_data for buffer in policy.ddp.buffers]
        found = {
            "stage": context.groups.pp.rank(),
            "collectives": collectives.table(),
            "weights": sum(tensor.nbytes for tensor in weights),
            "parameters": sum(parameter.numel() for parameter in policy.model.parameters()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in policy.ddp.buffers),
            "moments": sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq")),
            "main": sum(t.nbytes for group in optimizer.shard_fp32_from_float16_groups for t in group if t is not None),
        }
        kept = Kept([*policy.model.parameters(), *weights])
        with kept.watching():
            policy.accumulate_gradients(own, spec)
        found |= {"peak": kept.peak, "left": kept.live}
        if pipeline == 1:
            packed = policy._training_work(own[:2], None).batch.packed
            with context.megatron_calls(), kept.watching():
                output = policy.model(
                    input_ids=packed.tokens_T[None],
                    position_ids=packed.positions_T[None],
                    attention_mask=None,
                    packed_seq_params=packed.packed_seq_params(),
                )
                found["forward"] = kept.live
            del output
        return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict[str, Any]]]:
    """By case, each rank's measurements; one world per number of ranks."""
    results: dict[str, list[dict[str, Any]]] = {}
    for world in (1, 2, 4):
        names = [name for name, case in CASES.items() if case[0] == world]
        ranks = run_ranks(world, measure, names)
        results |= {name: [rank[name] for rank in ranks] for name in names}
    return results


@pytest.mark.parametrize("name", CASES)
def test_collectives_of_a_step_are_those_of_the_plan(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Kind, group, number and bytes, on every rank, nothing more and nothing less."""
    layout, architecture, shape = _layout(name), CASES[name][4], CASES[name][7]
    work = [Repeated(shape, EXAMPLES // layout.data // 2)]
    for rank in measured[name]:
        count: Counter[tuple[str, str]] = Counter()
        size: Counter[tuple[str, str]] = Counter()
        for collective in step_collectives(architecture, layout, rank["stage"], work, CHUNK):
            key = collective.kind, collective.group
            count[key] += collective.count
            size[key] += round(collective.bytes * collective.count)
        assert {key: (count[key], size[key]) for key in count} == rank["collectives"]


@pytest.mark.parametrize("name", CASES)
def test_weights_and_gradients_are_those_of_the_plan(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Byte for byte."""
    layout, architecture = _layout(name), CASES[name][4]
    for rank in measured[name]:
        stage = stage_parameters(architecture, layout, rank["stage"])
        assert rank["parameters"] == stage.values
        assert rank["weights"] == 2 * stage.buffer_values(layout.data)
        assert rank["gradients"] == 4 * stage.buffer_values(layout.data)


@pytest.mark.parametrize("name", CASES)
def test_optimizer_shards_are_those_of_the_plan(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Byte for byte over the replicas together; each one within 5 %, padding lying with the last."""
    layout, architecture = _layout(name), CASES[name][4]
    by_stage: dict[int, list[dict[str, Any]]] = {}
    for rank in measured[name]:
        by_stage.setdefault(rank["stage"], []).append(rank)
    for stage, ranks in by_stage.items():
        values = stage_parameters(architecture, layout, stage).values
        copies = len(ranks) // layout.data
        assert sum(rank["main"] for rank in ranks) == 4 * values * copies
        assert sum(rank["moments"] for rank in ranks) == 8 * values * copies
        for rank in ranks:
            assert rank["main"] == pytest.approx(4 * values / layout.data, rel=0.05)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[2] == 1])
def test_activations_are_those_of_the_plan(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Byte for byte after one forward pass; within 5 % where layers are recomputed, whose masks and seeds are small."""
    layout, architecture, recompute = _layout(name), CASES[name][4], CASES[name][5]
    planned = stage_bytes(architecture, layout, 0, BUDGET)
    for rank in measured[name]:
        assert rank["forward"] == pytest.approx(planned, rel=0.05 if recompute else 0), rank["forward"] / planned - 1
        assert rank["left"] == 0


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_step_is_that_of_the_plan(name: str, measured: dict[str, list[dict[str, Any]]]) -> None:
    """Over all micro-batches that 1F1B holds at once, within 5 %."""
    layout, architecture = _layout(name), CASES[name][4]
    for rank in measured[name]:
        stage = rank["stage"]
        held = in_flight(layout, stage, EXAMPLES // layout.data // 2)
        planned = held * stage_bytes(architecture, layout, stage, BUDGET)
        planned += recomputed_bytes(architecture, layout, stage, BUDGET)
        assert rank["peak"] == pytest.approx(planned, rel=0.05), f"stage {stage}: {rank['peak'] / planned - 1:+.2%}"
