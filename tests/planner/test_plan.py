"""What must hold of every plan, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from _scaling_points import weak
from recipes import Tree

from megatron_hdpo import cli
from megatron_hdpo.config import parse_recipe
from megatron_hdpo.costs.activations import activation_peak, head_chunk_bytes, layer_bytes, stage_bytes
from megatron_hdpo.costs.cluster import GPUS, Cluster, cluster_of
from megatron_hdpo.costs.collectives import Collective, step_collectives
from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.memory import by_phase, engine_weights, host_bytes, resident
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.costs.parameters import (
    head_values,
    model_values,
    product_values,
    served_bytes,
    shared_matrices,
    stage_parameters,
    visited_values,
)
from megatron_hdpo.costs.workload import MODEL_ROLES, RolloutSetup, StudentScoring, TrainerMemory, Workload
from megatron_hdpo.objectives.rlcsd import RLCSDConfig
from megatron_hdpo.objectives.rlsd import RLSDConfig
from megatron_hdpo.objectives.settings import ObjectiveSettings
from megatron_hdpo.planner.asked_work import Steps, work_of
from megatron_hdpo.planner.from_recipe import Guesses, layout_of, rollouts_of, workload_of
from megatron_hdpo.planner.plan import Plan, plan, search
from megatron_hdpo.planner.shapes import SHAPES, architecture_of
from megatron_hdpo.planner.text import describe
from megatron_hdpo.planner.time import training

ROOT = Path(__file__).parents[2]
SMALL, SEVEN, LARGE = SHAPES["qwen2.5-1.5b"], SHAPES["qwen2.5-7b"], SHAPES["qwen2.5-72b"]
H100, H200 = GPUS["h100"], GPUS["h200"]
WORK = Workload(
    prompts=64,
    samples=16,
    prompt_tokens=512,
    response_tokens=2048,
    longest_response=4096,
    privileged_prompt_tokens=1024,
    cliff_rate=0.25,
    privileged_rollouts=8,
)
LEAVING: tuple[TrainerMemory, ...] = ("keep", "optimizer", "all")
LAYOUTS = [
    Layout(),
    Layout(data=8),
    Layout(pipeline=4, data=2),
    Layout(tensor=2, data=4),
    Layout(tensor=4, data=2, sequence=True),
    Layout(tensor=2, pipeline=2, data=2, sequence=True, recompute=True),
    Layout(tensor=4, pipeline=7, sequence=True, spec="torch"),
    Layout(tensor=2, context=2, data=2, sequence=True),
    Layout(pipeline=2, virtual_stages=7, data=4, overlap=True),
    Layout(tensor=2, data=4, sequence=True, fp8=True, offload=0.5, recomputed=("core_attn", "mlp")),
]
MIXTURE = SHAPES["qwen3-30b-a3b"]
SPREAD = Layout(2, 1, 4, True, expert=8)


def _plan(layout: Layout, workload: Workload = WORK, rollouts: RolloutSetup | None = None) -> Plan:
    nodes = -(-layout.world // 8)
    return plan(SEVEN, Cluster(H200, nodes), layout, workload, rollouts or RolloutSetup())


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("qwen2.5-1.5b", 1.54),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-32b", 32.8),
        ("qwen2.5-72b", 72.7),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235.1),
    ],
)
def test_the_table_has_the_models_of_the_published_sizes(name: str, billions: float) -> None:
    assert model_values(SHAPES[name]) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("architecture", [SMALL, SEVEN, LARGE])
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_parameters_are_conserved_over_stages_and_shards(architecture, stages: int) -> None:
    """Stages add up to the model, a tied embedding counted on both ends; shards of matrices to the matrices."""
    whole = stage_parameters(architecture, Layout(), 0).values
    layout = Layout(pipeline=stages)
    parts = [stage_parameters(architecture, layout, stage).values for stage in range(stages)]
    copies = head_values(architecture, 1) if architecture.tied and stages > 1 else 0
    assert sum(parts) == whole + copies
    assert [2 * m for m in shared_matrices(architecture, 2)] == list(shared_matrices(architecture, 1))


@pytest.mark.parametrize("data", [1, 2, 3, 8, 64])
def test_optimizer_states_are_conserved_over_replicas(data: int) -> None:
    layout = Layout(tensor=2, data=data)
    kinds = resident(SEVEN, layout, 0)
    values = stage_parameters(SEVEN, layout, 0).values
    assert kinds["main weights"] * data == pytest.approx(4 * values)
    assert kinds["optimizer"] * data == pytest.approx(8 * values)
    assert kinds["gradients"] == 2 * kinds["weights"] >= 4 * values


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_rollouts_ahead_hide_the_shorter_of_sampling_and_training(tree: Tree, ahead: int) -> None:
    tree["rollout"] |= {"engine": "sglang", "ahead": ahead, "sglang": {"placement": "separate", "gpus": [0]}}
    rollouts = rollouts_of(parse_recipe(tree), Guesses(rollout_gpus=1))
    made = _plan(Layout(), rollouts=rollouts)
    sampled = sum(phase.time_s for phase in made.phases if "sampling" in phase.phase)
    rest = sum(phase.time_s for phase in made.phases) - sampled
    assert made.step_s == (max(sampled, rest) if ahead else sampled + rest)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("spec", ["torch", "transformer_engine"])
def test_memory_falls_with_tensor_parallelism(sequence: bool, spec) -> None:
    """In every phase, at the same number of replicas."""
    totals = []
    for tensor in (1, 2, 4):
        layout = Layout(tensor, 2, 2, sequence and tensor > 1, spec=spec)
        phases = by_phase(SEVEN, layout, WORK, RolloutSetup("separate", gpus=8), 0.0)
        totals.append({phase: memory.total for phase, memory in phases.items() if phase != "server"})
    for wide, narrow in itertools.pairwise(totals):
        assert all(narrow[phase] < wide[phase] for phase in ("sampling", "teacher", "training", "sync"))


def test_sequence_parallelism_and_recompute_save_activations() -> None:
    plain, shape = Layout(tensor=4), PackedShape(8192, 2048, 4096)
    split = dataclasses.replace(plain, sequence=True)
    again = dataclasses.replace(split, recompute=True)
    sizes = [stage_bytes(SEVEN, layout, 0, shape) for layout in (plain, split, again)]
    assert sizes[0] > sizes[1] > 10 * sizes[2]
    # What sequence parallelism splits is exactly the part outside the tensor-parallel regions.
    own = 2 * shape.rows * (4 + 2 * SEVEN.hidden_size * 2)
    assert layer_bytes(SEVEN, plain, shape) - layer_bytes(SEVEN, split, shape) == own * 3 // 4


def test_the_heads_memory_does_not_grow_with_the_tokens() -> None:
    shapes = [PackedShape(rows, 2048, rows, rows, 64) for rows in (8192, 32768)]
    sizes = [head_chunk_bytes(SEVEN, Layout(), shape, 1024) for shape in shapes]
    assert sizes[0] == sizes[1]
    assert sizes[0] > head_chunk_bytes(SEVEN, Layout(tensor=4), shapes[0], 1024)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_times_are_never_below_the_roofline(layout: Layout) -> None:
    made = _plan(layout)
    for phase in made.phases:
        assert phase.time_s >= phase.bound_s >= 0
        assert 0 <= phase.mfu(made.cluster, made.gpus) < 0.8
    assert made.step_s == pytest.approx(sum(phase.time_s for phase in made.phases))


def test_more_replicas_never_cost_more_time_per_gpu() -> None:
    """Layout fixed: arithmetic and memory traffic of training fall with the replicas (strong), and stay (weak)."""
    layouts = [Layout(2, 2, data, True) for data in (1, 2, 4, 8, 16, 32)]
    strong = [training(SEVEN, layout, WORK, Cluster(H100, 16)) for layout in layouts]
    for fewer, more in itertools.pairwise(strong):
        assert more.arithmetic_s <= fewer.arithmetic_s and more.memory_s <= fewer.memory_s
        assert more.time_s <= fewer.time_s
    grown = [dataclasses.replace(WORK, prompts=64 * layout.data) for layout in layouts]
    weakly = [training(SEVEN, layout, work, Cluster(H100, 16)) for layout, work in zip(layouts, grown, strict=True)]
    for fewer, more in itertools.pairwise(weakly):
        assert more.arithmetic_s == pytest.approx(fewer.arithmetic_s)
        assert more.memory_s <= fewer.memory_s  # the optimizer's share shrinks
        assert more.flops == pytest.approx(2 * fewer.flops)


def test_arithmetic_is_that_of_the_textbook() -> None:
    """6 flops per parameter and token, and 6 x width x length per layer for causal attention."""
    work = dataclasses.replace(WORK, cliff_rate=0.0, prompt_tokens=1, response_tokens=2047)
    made = training(SEVEN, Layout(data=8), work, Cluster(H100, 1))
    dense = model_values(SEVEN) - SEVEN.vocab_size * SEVEN.hidden_size
    attention = SEVEN.num_layers * SEVEN.num_heads * SEVEN.head_dim * 2048
    assert made.flops == pytest.approx(6 * (dense + attention) * made.tokens, rel=1e-3)
    assert made.tokens == 64 * 16 * 2048


def test_recompute_costs_time_and_no_useful_arithmetic() -> None:
    plain = Layout(2, 2, 2, True)
    times = [
        training(SEVEN, layout, WORK, Cluster(H100, 1))
        for layout in (plain, dataclasses.replace(plain, recompute=True))
    ]
    assert times[0].flops == times[1].flops
    assert times[1].arithmetic_s / times[0].arithmetic_s == pytest.approx(4 / 3, rel=0.04)
    assert times[1].communication_s > times[0].communication_s


def test_a_mixture_shares_its_experts() -> None:
    """Twice the expert-parallel ranks: half the experts on each, whose optimizer half as many ranks share; as many
    tokens sent. The rest of the model stays."""
    few, many = dataclasses.replace(SPREAD, expert=4), SPREAD
    sizes = [stage_parameters(MIXTURE, layout, 0) for layout in (few, many)]
    rest, experts = zip(*([buffer.values for buffer in stage.buffers] for stage in sizes), strict=True)
    assert rest[0] == rest[1] and experts[0] == 2 * experts[1] == 2 * MIXTURE.num_layers * 16 * 3 * 2048 * 768
    assert sizes[0].shard_values(few) == sizes[1].shard_values(many)
    work = [Repeated(PackedShape(4096, 2048, 2048), 1)]
    made = [step_collectives(MIXTURE, layout, 0, work, 1024) for layout in (few, many)]
    sent = [sum(c.bytes * c.count for c in of if c.kind == "all_to_all") for of in made]
    # Each rank routes its half of the rows to 8 experts: values forth and back, forward and backward, and fp32 weights.
    assert sent[0] == sent[1] == 48 * 2048 * 8 * (4 * 2048 * 2 + 2 * 4)


def test_a_mixture_holds_all_experts_and_computes_with_few() -> None:
    dense = dataclasses.replace(MIXTURE, num_experts=0, ffn_size=8 * 768)
    mixed = training(MIXTURE, SPREAD, WORK, Cluster(H100, 1))
    plain = training(dense, dataclasses.replace(SPREAD, expert=1), WORK, Cluster(H100, 1))
    assert mixed.flops == pytest.approx(plain.flops, rel=0.02)  # the router's
    assert mixed.arithmetic_s > plain.arithmetic_s and mixed.memory_s > plain.memory_s
    assert mixed.communication_s > plain.communication_s


def test_context_parallelism_splits_rows_and_gathers_keys() -> None:
    one, two = Layout(data=8), Layout(data=4, context=2)
    works = [WORK.training_work(layout) for layout in (one, two)]
    assert works[0].shape.rows == 2 * works[1].shape.rows and works[1].count == 2 * works[0].count
    shape = works[1].shape
    assert stage_bytes(SEVEN, two, 0, shape) < 0.6 * stage_bytes(SEVEN, one, 0, works[0].shape)
    made = [c for c in step_collectives(SEVEN, two, 0, [works[1]], 1024) if c.group == "cp"]
    width = 2 * SEVEN.num_kv_heads * SEVEN.head_dim
    gathered = works[1].count * 28 * 2 * shape.rows * width * 2
    # Round the ring forward, and once more backward; then the gradients.
    assert [(c.kind, c.bytes * c.count) for c in made] == [("all_gather", 2 * gathered), ("reduce_scatter", gathered)]


def test_interleaving_shortens_the_bubble_and_holds_more() -> None:
    plain = Layout(pipeline=4, data=2)
    layouts = [plain, dataclasses.replace(plain, virtual_stages=7)]
    times = [training(SEVEN, layout, WORK, Cluster(H100, 1)) for layout in layouts]
    assert times[0].other_s == pytest.approx(7 * times[1].other_s, rel=0.01)
    assert times[1].communication_s > times[0].communication_s
    shape = PackedShape(8192, 2048, 4096)
    held = [activation_peak(SEVEN, layout, 0, shape, 32) for layout in layouts]
    # The warm-up's passes and one more, each of a seventh of the layers, beside four of all.
    assert held[1] / held[0] == pytest.approx((3 * 2 + 6 * 4 + 1) / 7 / 4, rel=0.01)


def test_precision_offload_and_overlap() -> None:
    plain = Layout(tensor=2, data=4, sequence=True)
    fp8, offloaded, overlapped = (
        dataclasses.replace(plain, **change) for change in ({"fp8": True}, {"offload": 1.0}, {"overlap": True})
    )
    slow, fast, host, beside = (training(SEVEN, x, WORK, Cluster(H100, 1)) for x in (plain, fp8, offloaded, overlapped))
    assert slow.arithmetic_s / 2 < fast.arithmetic_s < slow.arithmetic_s and fast.flops == slow.flops
    assert host.memory_s > slow.memory_s and host.arithmetic_s == slow.arithmetic_s
    # The same bytes in more calls, one for each bucket.
    assert 1 < (beside.communication_s + beside.hidden_s) / (slow.communication_s + slow.hidden_s) < 1.05
    assert beside.hidden_s > slow.hidden_s == 0
    kinds = [resident(SEVEN, layout, 0) for layout in (plain, fp8, offloaded)]
    assert kinds[1]["FP8 weights"] == 28 * sum(shared_matrices(SEVEN, 2)) * 2
    assert kinds[2]["optimizer"] == kinds[2]["main weights"] == 0
    assert host_bytes(SEVEN, offloaded, WORK, RolloutSetup()) == kinds[0]["optimizer"] + kinds[0]["main weights"]


def test_a_search_puts_the_optimizer_on_the_host_where_that_helps() -> None:
    assert not search(SEVEN, Cluster(H100, 1), WORK, RolloutSetup()).fitting[0].layout.offload
    found = search(SHAPES["qwen3-235b-a22b"], Cluster(H100, 32), WORK, RolloutSetup("colocated", 8))
    assert found.fitting and all(made.layout.offload == 1.0 for made in found.fitting)


def test_a_search_splits_contexts_of_long_sequences_alone() -> None:
    long = dataclasses.replace(WORK, response_tokens=30000, longest_response=32000, micro_batch_tokens=32768)
    contexts = [
        {made.layout.context for made in (*found.fitting, *found.refused)}
        for found in (search(SEVEN, Cluster(H100, 2), work, RolloutSetup()) for work in (WORK, long))
    ]
    assert contexts == [{1}, {1, 2, 4}]


def test_what_one_stage_sends_another_receives() -> None:
    layout, work = Layout(tensor=2, pipeline=4, sequence=True), [Repeated(PackedShape(2048, 1024, 512), 5)]
    made = [c for stage in range(4) for c in step_collectives(SEVEN, layout, stage, work, 128)]
    sent, received = (sum(c.bytes * c.count for c in made if c.kind == kind) for kind in ("send", "recv"))
    assert sent == received == 3 * 2 * 5 * (2048 // 2 * SEVEN.hidden_size * 2)


def test_links_between_nodes_are_slower_and_larger_groups_take_longer() -> None:
    cluster = Cluster(H100, 8)
    sizes = [Layout(data=data) for data in (2, 4, 8, 16, 64)]
    seconds = [Collective("reduce_scatter", "dp_cp", 1e9, 1, "").seconds(layout, cluster) for layout in sizes]
    assert seconds == sorted(seconds) and seconds[3] > 5 * seconds[2]
    spread = [Layout(data=64, expert=ranks) for ranks in (8, 16, 64)]
    routed = [Collective("all_to_all", "ep", 1e9, 1, "").seconds(layout, cluster) for layout in spread]
    # Within a node, half of it, an eighth of it.
    far = 1e9 / cluster.link(64)[0]
    assert routed[0] < 0.2 * far and routed[1] == pytest.approx(far / 2 + routed[0] / 2, rel=0.01)
    assert routed[2] == pytest.approx(far * 7 / 8 + routed[0] / 8, rel=0.02)
    both = [Collective(kind, "dp_cp", 1e9, 1, "").seconds(sizes[2], cluster) for kind in ("all_reduce", "all_gather")]
    assert both[0] == pytest.approx(2 * both[1])


def test_sampling_is_no_faster_than_its_longest_response() -> None:
    """Ten times the GPUs do not help a batch that waits for one long response."""
    made = [_plan(Layout(data=data)).phases[0] for data in (64, 640)]
    assert made[1].other_s == made[0].other_s
    longer = dataclasses.replace(WORK, longest_response=8192)
    assert _plan(Layout(data=640), longer).phases[0].time_s > 1.9 * made[1].time_s


def test_no_privileged_work_without_cliffs_or_teacher() -> None:
    for work in (dataclasses.replace(WORK, cliff_rate=0.0), dataclasses.replace(WORK, teacher="none")):
        times = {phase.phase: phase.time_s for phase in _plan(Layout(data=8), work).phases}
        assert times["privileged sampling"] == times["teacher"] == 0 < times["training"]
    without = dataclasses.replace(WORK, scored_by_trainer=False)
    assert _plan(Layout(data=8), without).phases[2].time_s == 0


def test_an_embedded_engine_holds_a_whole_model_on_every_gpu_in_every_phase() -> None:
    made = _plan(Layout(tensor=4, data=2, sequence=True), rollouts=RolloutSetup("embedded", max_concurrency=4))
    for phase in ("sampling", "teacher", "training", "sync"):
        assert made.memory[phase].kinds["engine weights"] == 2 * model_values(SEVEN)
    saved = _plan(Layout(tensor=4, data=2, sequence=True), rollouts=RolloutSetup("colocated", saver=True))
    assert "engine weights" not in saved.memory["training"].kinds


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-1.5b", "qwen3-30b-a3b"])
def test_fp8_servers_hold_and_read_a_byte_per_value_of_a_layers_matrix(name: str) -> None:
    a = SHAPES[name]
    plain, quantized = (RolloutSetup("separate", gpus=8, fp8=fp8) for fp8 in (False, True))
    matrices = a.num_layers * product_values(a, Layout())
    assert engine_weights(a, plain) - engine_weights(a, quantized) == matrices
    every = visited_values(a, 1e9)  # each expert is visited
    assert served_bytes(a, every, False) - served_bytes(a, every, True) == pytest.approx(matrices)
    times = [plan(a, Cluster(H100, 2), Layout(data=8), WORK, r).phases[0].memory_s for r in (plain, quantized)]
    assert 0.5 < times[1] / times[0] < 0.95


def test_teachers_rest_on_the_host() -> None:
    sizes = [
        host_bytes(SEVEN, Layout(), dataclasses.replace(WORK, teacher=t), RolloutSetup())
        for t in ("policy", "frozen", "ema")
    ]
    values = stage_parameters(SEVEN, Layout(), 0).values
    assert sizes == [0, 4 * values, 8 * values]
    swapped = _plan(Layout(data=8), dataclasses.replace(WORK, teacher="frozen")).phases[2]
    assert swapped.time_s > _plan(Layout(data=8)).phases[2].time_s


def test_an_external_teacher_is_planned_with_its_own_model(tree: Tree) -> None:
    """Its weights come to the GPU beside the policy's and do not go back; they rest on the host in one copy."""
    work = dataclasses.replace(WORK, teacher="external", teacher_model=LARGE)
    layout = Layout(tensor=4, pipeline=2, sequence=True)
    own, other = _plan(layout), _plan(layout, work)
    teacher = stage_parameters(LARGE, layout, 0).values
    assert other.memory["teacher"].kinds["teacher weights"] >= 2 * teacher
    assert "teacher weights" not in own.memory["teacher"].kinds
    assert other.host_bytes - own.host_bytes >= 2 * teacher
    assert other.phases[2].flops > 3 * own.phases[2].flops
    assert other.phases[-2] == own.phases[-2]  # training
    equal = _plan(layout, dataclasses.replace(work, teacher_model=SEVEN))
    assert equal.memory["teacher"].kinds["teacher weights"] >= 2 * stage_parameters(SEVEN, layout, 0).values
    layout = Layout(tensor=4, sequence=True)
    full = _plan(layout, dataclasses.replace(work, full=True, top_k=0)).memory["training"].kinds
    assert full["teacher's head"] == 2 * LARGE.hidden_size * SEVEN.padded_vocab_size(4) // 4
    with pytest.raises(PlanError, match="does not divide"):
        _plan(Layout(data=1, pipeline=7), dataclasses.replace(work, teacher_model=SHAPES["qwen2.5-32b"]))
    read = _work(tree, {"name": "opd"}, teacher={"kind": "external", "path": "qwen2.5-72b"})
    assert read.teacher_model == SHAPES["qwen2.5-72b"]


