"""Bytes per GPU, by kind, in each phase of a step, on the fullest pipeline stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_hdpo.costs.activations import (
    activation_peak,
    ffn_bytes,
    final_norm_bytes,
    gated_bytes,
    head_chunk_bytes,
    head_gradient_bytes,
    input_bytes,
    pipeline_input_peak,
    recomputed_bytes,
    scored_chunk_bytes,
)
from megatron_hdpo.costs.backward import layer_moment
from megatron_hdpo.costs.cluster import FRAMEWORK_BYTES, GIB, Gpu
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.micro_batch_shape import PackedShape, Repeated
from megatron_hdpo.costs.parameters import model_values, product_values, served_bytes, stage_parameters
from megatron_hdpo.costs.schedule import rounded
from megatron_hdpo.costs.workload import MODEL_ROLES, RolloutSetup, TrainerMemory, Workload
from megatron_hdpo.model.architecture import Architecture

_FP32 = 4
_SERVER_SHARE = 0.95  # share of a GPU that a separate server may fill. Assumed
_SYNC_BUCKET_BYTES = 256 * 2**20  # rollout.sglang.sync.bucket_mib; a receiver holds about two

# One workspace of cuBLAS on Hopper, for the thread of the forward and for that of the backward pass.
_WORKSPACE_BYTES, _WORKSPACES = 32 * 2**20, 2

_STATE = ("main weights", "optimizer")
_LEAVING: dict[TrainerMemory, tuple[str, ...]] = {
    "keep": (),
    "optimizer": ("gradients", *_STATE),
    "all": ("gradients", *_STATE, "weights"),
}

Kinds = dict[str, float]


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of one GPU by kind in one phase, those of the engine on it included (weights, key-value cache)."""

    phase: str
    kinds: Kinds

    @property
    def total(self) -> float:
        """Return the bytes of all kinds."""
        return sum(self.kinds.values())

    def excess(self, gpu: Gpu) -> float:
        """Return the bytes beyond the GPU's memory; 0 if they fit."""
        return max(0.0, self.total - gpu.memory)


def resident(architecture: Architecture, layout: Layout, stage: int) -> Kinds:
    """Return what the trainer holds in every phase: buffers of weights and gradients, and its optimizer shard."""
    parameters = stage_parameters(architecture, layout, stage)
    padded = parameters.buffer_values(layout)
    shard = parameters.shard_values(layout) * (1.0 - layout.offload)
    kinds = {
        "weights": float(padded * layout.value_bytes),
        "gradients": float(padded * _FP32),
        "main weights": shard * _FP32 if layout.value_bytes < _FP32 else 0.0,
        "optimizer": shard * 2 * _FP32,
        "framework": float(FRAMEWORK_BYTES),
    }
    if layout.fp8:  # a copy of every matrix, and a transposed one for the backward products
        layers = architecture.num_layers // layout.pipeline
        kinds["FP8 weights"] = 2.0 * layers * product_values(architecture, layout)
    return kinds


def kept_between_steps(architecture: Architecture, layout: Layout, stage: int, rows: int) -> Kinds:
    """Return what stays after the first step beside the model.

    Workspaces; the buffer that rows are gathered into (Transformer Engine allocates it anew each time); of each chunk
    of layers after the first of the model the last input and its gradient. rows: of the largest micro-batch.
    """
    kinds = {"cuBLAS workspaces": float(_WORKSPACES * _WORKSPACE_BYTES)}
    chunks = layout.virtual_stages - int(stage == 0)
    if chunks:
        own = rows // layout.sequence_ranks * architecture.hidden_size * layout.value_bytes
        kinds["pipeline inputs"] = 2.0 * chunks * own
    if layout.sequence_ranks > 1 and layout.spec == "torch":
        kinds["gather buffer"] = float(rows * architecture.hidden_size * layout.value_bytes)
    return kinds


def _always(architecture: Architecture, layout: Layout, stage: int, workload: Workload) -> Kinds:
    works = [workload.training_work(layout), *(workload.scoring_work(role, layout) for role in MODEL_ROLES)]
    rows = max(work.shape.padded(layout).rows for work in works)
    return resident(architecture, layout, stage) | kept_between_steps(architecture, layout, stage, rows)


def beside_servers(held: Kinds, rollouts: RolloutSetup) -> Kinds:
    """Return what stays of the trainer's bytes while servers on the same GPU sample."""
    return {kind: size for kind, size in held.items() if kind not in _LEAVING[rollouts.trainer_memory]}


def moved_bytes(architecture: Architecture, layout: Layout, rollouts: RolloutSetup) -> tuple[float, float]:
    """Return the bytes of one GPU that wait in host memory while servers sample: of optimizer state, and of weights."""
    leaving = _LEAVING[rollouts.trainer_memory]
    held = [resident(architecture, layout, stage) for stage in layout.stages]
    state = max(sum(kinds[kind] for kind in _STATE) for kinds in held) if leaving else 0.0
    return state, max(kinds["weights"] for kinds in held) if "weights" in leaving else 0.0


