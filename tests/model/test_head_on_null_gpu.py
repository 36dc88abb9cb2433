"""Head, inputs, scores and teachers on a device without arithmetic: who waits, what is copied, what stays in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from host_waits import host_waits
from null_gpu import needs_null_gpu, on_null_gpu

from megatron_hdpo.model.build import build_model, wrap_data_parallel
from megatron_hdpo.model.config import ModelConfig, OptimizerConfig
from megatron_hdpo.model.loss import TokenCounts, micro_batch_loss
from megatron_hdpo.model.micro_batch import example_micro_batch, loss_inputs
from megatron_hdpo.model.optimizer import build_optimizer
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel.context import start
from megatron_hdpo.parallel.layout import ParallelConfig
from megatron_hdpo.planner.shapes import SHAPES
from megatron_hdpo.teachers.config import EmaTeacherConfig
from megatron_hdpo.teachers.weight_copies import EmaTeacher, FrozenTeacher
from megatron_hdpo.types.learning import DivergenceConfig, Example, HiddenOnHost, LossSpec, Scoring, SurrogateConfig
from megatron_hdpo.types.rollouts import TopKArrays

ARCHITECTURE = replace(SHAPES["qwen2.5-1.5b"], num_layers=2, tied=False)
PROMPT, RESPONSE, K, CHUNK = 100, 1500, 64, 512
BUDGET = 2 * (PROMPT + RESPONSE)
SPEC = LossSpec(SurrogateConfig(), DivergenceConfig(top_k=K), temperature=1.0)


def examples(count: int, targets: bool) -> list[Example]:
    """Equal examples; with targets, every second one has them: a micro-batch's targets are not all of its tokens."""
    rng, ones = np.random.default_rng(0), np.ones(RESPONSE, np.float32)
    ids = np.sort(rng.integers(0, ARCHITECTURE.vocab_size, (RESPONSE, K)), axis=-1).astype(np.int32)
    top = TopKArrays(ids, np.full((RESPONSE, K), -5.0, np.float32))
    one = Example(
        prompt_ids=rng.integers(0, ARCHITECTURE.vocab_size, PROMPT).astype(np.int32),
        response_ids=rng.integers(0, ARCHITECTURE.vocab_size, RESPONSE).astype(np.int32),
        advantages_T=ones,
        surrogate_weights_T=ones,
        surrogate_count=float(RESPONSE),
        rollout_logprobs_T=-ones,
    )
    aimed = replace(one, distill_weights_T=ones, distill_count=float(RESPONSE), target=top)
    return [aimed if targets and i % 2 else one for i in range(count)]


def measure(gpu: Any) -> dict[str, Any]:
    """Everything in one process, whose start costs most."""
    context = start(ParallelConfig(), "cuda")
    found = {"head": {str(targets): _head(gpu, targets) for targets in (False, True)}}
    found["other targets"] = {name: _other_target(gpu, name) for name in ("akl", "full", "full akl")}
    model = ModelConfig(path="", dtype="bfloat16", spec="torch")
    ddp = wrap_data_parallel(build_model(ARCHITECTURE, context, model), context)
    optimizer = build_optimizer(OptimizerConfig(), ddp, context, 10)
    policy = Policy(ARCHITECTURE, context, ddp, BUDGET, *optimizer, head_chunk=CHUNK)
    return found | {"update": _update(gpu, policy), "score": _score(gpu, policy), "teachers": _teachers(gpu, policy)}