def test_what_does_not_fit_says_where_and_why() -> None:
    made = plan(LARGE, Cluster(H100, 1), Layout(8, 1, 1, True), WORK, RolloutSetup("colocated", 8))
    assert not made.fits
    assert any(line.startswith("training: ") and "too many (" in line for line in made.refusals)
    assert "optimizer" in made.refusals[0] and "74.5" in made.refusals[0]


def test_what_leaves_the_gpus_for_the_servers_is_their_cache() -> None:
    layout = Layout(tensor=4, data=2, sequence=True)
    made = {what: _plan(layout, rollouts=RolloutSetup("colocated", 4, trainer_memory=what)) for what in LEAVING}
    base = resident(SEVEN, layout, 0)
    state = {"optimizer": base["main weights"] + base["optimizer"]}
    state["all"] = state["optimizer"] + base["weights"]
    for what, moved in state.items():
        phases, stays = made[what].memory, made["keep"].memory
        assert made[what].host_bytes == moved + made["keep"].host_bytes
        assert phases["training"] == stays["training"] and phases["teacher"] == stays["teacher"]
        gone = sum(stays["sampling"].kinds[kind] for kind in stays["sampling"].kinds.keys() - phases["sampling"].kinds)
        assert gone == moved + base["gradients"]
        seconds = {p.phase: p.time_s - q.time_s for p, q in zip(made[what].phases, made["keep"].phases, strict=True)}
        assert seconds["sync"] > 0 and sum(seconds.values()) == pytest.approx(seconds["sync"])
    sync = made["all"].memory["sync"].kinds
    assert sync["weights"] == base["weights"] and "key-value cache" not in sync, "weights leave before it comes"
    assert "key-value cache" in made["optimizer"].memory["sync"].kinds


