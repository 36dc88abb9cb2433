"""Checkpoints of a run: model, optimizer, schedule, step, and the state of objective and teacher, written atomically.

Everything else that a step needs is a pure function of the recipe and the step (data order, sampling seeds), or is
saved once in the same folder as the checkpoints (the frozen teacher).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from pydantic import TypeAdapter, ValidationError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_hdpo.checkpoint.extra_state import load_model, without_absent_extra_states
from megatron_hdpo.checkpoint.finite import weight_that_is_not_finite
from megatron_hdpo.checkpoint.manifest import (
    MANIFEST,
    described,
    files_in,
    has_manifest,
    problems_of,
    share_of,
    write_manifest,
)
from megatron_hdpo.checkpoint.optimizer_state import load_optimizer, sharded_optimizer
from megatron_hdpo.checkpoint.room import problem_of_room, problem_of_writing
from megatron_hdpo.model.architecture import Architecture
from megatron_hdpo.model.chunks import ModelChunks
from megatron_hdpo.model.config import SpecName
from megatron_hdpo.model.network import HeadlessGPTModel
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.model.specs import spec_of
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.types.disk import to_disk
from megatron_hdpo.types.errors import UserError
from megatron_hdpo.weights.host import HostWeights
from megatron_hdpo.weights.sharded_writer import write_sharded
from megatron_hdpo.weights.stored import UnsafeFileError, read_sharded

LOGGER = logging.getLogger(__name__)
DAMAGED, PARTIAL, REMOVED = ".damaged", ".partial", ".removed"
"""Endings of folders that are no checkpoints any more."""
_STATE = "run_state.json"
_ORIGIN = "origin.txt"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be used; the text says which, why, and what to do."""


class NoRoomError(CheckpointError):
    """A checkpoint that cannot be written now; nothing was begun, and a later save may succeed."""


@dataclass(frozen=True)
class LearnerState:
    """State that a step passes to the next in addition to model and optimizer.

    values: JSON values of objective and teacher. weights: this rank's shard of a teacher that follows the policy.
    """

    values: dict[str, Any] = field(default_factory=dict)
    weights: HostWeights | None = None