def training(architecture: Architecture, layout: Layout, stage: int, work: Repeated, head_chunk: int) -> Kinds:
    """Return what training adds to the resident bytes at the fullest of three moments.

    They are the loss of a micro-batch on the last stage, the backward pass of the last layer, and the optimizer's step.
    """
    shape = work.shape.padded(layout)
    count = rounded(layout, work.count)
    held = {
        "activations": float(activation_peak(architecture, layout, stage, shape, count)),
        "pipeline inputs": float(pipeline_input_peak(architecture, layout, stage, shape, count)),
        "inputs": float(min(2, count) * input_bytes(shape, stage == layout.pipeline - 1)),
    }
    moments = [_layer_backward(architecture, layout, stage, shape, held), _optimizer_step(architecture, layout, stage)]
    if stage == layout.pipeline - 1:
        head = {
            "head chunk": float(head_chunk_bytes(architecture, layout, shape, head_chunk)),
            "head gradient": float(head_gradient_bytes(architecture, layout, shape)),
        }
        moments.append(held | head)
    return _fullest(moments)


def _layer_backward(a: Architecture, layout: Layout, stage: int, shape: PackedShape, held: Kinds) -> Kinds:
    """Return the bytes at the largest moment of the last layer's backward pass; the norm after it is done."""
    moment = layer_moment(a, layout, shape)
    done = final_norm_bytes(a, layout, stage, shape.rows)
    kinds = held | {kind: float(size) for kind, size in moment.kinds.items()}
    if again := recomputed_bytes(a, layout, shape):
        kinds["recomputed layer"] = float(again - moment.freed)
    else:
        done += moment.freed
    return kinds | {"activations": held["activations"] - done}


def _optimizer_step(a: Architecture, layout: Layout, stage: int) -> Kinds:
    """Return the scratch of torch's Adam, one fp32 number per parameter; Transformer Engine's has none."""
    if layout.spec != "torch":
        return {}
    shard = stage_parameters(a, layout, stage).shard_values(layout) * (1.0 - layout.offload)
    return {"optimizer's scratch": shard * _FP32}


def scoring(architecture: Architecture, layout: Layout, stage: int, work: Repeated, head_chunk: int) -> Kinds:
    """Return what scoring adds to the resident bytes: what one layer has at its peak, or the head's chunk."""
    if not work.count:
        return {}
    shape = work.shape.padded(layout)
    moments = [_scored_layer(architecture, layout, shape)]
    if stage == layout.pipeline - 1:
        hidden = shape.responses * architecture.hidden_size * layout.value_bytes
        moments.append({"hidden states": float(hidden)})
        moments[-1] |= {"head chunk": float(scored_chunk_bytes(architecture, layout, shape, head_chunk))}
    return _fullest(moments)


def _scored_layer(a: Architecture, layout: Layout, shape: PackedShape) -> Kinds:
    """Return the bytes of a layer's FFN and of five copies of its rows: of the model's and the layer's inputs."""
    own = shape.rows // layout.sequence_ranks * a.hidden_size * layout.value_bytes
    kinds = {"rows": 5.0 * own}
    if not a.num_experts:
        return kinds | {"activations": float(gated_bytes(a, layout, shape.rows))}
    experts = sum(layer_moment(a, replace(layout, recompute=False), shape).kinds.values())
    return kinds | {"activations": float(ffn_bytes(a, replace(layout, recomputed=()), shape.rows) + experts - own)}


def _scoring(architecture: Architecture, layout: Layout, stage: int, workload: Workload) -> Kinds:
    """Return the bytes of the scoring that needs most; an external teacher's weights come on top of the policy's."""
    found = []
    for weights in MODEL_ROLES:
        work, scorer = workload.scoring_work(weights, layout), workload.scorer(weights, architecture)
        kinds = scoring(scorer, layout, stage, work, workload.head_chunk)
        if kinds and weights == "teacher" and workload.teacher_model is not None:
            kinds["teacher weights"] = float(stage_parameters(scorer, layout, stage).values * layout.value_bytes)
        found.append(kinds)
    return _fullest(found)


def _teachers_head(architecture: Architecture, layout: Layout, stage: int, workload: Workload) -> Kinds:
    """Return the bytes of the teacher's head, from which an update makes targets over the whole vocabulary."""
    if not workload.full or stage != layout.pipeline - 1:
        return {}
    rows = architecture.padded_vocab_size(layout.tensor) // layout.tensor
    width = workload.scorer("teacher", architecture).hidden_size
    return {"teacher's head": float(rows * width * layout.value_bytes)}


def cache_bytes_per_token(architecture: Architecture, tensor: int) -> float:
    """Return the bytes of one token's keys and values on one GPU of a server, bfloat16."""
    heads = max(1.0, architecture.num_kv_heads / tensor)  # beyond one head per GPU, heads are copied
    return 2.0 * architecture.num_layers * heads * architecture.head_dim * 2