def test_a_mixture_whose_state_leaves_fits_half_of_the_gpus() -> None:
    """Qwen3-235B on 128 H100: 55 GiB of each GPU are a server's weights."""
    a, layout = SHAPES["qwen3-235b-a22b"], Layout(4, 2, 16, True, expert=32, overlap=True, offload=1.0)
    plans = {
        what: plan(a, Cluster(H100, 16), layout, WORK, RolloutSetup("colocated", 8, trainer_memory=what))
        for what in LEAVING
    }
    assert not plans["keep"].fits and plans["all"].fits
    assert any(line.startswith("sampling: ") for line in plans["keep"].refusals)


def test_only_servers_that_give_way_make_the_trainer_leave() -> None:
    for wrong in ({"engine": "embedded"}, {"saver": False}):
        with pytest.raises(PlanError, match="leaves only GPUs of colocated servers"):
            RolloutSetup(trainer_memory="all", **wrong)  # type: ignore[arg-type]


def test_the_search_ranks_what_fits_and_nothing_else() -> None:
    found = search(SEVEN, Cluster(H100, 2), WORK, RolloutSetup())
    assert found.fitting and found.refused
    steps = [made.step_s for made in found.fitting]
    assert steps == sorted(steps)
    for made in found.fitting:
        assert all(memory.total <= H100.memory for memory in made.memory.values()) and made.layout.world == 16
    assert all(made.refusals for made in found.refused)