def _head(gpu: Any, targets: bool) -> dict[str, Any]:
    """Launches per chunk, waits, and the matrix products of the head alone; the second turn is measured."""
    device, hidden_size = torch.device("cuda", 0), ARCHITECTURE.hidden_size
    head_VH = torch.empty(ARCHITECTURE.vocab_size, hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
    groups: Any = SimpleNamespace(tp=None, cp=None)
    launches = []
    for count in (2, 2, 6):
        own = examples(count, targets)
        hidden_NH = torch.empty(count * RESPONSE, hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
        with host_waits() as places, gpu.counted():
            batch, inputs = example_micro_batch(own, device), loss_inputs(own, device)
            counts = TokenCounts(1e4, 1e4)
            micro_batch_loss(hidden_NH, head_VH, batch, inputs, SPEC, counts, groups, ARCHITECTURE.vocab_size, CHUNK)
        launches.append(gpu.total("K"))
    chunks = [-(-count * RESPONSE // CHUNK) for count in (2, 6)]
    copies = [count for count in gpu.counts() if count.kind == "H"]
    return {
        "per chunk": (launches[2] - launches[1]) / (chunks[1] - chunks[0]),
        "waits": dict(places),
        "device waits": gpu.total("S"),
        "copies": sum(count.times for count in copies),
        "pageable": sum(count.times for count in copies if count.b),
        "products": [[count.name, count.times] for count in gpu.counts() if count.kind == "G"],
        "chunks": chunks[1],
    }


def _other_target(gpu: Any, name: str) -> dict[str, Any]:
    """Waits of a micro-batch whose targets no Triton kernel takes; the second turn is measured."""
    device, size = torch.device("cuda", 0), ARCHITECTURE.hidden_size
    heads = [torch.empty(ARCHITECTURE.vocab_size, size, dtype=torch.bfloat16, device=device) for _ in range(2)]
    own = examples(2, targets=True)
    if name.startswith("full"):
        hidden = HiddenOnHost(torch.zeros(RESPONSE, size, dtype=torch.bfloat16))
        own = [e if e.target is None else replace(e, target=hidden) for e in own]
    kind, tail = ("akl", "bucket") if name.endswith("akl") else ("jsd", "outside")
    spec = LossSpec(SurrogateConfig(), DivergenceConfig(top_k=K, kind=kind, tail=tail), temperature=1.0)
    groups: Any = SimpleNamespace(tp=None, cp=None)
    for _ in range(2):
        hidden_NH = torch.empty(2 * RESPONSE, size, dtype=torch.bfloat16, device=device, requires_grad=True)
        with host_waits() as places, gpu.counted():
            batch, inputs = example_micro_batch(own, device), loss_inputs(own, device, heads[1])
            head = heads[0].requires_grad_()
            counts = TokenCounts(1e4, 1e4)
            micro_batch_loss(hidden_NH, head, batch, inputs, spec, counts, groups, ARCHITECTURE.vocab_size, CHUNK)
    return {"waits": dict(places), "device waits": gpu.total("S"), "products": gpu.total("G")}


def _update(gpu: Any, policy: Policy) -> dict[str, Any]:
    """Waits of an update by place, pageable copies, and the peak of memory with few and with many micro-batches."""
    peaks = []
    for count in (4, 4, 24):
        own = examples(count, targets=True)
        torch.cuda.reset_peak_memory_stats()
        with host_waits() as places, gpu.counted():
            policy.accumulate_gradients(own, SPEC)
        peaks.append(torch.cuda.max_memory_allocated())
    pageable = sum(count.times for count in gpu.counts() if count.kind == "H" and count.b)
    return {"waits": dict(places), "peaks": peaks[1:], "pageable": pageable}


def _score(gpu: Any, policy: Policy) -> dict[str, Any]:
    scorings = [
        Scoring((0, "student", i, ""), e.prompt_ids, e.response_ids, top_k=K, hidden=True)
        for i, e in enumerate(examples(6, targets=False))
    ]
    with host_waits() as places, gpu.counted():
        scores = policy.score(scorings)
    pageable = sum(count.times for count in gpu.counts() if count.kind in "HD" and count.b)
    shapes = {tuple(score.hidden_TH.shape) for score in scores.values()}
    return {
        "waits": dict(places),
        "device waits": gpu.total("S"),
        "pageable": pageable,
        "scores": len(scores),
        "hidden": sorted(shapes),
    }


def _teachers(gpu: Any, policy: Policy) -> dict[str, Any]:
    """Pinned bytes of each teacher, as multiples of the weights (bfloat16), and what a scoring and a tick copy."""
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())

    def pinned(work: Callable[[], Any]) -> float:
        before = gpu.num_bytes("pinned")
        work()
        return (gpu.num_bytes("pinned") - before) / weights

    teachers: list[Any] = []

    def scored(teacher: FrozenTeacher) -> None:
        with teacher.scorer():
            pass

    found: dict[str, Any] = {"frozen": pinned(lambda: teachers.append(FrozenTeacher(policy)))}
    found["frozen while it scores"] = pinned(lambda: scored(teachers[0]))
    config = EmaTeacherConfig(kind="ema", clock="optimizer_step")
    found["ema"] = pinned(lambda: teachers.append(EmaTeacher(policy, config)))
    with gpu.counted(), host_waits() as places:
        found["ema's tick"] = pinned(teachers[1].after_update)
    found |= {"waits of a tick": gpu.total("S"), "places": dict(places), "pageable": _pageable(gpu)}
    scored(teachers[1])
    with gpu.counted():
        found["ema's second scoring"] = pinned(lambda: scored(teachers[1]))
    found["pageable of a scoring"] = _pageable(gpu)
    found["left"] = pinned(teachers.clear)
    return found


def _pageable(gpu: Any) -> int:
    return sum(count.times for count in gpu.counts() if count.kind in "HD" and count.b)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return on_null_gpu(measure, world=1)


@pytest.mark.long
@needs_null_gpu
class TestOnNullGpu:
    """One process measures all of it."""

    def test_the_head_does_not_wait_and_copies_little(self, measured: dict[str, Any]) -> None:
        for targets, copies in (("False", 2), ("True", 5)):
            found = measured["head"][targets]
            assert found["waits"] == {} and found["device waits"] == 0
            assert found["pageable"] == 0 and found["copies"] <= copies

    def test_a_chunk_needs_three_products_and_few_other_kernels(self, measured: dict[str, Any]) -> None:
        for targets, most in (("False", 45), ("True", 60)):
            found = measured["head"][targets]
            assert found["per chunk"] <= most
            assert sum(times for _, times in found["products"]) == 3 * found["chunks"]

    @pytest.mark.parametrize("name", ["akl", "full", "full akl"])
    def test_other_targets_do_not_wait_either(self, measured: dict[str, Any], name: str) -> None:
        found = measured["other targets"][name]
        assert found["waits"] == {} and found["device waits"] == 0 and found["products"] > 0

    def test_an_update_waits_nowhere_in_head_and_inputs(self, measured: dict[str, Any]) -> None:
        ours = [f"megatron_hdpo/{name}" for name in ("divergence/", "model/micro_batch", "model/loss", "types/")]
        assert not [place for place in measured["update"]["waits"] if place.startswith(tuple(ours))]
        assert measured["update"]["pageable"] == 0

    def test_inputs_of_many_micro_batches_take_no_more_memory(self, measured: dict[str, Any]) -> None:
        few, many = measured["update"]["peaks"]
        assert many - few < 2**20

    def test_scores_come_back_without_a_wait_for_each(self, measured: dict[str, Any]) -> None:
        found = measured["score"]
        assert found["pageable"] == 0 and found["scores"] == 6
        assert found["hidden"] == [[RESPONSE, ARCHITECTURE.hidden_size]]
        assert found["device waits"] == 1  # at the end, for all micro-batches
        assert {place.partition(":")[0] for place in found["waits"]} == {"megatron_hdpo/types/transfer.py"}

    def test_a_teacher_pins_the_bytes_of_its_weights(self, measured: dict[str, Any]) -> None:
        found = measured["teachers"]
        once = pytest.approx(1.0, abs=0.001)
        assert found["frozen"] == once and found["frozen while it scores"] == once
        assert found["ema"] == pytest.approx(2.0, abs=0.001)  # float32
        assert abs(found["ema's tick"]) < 0.001 and abs(found["ema's second scoring"]) < 0.001
        assert found["left"] == pytest.approx(-5.0, abs=0.005)  # frozen 1, ema 2, and each one's place for the policy
        assert found["waits of a tick"] == 1 and found["pageable"] == found["pageable of a scoring"] == 0