@dataclass(frozen=True)
class RunState:
    """The description of a checkpoint in its `run_state.json`.

    step: finished steps of reinforcement learning. memory: the values of `LearnerState`. reshardable: the optimizer's
    state fits any layout. dtype: precision of the model; None in checkpoints of older versions. spec: the layers of the
    model; older versions do not tell, and have been run with plain torch layers only. data: fingerprint of the problems
    that were trained on, "" in checkpoints of older versions. code: sha256 of each file of the user's own that the
    recipe refers to, by reference.
    """

    step: int
    tensor_parallel: int
    pipeline_parallel: int
    architecture: dict[str, Any]
    memory: dict[str, Any] = field(default_factory=dict)
    virtual_stages: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    reshardable: bool = False
    dtype: str | None = None
    spec: SpecName = "torch"
    data: str = ""
    code: dict[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> dict[str, int]:
        """The layout that the optimizer's state is tied to unless it is reshardable, by the recipe's keys."""
        return {
            "tensor": self.tensor_parallel,
            "pipeline": self.pipeline_parallel,
            "virtual_stages": self.virtual_stages,
            "expert": self.expert_parallel,
            "expert_tensor": self.expert_tensor_parallel,
        }


class CheckpointStore:
    """The checkpoints of a run, `<run>/checkpoints/step_<n>`.

    All methods except `latest`, `has_weights` and `check` are collective. full: verify every byte before a checkpoint
    is read, not only sizes and small files. data: fingerprint of the problems that this run trains on. code: as in
    RunState.
    """

    def __init__(
        self,
        run_dir: Path,
        context: ParallelContext,
        keep: int,
        reshardable: bool = False,
        full: bool = True,
        keep_every: int | None = None,
    ) -> None:
        self.root = run_dir / "checkpoints"
        self.context = context
        self.keep = keep
        self.reshardable = reshardable
        self.full = full
        self.keep_every = keep_every
        self.data = ""
        self.code: dict[str, str] = {}

    def set_damaged_aside(self, warn: Callable[[str], object]) -> None:
        """Verify the newest checkpoint; rename it if it is damaged, and go on with the one before, until one is whole.

        warn: gets a line about each that is damaged, or that no manifest describes. Raises CheckpointError when all
        are damaged: to begin anew would not be the same run.
        """
        while (path := self.context.broadcast_object(self.latest())) is not None:
            problem = self._problem(path, warn)
            if not problem:
                return
            aside = path.with_name(path.name + DAMAGED)
            warn(f"{path} is damaged: {problem}; it is now {aside.name}, and an older one is looked for")
            if self.context.is_leader:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            self.context.barrier("damaged checkpoint set aside")
        if self.context.broadcast_object(any(self.root.glob("step_*" + DAMAGED))):
            raise CheckpointError(
                f"all checkpoints in {self.root} are damaged: restore one, or train into another output folder"
            )

    def _problem(self, path: Path, warn: Callable[[str], object]) -> str:
        """Return what is wrong with a checkpoint, "" if nothing is. Collective."""
        if not self.context.broadcast_object(has_manifest(path)):
            warn(f"{path} has no {MANIFEST} (an older version wrote it), so it cannot be verified")
            return ""
        found = problems_of(path, self.full, self.context.rank, self.context.world_size)
        self.context.barrier("checkpoint verified")
        lines = [line for of_rank in self.context.gather_objects(found) for line in of_rank]
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        return lines[0] + more if lines else ""

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None. A checkpoint gets its final name only when it is complete."""
        return latest_checkpoint(self.root.parent)

    def save(self, step: int, policy: Policy, memory: LearnerState | None = None) -> Path:
        """Write the state after `step` steps, remove checkpoints that are not to be kept, and return the folder.

        Raises CheckpointError when a weight is not finite, NoRoomError when the disk cannot take the files; both on
        all ranks, and all checkpoints stay as they are.
        """
        memory = memory or LearnerState()
        final = self.root / f"step_{step:08d}"
        layout = self.context.layout
        state = RunState(
            step=step,
            tensor_parallel=layout.tensor,
            pipeline_parallel=layout.pipeline,
            architecture=dict(vars(policy.architecture)),
            memory=memory.values,
            virtual_stages=layout.virtual_stages,
            expert_parallel=layout.expert,
            expert_tensor_parallel=layout.expert_tensor,
            reshardable=self.reshardable,
            dtype=_dtype_of(policy),
            spec=spec_of(policy.model),
            data=self.data,
            code=self.code,
        )
        sharded = self._sharded(policy, self.reshardable)
        self._remove_unfinished()
        if problem := problem_of_room(self.root, sharded, self.context):
            raise NoRoomError(f"step {step} is not saved: {problem}")
        if weight := weight_that_is_not_finite(sharded["model"], self.context):
            raise CheckpointError(
                f"step {step} is not saved: {weight} has a value that is not finite, which no further step mends. The "
                "checkpoints before it stay; look for the step at which metrics.jsonl becomes null, and lower "
                "optimizer.lr before you start again"
            )
        try:
            self._write(final, sharded, {_STATE: json.dumps(vars(state), indent=1)}, memory.weights)
        except CheckpointException as error:
            if problem := problem_of_writing(error, self.context):
                if self.context.is_leader:
                    shutil.rmtree(self._partial(final), ignore_errors=True)
                raise NoRoomError(f"step {step} is not saved: {self.root}: {problem}") from error
            raise
        if self.context.is_leader:
            self._remove_old()
        self.context.barrier("checkpoint saved")
        return final

    def _remove_unfinished(self) -> None:
        """Remove what a save that was cut off has left: a resumed run need not save at that step again."""
        if self.context.is_leader:
            for partial in self.root.glob("step_*" + PARTIAL):
                shutil.rmtree(partial, ignore_errors=True)  # if it cannot be, the room says so

    def _remove_old(self) -> None:
        for old in sorted(self.root.glob("step_" + "[0-9]" * 8))[: -self.keep]:
            if self.keep_every is None or int(old.name.removeprefix("step_")) % self.keep_every:
                old.rename(old.with_name(old.name + REMOVED))  # a removal that is cut off must leave no checkpoint
        for removed in self.root.glob("step_*" + REMOVED):
            shutil.rmtree(removed)

    def check(self, path: Path, architecture: Architecture, dtype: str, spec: SpecName) -> RunState:
        """Return the description of a checkpoint after checking that it can be loaded.

        dtype, spec: precision and layers of the model that it will be loaded into. Raises CheckpointError when the
        checkpoint is of another model, or when it has another layout, precision or spec and cannot change it.
        """
        state = read_state(path)
        _check_dtype(path, state, dtype)
        _check_spec(path, state, spec)
        _check_layout(path, state, {key: getattr(self.context.layout, key) for key in state.layout})
        _check_architecture(path, state, architecture)
        return state

    def load(self, path: Path, policy: Policy) -> RunState:
        """Restore model, optimizer and schedule in place. Raises CheckpointError when the checkpoint does not fit."""
        state = self.check(path, policy.architecture, _dtype_of(policy), spec_of(policy.model))
        assert policy.optimizer is not None and policy.schedule is not None
        # In float32 the optimizer's main weights are views of the model's own.
        with self.context.megatron_calls(), torch.no_grad():
            sharded = self._sharded(policy, state.reshardable, loading=True)
            sharded["model"] = without_absent_extra_states(sharded["model"], path)
            loaded = _load(sharded, path)
            self.context.barrier("checkpoint read")
            load_model(policy.model, loaded["model"])
            load_optimizer(policy.optimizer, loaded["optimizer"], state.reshardable)
            policy.schedule.num_steps = 0
            policy.schedule.step(increment=loaded["schedule"]["num_steps"])
        return state

    def load_learner_state(self, path: Path) -> LearnerState:
        """Load the state of objective and teacher; raises CheckpointError when the teacher's weights cannot be read."""
        values, file = read_state(path).memory, path / self._shard_name()
        if not _has_shards(values):
            return LearnerState(values)
        try:
            return LearnerState(values, torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # torch, pickle, zipfile and the file system each raise their own
            raise CheckpointError(
                f"{file} is damaged or missing ({type(error).__name__}: {error}): delete {path} to resume an older one"
            ) from error

    def _shard_name(self) -> str:
        """Return the file name of this rank's shard of a teacher, the same on ranks that hold the same weights."""
        groups = self.context.groups
        name = f"teacher_tp{groups.tp.rank()}_pp{groups.pp.rank()}"
        if self.context.layout.expert_ranks > self.context.layout.pipeline:
            name += f"_ep{groups.ep.rank()}_etp{groups.expt_tp.rank()}"
        return f"{name}.pt"

    def _writes_shard(self) -> bool:
        """Return True on the first of the ranks that hold the same weights. Collective."""
        return self.context.gather_objects(self._shard_name()).index(self._shard_name()) == self.context.rank

    def has_weights(self, name: str, origin: str = "") -> bool:
        """Return whether `save_weights` has written `name` completely, with the same origin."""
        path = self.root / name / _ORIGIN
        return path.is_file() and path.read_text() == origin

    def save_weights(self, name: str, model: HeadlessGPTModel | ModelChunks, origin: str = "") -> None:
        """Write the current weights of `model` as `checkpoints/<name>` (of a frozen teacher, of a warm-up).

        origin: text that identifies what the weights were made from.
        """
        with self.context.megatron_calls():
            sharded = {"model": model.sharded_state_dict()}
        self._write(self.root / name, sharded, {_ORIGIN: origin})

    def load_weights(self, name: str, model: HeadlessGPTModel | ModelChunks) -> None:
        """Load weights that `save_weights` wrote into `model`; raises CheckpointError when they are missing."""
        path = self.root / name
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is missing: a run with a frozen teacher or a KL penalty cannot be resumed without it"
            )
        if problem := self._problem(path, LOGGER.info):
            raise CheckpointError(f"{path} is damaged: {problem}; restore it from a copy, or train into another folder")
        with self.context.megatron_calls():
            sharded = without_absent_extra_states(model.sharded_state_dict(), path)
            load_model(model, _load({"model": sharded}, path)["model"])
        self.context.barrier("weights read")

    def _partial(self, final: Path) -> Path:
        return final.with_name(final.name + PARTIAL)

    def _sharded(self, policy: Policy, reshardable: bool, loading: bool = False) -> dict[str, Any]:
        assert policy.optimizer is not None and policy.schedule is not None
        with self.context.megatron_calls():
            model = policy.model.sharded_state_dict()
            optimizer = sharded_optimizer(policy.optimizer, model, reshardable, loading)
            return {"model": _readable(model, policy), "optimizer": optimizer, "schedule": policy.schedule.state_dict()}

    def _write(
        self, final: Path, sharded: dict[str, Any], texts: dict[str, str], teacher: HostWeights | None = None
    ) -> None:
        """Write a folder under a temporary name and rename it, so that a killed run leaves no incomplete checkpoint.

        texts: contents of more files, by name. teacher: this rank's shard of a teacher.
        """
        partial = self._partial(final)
        if self.context.is_leader:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.context.barrier("checkpoint folder made")
        with self.context.megatron_calls():
            write_sharded(sharded, partial, lambda: self.context.barrier("checkpoint written"))
        if self._writes_shard() and teacher is not None:
            torch.save(teacher, partial / self._shard_name())
        self.context.barrier("teacher written")
        if self.context.is_leader:
            for name, text in texts.items():
                (partial / name).write_text(text)
        self.context.barrier("checkpoint described")
        names = self.context.broadcast_object(files_in(partial) if self.context.is_leader else [])
        own = described(partial, share_of(names, self.context.rank, self.context.world_size))
        self.context.barrier("checksums of the checkpoint")
        entries = self.context.gather_objects(own)
        if self.context.is_leader:
            write_manifest(partial, {name: of_rank[name] for of_rank in entries for name in sorted(of_rank)})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            to_disk(final.parent)
        self.context.barrier("checkpoint named")


def _readable(sharded: dict[str, Any], policy: Policy) -> dict[str, Any]:
    """Return a sharded state with its weights on the host where servers have their place on the device."""
    memory = policy.memory
    if memory is None or not memory.weights_away:
        return sharded

    def on_host(value: Any) -> Any:
        data = getattr(value, "data", None)
        return replace(value, data=memory.on_host(data)) if isinstance(data, torch.Tensor) else value

    return dict_list_map_outplace(on_host, sharded)


def _check_layout(path: Path, state: RunState, now: dict[str, int]) -> None:
    differing = [key for key in now if now[key] != state.layout[key]]
    if not differing or (state.reshardable and not _has_shards(state.memory)):
        return
    there, here = (", ".join(f"{key}={of[key]}" for key in differing) for of in (state.layout, now))
    tied, way = "the optimizer's state", "write a checkpoint with checkpoint.reshardable=true there"
    if _has_shards(state.memory):
        tied, way = "the saved weights of its teacher", "resume at the old layout"
    raise CheckpointError(
        f"{path} was written at {there} (parallel section), this run has {here}: {tied} cannot change its layout. "
        f"Start a new run from the exported Hugging Face checkpoint, or {way}"
    )


def _check_dtype(path: Path, state: RunState, dtype: str) -> None:
    if state.dtype in (None, dtype) or state.reshardable:
        return
    raise CheckpointError(
        f"{path} was written with model.dtype={state.dtype}, this run has {dtype}: the optimizer's state cannot change "
        f"its precision. Set model.dtype to auto or {state.dtype}, start a new run from the exported Hugging Face "
        "checkpoint, or write a checkpoint with checkpoint.reshardable=true there"
    )


def _check_spec(path: Path, state: RunState, spec: SpecName) -> None:
    """Refuse a checkpoint whose optimizer's state is in the order in which another spec has the parameters.

    The order is all that tells one parameter's state from another's there: Megatron would mix them up without a word.
    """
    if state.spec == spec or (state.reshardable and not _has_shards(state.memory)):
        return
    tied, way = "the optimizer's state", "or write a checkpoint with checkpoint.reshardable=true there"
    if _has_shards(state.memory):
        tied, way = "the saved weights of its teacher", "or resume with the same layers"
    raise CheckpointError(
        f"{path} was written with model.spec={state.spec}, this run has {spec}: {tied} cannot change layers. Set "
        f"model.spec={state.spec} where that runs, start a new run from the exported Hugging Face checkpoint, {way}"
    )


def _dtype_of(policy: Policy) -> str:
    return str(next(policy.model.parameters()).dtype).removeprefix("torch.")


def _has_shards(memory: dict[str, Any]) -> bool:
    """Return whether the checkpoint holds the shards of a teacher's weights."""
    return bool(memory.get("teacher", {}).get("weights"))


def _check_architecture(path: Path, state: RunState, architecture: Architecture) -> None:
    now = json.loads(json.dumps(vars(architecture)))
    differing = [key for key in now if now[key] != state.architecture.get(key)]
    if differing:
        key = differing[0]
        raise CheckpointError(
            f"{path} is of another model: {key} is {state.architecture.get(key)} there and {now[key]} here; "
            "train into another output folder"
        )


def _load(sharded: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read a checkpoint into a sharded state dict; raises CheckpointError if files are missing or damaged."""
    try:
        return read_sharded(sharded, path)
    except UnsafeFileError:
        raise
    except (Exception, CheckpointException) as error:  # torch, Megatron, pickle and the file system have their own
        raise CheckpointError(
            f"{path} is damaged or incomplete ({type(error).__name__}: {error}): delete it to go on from an older one"
        ) from error


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a run folder; None when there is none."""
    found = sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))
    return found[-1] if found else None


def read_state(path: Path) -> RunState:
    """Read the description of the checkpoint at `path`; raises CheckpointError if it cannot be read."""
    try:
        content = _json_of(path / _STATE)
        state = RunState(**content)
        TypeAdapter(RunState).validate_json(json.dumps(content), strict=True)
        if not isinstance(state.memory.get("teacher", {}), dict):
            raise ValueError("memory.teacher is no object")
        if path.name.removeprefix("step_").isdecimal() and state.step != int(path.name.removeprefix("step_")):
            raise ValueError(f"step is {state.step}, which the name of the folder does not say")
        return state
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = str(error)
    raise CheckpointError(f"{path / _STATE} cannot be read ({reason}): delete {path} to resume an older one")


def _json_of(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content