@pytest.mark.parametrize(("name", "billions"), [("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.2)])
def test_a_token_visits_as_many_parameters_as_the_models_name_says(name: str, billions: float) -> None:
    """Embedding included, as their authors count; many tokens visit everything."""
    a = SHAPES[name]
    embedding = a.vocab_size * a.hidden_size
    assert (visited_values(a, 1) + embedding) / 1e9 == pytest.approx(billions, rel=0.02)
    assert visited_values(a, 1e4) == pytest.approx(model_values(a) - embedding, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"architectures": ["GPT2LMHeadModel"]}', "not supported"),
        ("{", "not JSON"),
    ],
)
def test_folders_that_cannot_be_planned_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError, match=says):
        architecture_of(str(tmp_path))


def test_inputs_that_cannot_be_are_refused() -> None:
    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: architecture_of("no/such/model"), "neither a folder"),
        (lambda: cluster_of("b200", 1), "known: h100, h200"),
        (lambda: cluster_of("h100", 0), "at least one"),
        (lambda: RolloutSetup("separate"), "--rollout-gpus"),
        (lambda: RolloutSetup("embedded", 2), "no tensor parallelism"),
        (lambda: dataclasses.replace(WORK, micro_batch_tokens=1024), "cannot hold one sequence"),
        (lambda: dataclasses.replace(WORK, cliff_rate=0.8, solved_rate=0.4), "at most 1"),
        (lambda: dataclasses.replace(WORK, privileged_success=2.0), "share from 0 to 1"),
        (lambda: dataclasses.replace(WORK, prompt_tokens=-4), "prompt tokens: -4, at least 1"),
        (lambda: dataclasses.replace(WORK, prompts=0), "prompts: 0, at least 1"),
        (lambda: _plan(Layout(tensor=8)), "parallel.tensor=8 does not divide"),
        (lambda: _plan(Layout(pipeline=3)), "parallel.pipeline=3 does not divide"),
        (lambda: plan(SEVEN, Cluster(H100, 1), Layout(data=16), WORK, RolloutSetup()), "more than the cluster's 8"),
    ]
    for make, says in refused:
        with pytest.raises(PlanError, match=says):
            make()