def engine_weights(architecture: Architecture, rollouts: RolloutSetup) -> float:
    """Return the bytes of the engine's weights on one GPU."""
    return served_bytes(architecture, model_values(architecture), rollouts.fp8) / rollouts.tensor


def cache_room(
    architecture: Architecture, layout: Layout, workload: Workload, rollouts: RolloutSetup, gpu: Gpu
) -> float:
    """Return the largest number of bytes of a key-value cache on one GPU of the engine; negative if nothing is left."""
    weights = engine_weights(architecture, rollouts)
    if rollouts.memory_fraction is not None:
        return rollouts.memory_fraction * gpu.memory - weights
    if rollouts.engine == "separate":
        return _SERVER_SHARE * gpu.memory - weights
    stages = [_always(architecture, layout, stage, workload) for stage in layout.stages]
    held = max(sum(beside_servers(kinds, rollouts).values()) for kinds in stages)
    buckets = 2.0 * _SYNC_BUCKET_BYTES if rollouts.trainer_memory != "all" else 0.0
    return gpu.memory - held - weights - buckets


def by_phase(
    architecture: Architecture,
    layout: Layout,
    workload: Workload,
    rollouts: RolloutSetup,
    cache: float,
) -> dict[str, PhaseMemory]:
    """Return the memory of each phase on the fullest GPU. cache: bytes of key-value cache per GPU of the engine."""
    engine = {"engine weights": engine_weights(architecture, rollouts), "key-value cache": max(0.0, cache)}
    shared = rollouts.engine != "separate"
    stays = shared and not (rollouts.engine == "colocated" and rollouts.saver)
    beside: Kinds = engine if stays else {}
    trained = workload.training_work(layout)
    chunk = workload.head_chunk
    extra: dict[str, list[Kinds]] = {"sampling": [], "teacher": [], "training": [], "sync": []}
    for stage in layout.stages:
        base = _always(architecture, layout, stage, workload)
        extra["sampling"].append((beside_servers(base, rollouts) | engine) if shared else base)
        extra["teacher"].append(base | _scoring(architecture, layout, stage, workload) | beside)
        kept = _teachers_head(architecture, layout, stage, workload)
        extra["training"].append(base | training(architecture, layout, stage, trained, chunk) | kept | beside)
        extra["sync"].append(_sync(base, rollouts, engine if shared else {}))
    memory = {phase: PhaseMemory(phase, _fullest(stages)) for phase, stages in extra.items()}
    if rollouts.engine == "separate":
        memory["server"] = PhaseMemory("server", engine)
    return memory


def _sync(base: Kinds, rollouts: RolloutSetup, engine: Kinds) -> Kinds:
    """Return the bytes of a sync. engine: of a server on the same GPU, which allocates them again before it."""
    held = beside_servers(base, rollouts) | {"weights": base["weights"], "sync buckets": 2.0 * _SYNC_BUCKET_BYTES}
    if rollouts.trainer_memory == "all":  # the weights leave before the server takes its cache
        engine = {kind: size for kind, size in engine.items() if kind != "key-value cache"}
    return held | engine


def _fullest(stages: list[Kinds]) -> Kinds:
    return max(stages, key=lambda kinds: sum(kinds.values()))


def host_bytes(architecture: Architecture, layout: Layout, workload: Workload, rollouts: RolloutSetup) -> float:
    """Return the host memory per GPU: of teacher, reference, offloaded optimizer, and what leaves for servers.

    While teacher and reference score, the policy's weights are on the host too.
    """
    values = max(stage_parameters(architecture, layout, s).values for s in layout.stages)
    copies: Mapping[str, int] = {
        "frozen": 2 * layout.value_bytes,
        "snapshot": 2 * layout.value_bytes,
        "ema": _FP32 + 2 * layout.value_bytes,
    }
    offloaded = max(stage_parameters(architecture, layout, s).shard_values(layout) for s in layout.stages)
    held = copies.get(workload.teacher, 0)
    other = 0
    if (teacher := workload.teacher_model) is not None:
        other = max(stage_parameters(teacher, layout, s).values for s in layout.stages) * layout.value_bytes
    if workload.scored("reference")[0] and workload.teacher != "frozen":  # a frozen teacher doubles as the reference
        held += layout.value_bytes if held else 2 * layout.value_bytes
    moved = sum(moved_bytes(architecture, layout, rollouts))
    return values * held + other + layout.offload * offloaded * 3 * _FP32 + moved


def why_not(memory: Mapping[str, PhaseMemory], gpu: Gpu) -> list[str]:
    """Return one line of text per phase that does not fit: by how much, and its largest kinds."""
    lines = []
    for phase in memory.values():
        if excess := phase.excess(gpu):
            largest = sorted(phase.kinds.items(), key=lambda kind: -kind[1])[:3]
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
            lines.append(
                f"{phase.phase}: {phase.total / GIB:.1f} GiB of {gpu.memory / GIB:.1f}, {excess / GIB:.1f} too many "
                f"({parts})"
            )
    return lines