def test_a_recipe_is_read(tree: Tree) -> None:
    train = tree["train"] | {"head_chunk": 7}
    recipe = parse_recipe(
        tree | {"model": tree["model"] | {"dtype": "bfloat16"}, "parallel": {"tensor": 2}, "train": train}
    )
    work = workload_of(recipe, Guesses(cliff_rate=0.5, response_tokens=3))
    assert (work.head_chunk, work.micro_batch_tokens) == (7, train["micro_batch_tokens"])
    rollout = tree["rollout"]
    assert (work.prompts, work.samples) == (rollout["prompts_per_step"], rollout["samples_per_prompt"])
    assert (work.response_tokens, work.longest_response) == (3, rollout["max_new_tokens"])
    assert work.privileged_prompts == 0.5 * work.prompts and work.teacher == "policy"
    assert rollouts_of(recipe, Guesses()).engine == "embedded"
    assert layout_of(recipe, 8) == Layout(2, 1, 4, spec=layout_of(recipe, 8).spec, overlap=True)
    with pytest.raises(PlanError, match="not a multiple"):
        layout_of(recipe, 3)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", {"dtype": "float32"}, "model.dtype=float32"),
        ("teacher", {"kind": "external", "path": "no/such/teacher"}, "neither a folder"),
    ],
)
def test_recipes_that_are_not_planned_yet_say_so(tree: Tree, key: str, value: Tree, says: str) -> None:
    tree = tree | {"model": tree["model"] | {"dtype": "bfloat16"}}
    with pytest.raises(PlanError, match=says):
        workload_of(parse_recipe(tree | {key: tree.get(key, {}) | value}), Guesses())


def test_an_objective_that_is_not_registered_is_an_error() -> None:
    with pytest.raises(KeyError, match="OwnConfig"):
        work_of(type("OwnConfig", (ObjectiveSettings,), {})(), _steps(samples=4))


def test_wrong_rollouts_have_fewer_wrong_siblings() -> None:
    """RLCSD, 8 rollouts of which 4 are right, up to 4 wrong hints: 1 + 4 prompts for a right one, 1 + 3 for a wrong."""
    (scoring,) = work_of(RLCSDConfig(), _steps(samples=8, cliff_rate=0.0, solved_rate=0.0))["student_scorings"]
    assert scoring == StudentScoring("teacher", 4.5, 200)


def test_evidence_is_planned_although_the_last_steps_need_none() -> None:
    """RLSD's share of the evidence falls to 0 in 50 steps."""
    for count in (10, 500):
        asked = {s.role: s.per_rollout for s in work_of(RLSDConfig(), _steps(count=count))["student_scorings"]}
        assert asked == {"policy": 0.625, "teacher": 0.625}


def _steps(**fields: float) -> Steps:
    whole = {"count": 10, "updates": 1, "samples": 4, "prompt": 100, "privileged": 200, "cliff_rate": 0.25}
    return Steps(**(whole | {"solved_rate": 0.125} | fields))  # type: ignore[arg-type]


def _work(tree: Tree, objective: Tree, **sections: Tree) -> Workload:
    whole = tree | {"model": tree["model"] | {"dtype": "bfloat16"}, "objective": objective} | sections
    return workload_of(
        parse_recipe(whole), Guesses(cliff_rate=0.25, solved_rate=0.125, prompt_tokens=10, response_tokens=4)
    )


@pytest.mark.parametrize(
    ("objective", "teacher", "updates", "trained", "scored"),
    [
        ({"name": "grpo"}, "policy", 1, 10, {}),
        ({"name": "grpo"}, "policy", 2, 10, {"policy": 16}),
        ({"name": "grpo", "kl": {"coefficient": 0.1}}, "policy", 1, 16, {"reference": 16}),
        (
            {"name": "rlcsd", "kl": {"coefficient": 0.1}},
            "policy",
            2,
            10,
            {"policy": 10, "reference": 10, "teacher": 25},
        ),
        ({"name": "hdpo", "distill": {"coefficient": 0.0}}, "policy", 1, 10, {}),
        ({"name": "hdpo"}, "policy", 1, 26, {"teacher": 16}),
        ({"name": "hdpo", "distill": {"support": "full"}}, "policy", 1, 26, {"teacher": 16}),
        ({"name": "hdpo", "distill": {"support": "student"}}, "policy", 1, 26, {"policy": 16, "teacher": 16}),
        ({"name": "opd"}, "frozen", 1, 16, {"policy": 16, "teacher": 16}),
        ({"name": "opd", "estimator": "full"}, "frozen", 1, 16, {"teacher": 16}),
        ({"name": "vopd"}, "frozen", 1, 16, {"policy": 16, "teacher": 16}),
        ({"name": "opsd", "distill": {"support": "teacher"}}, "frozen", 1, 16, {"teacher": 16}),
        ({"name": "sdpo"}, "ema", 1, 12, {"policy": 12, "teacher": 12}),
        ({"name": "rlsd"}, "policy", 1, 10, {"policy": 10, "teacher": 10}),
        ({"name": "contrastive_opsd"}, "frozen", 1, 10, {"teacher": 20}),
        ({"name": "akl"}, "frozen", 1, 16, {"teacher": 16}),
        ({"name": "akl", "tokens": "teacher"}, "frozen", 1, 128, {"teacher": 128}),
        ({"name": "srpo"}, "policy", 1, 10, {"policy": 5, "teacher": 5}),
        ({"name": "srpo", "distill": {"support": "teacher"}}, "policy", 2, 10, {"policy": 16, "teacher": 5}),
        ({"name": "paced"}, "frozen", 1, 40, {"teacher": 40}),
        ({"name": "paced", "switch_step": 0}, "frozen", 1, 10, {"teacher": 10}),
    ],
)
def test_methods_are_read(tree: Tree, objective: Tree, teacher: str, updates: int, trained: int, scored: Tree) -> None:
    """16 rollouts: 4 groups of 4, of which one is a cliff and half a one solved; 32 privileged rollouts of a prompt,
    half of them right. What others than the teacher read before the update is scored by them first."""
    prompts = tree["data"]["prompts"] | {"hint": "{{ attempt }}#{{ answer }}#{{ feedback }}#{{ question }}"}
    sections = {"teacher": {"kind": teacher}, "data": tree["data"] | {"prompts": prompts}}
    work = _work(tree, objective, train=tree["train"] | {"updates_per_step": updates}, **sections)
    work = dataclasses.replace(work, privileged_rollouts=32 if work.privileged_rollouts else 0)
    assert work.trained_sequences == trained
    assert {weights: work.scored(weights)[0] for weights in MODEL_ROLES if work.scored(weights)[0]} == scored
    made = _plan(Layout(data=8), work)
    names = {"policy": "score", "teacher": "teacher", "reference": "reference"}
    assert {phase.phase for phase in made.phases if phase.phase in names.values() and phase.time_s} == {
        names[weights] for weights in scored
    }


def test_the_command_prints_the_plan(tree: Tree, write_recipe, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_recipe(tree)
    cli.main(["plan", str(path), "model.dtype=bfloat16", "--model", "qwen2.5-7b", "--gpu", "h200", "--nodes", "2"])
    out = capsys.readouterr().out
    assert "DP 16 on 16 h200" in out and "key-value cache" in out and "privileged sampling" in out
    assert "reduce_scatter" in out and "layouts fit" in out and "checkpoint of " in out


def test_auto_is_planned_as_bfloat16(tree: Tree, write_recipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever this machine's CPU is good at: the plan is for GPUs."""
    plans = []
    for dtype in ("auto", "bfloat16"):
        cli.main(["plan", str(write_recipe(tree)), f"model.dtype={dtype}", "--model", "qwen2.5-1.5b", "--nodes", "1"])
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1] and "DP 8" in plans[0]


def test_a_small_model_on_many_ranks_waits_for_the_host() -> None:
    """Split over eight ranks, one sequence's kernels are shorter than their launches; not on one rank."""
    work = dataclasses.replace(WORK, prompt_tokens=256, response_tokens=1024, micro_batch_tokens=1280)
    small = dataclasses.replace(SMALL, num_heads=64, num_kv_heads=8)
    for tensor, waits in ((8, True), (1, False)):
        layout = Layout(tensor=tensor, data=8 // tensor, sequence=tensor > 1)
        made = plan(small, Cluster(H100, 1), layout, work, RolloutSetup())
        trained = next(phase for phase in made.phases if phase.phase == "training")
        batch = trained.micro_batch
        assert (trained.host_s > 0) == (batch.host_s > batch.gpu_s) == waits
        assert batch.time_s == max(batch.host_s, batch.gpu_s)
        assert ("training: the host is the limit" in describe(made)) == waits


def test_the_figures_are_those_of_this_planner() -> None:
    """benchmarks/scaling.json was made by the command that it names, with the planner as it is."""
    study = json.loads((ROOT / "benchmarks" / "scaling.json").read_text())
    options = study["options"]
    names = {field.name for field in dataclasses.fields(Workload)} & set(options)
    work = Workload(prompts=study["prompts"]["weak, per GPU"], **{name: options[name] for name in names})
    (point,) = weak(SEVEN, GPUS[options["gpu"]], [64], work, RolloutSetup("colocated"))
    assert point.row() == next(row for row in study["weak"]["qwen2.5-7b"] if row["gpus"] == 64)
    assert study["command"].startswith("python tools/scaling_study.py scaling")
    assert set(study["weak"]) == set(study["strong"]) == set(SHAPES)
