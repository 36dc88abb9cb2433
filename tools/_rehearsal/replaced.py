"""What a run does on one rank alone: parts of it noted, and parts answered or counted in place of files and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from _rehearsal.folder import UnwrittenWeights
from _rehearsal.servers import StandInFleet
from megatron_hdpo.checkpoint import store
from megatron_hdpo.costs.micro_batch_shape import PackedShape
from megatron_hdpo.costs.workload import Workload
from megatron_hdpo.model import policy as policy_module
from megatron_hdpo.model.policy import strip
from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.planner.made_up import random_score
from megatron_hdpo.tracking.communication import packed_shape
from megatron_hdpo.training import learner as learner_module
from megatron_hdpo.training.learner import Learner
from megatron_hdpo.types.learning import Example, LossSpec
from megatron_hdpo.types.rollouts import Group
from megatron_hdpo.weights import load as load_module


@dataclass
class Rehearsed:
    """What a rank did.

    shapes: micro-batches of each update of the last step; scored: of the last scoring. saved: bytes of this rank's part
    of a checkpoint.
    """

    context: ParallelContext
    workload: Workload
    head_chunk: int
    shapes: list[list[PackedShape]] = field(default_factory=list)
    scored: list[PackedShape] = field(default_factory=list)
    saved: int = 0
    fleets: Sequence[StandInFleet] = ()


def note_shapes(done: Rehearsed, work: Sequence[Any], spec: LossSpec) -> None:
    done.shapes.append([packed_shape(item, spec) for item in work])


def _noting_scored(done: Rehearsed, real: Callable[..., None]) -> Callable[..., None]:
    def run(ddp: Any, context: ParallelContext, work: Sequence[Any], *rest: Any, **options: Any) -> None:
        shapes: dict[int, PackedShape] = {}
        if options["forward_only"]:
            work = [partial(_noted, shapes, index, make) for index, make in enumerate(work)]
        real(ddp, context, work, *rest, **options)
        done.scored = list(shapes.values()) or done.scored

    return run


def _noted(shapes: dict[int, PackedShape], index: int, make: Callable[[], Any]) -> Any:
    """Make a micro-batch and note its shape; each chunk of an interleaved schedule makes it again."""
    item = make()
    shapes[index] = _scored_shape(item)
    return item


def _scored_shape(item: Any) -> PackedShape:
    packed, rows = item.batch.packed, len(item.batch.rows_N)
    top_k = max((scoring.top_k for scoring in item.scorings), default=0)
    return PackedShape(rows=len(packed.tokens_M), length=packed.longest, responses=rows, top_k=top_k)


@contextmanager
def replaced(done: Rehearsed) -> Iterator[None]:
    """Replace weight files, the writing of checkpoints, and the examples that the last stage broadcasts."""

    def save(sharded: Mapping[str, Any], *_: Any, **__: Any) -> None:
        done.saved += sum(_leaves(sharded))

    last = _LastStage()
    with ExitStack() as stack:
        for owner, name, stand_in in (
            (load_module, "HfWeights", UnwrittenWeights),
            (store, "write_sharded", save),
            (store, "problem_of_room", lambda *_: ""),
            (store.torch, "save", lambda value, path: None),
            (learner_module, "share_examples", last.sharing(learner_module.share_examples)),
            (Learner, "_plan", last.noting(Learner._plan)),
            (policy_module, "run_micro_batches", _noting_scored(done, policy_module.run_micro_batches)),
        ):
            stack.enter_context(patch.object(owner, name, stand_in))
        yield


def _leaves(value: Any) -> Iterator[int]:
    """Yield the bytes of every sharded tensor of a state dict."""
    if isinstance(value, ShardedTensor):
        yield 0 if value.data is None else value.data.nbytes
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)


class _LastStage:
    """Answers earlier stages of a pipeline with the examples that the last one would send them."""

    def __init__(self) -> None:
        self._now: tuple[Learner, Sequence[Group]] | None = None

    def noting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Return `Learner._plan` that notes its learner and groups."""

        def plan(learner: Learner, groups: Sequence[Group]) -> Any:
            self._now = learner, groups
            return real(learner, groups)

        return plan

    def sharing(self, real: Callable[..., list[Example]]) -> Callable[..., list[Example]]:
        """Return `share_examples` that makes the examples from made-up scores where there are none."""

        def share(examples: Sequence[Example] | None, context: ParallelContext) -> list[Example]:
            if examples is not None:
                return real(examples, context)
            assert self._now is not None
            learner, groups = self._now
            scorings = learner.objective.scorings(groups)
            top_k_of: dict[object, int] = {scoring.key: scoring.top_k for scoring in scorings}
            rng = np.random.default_rng(0)
            scores = {scoring.key: random_score(scoring, top_k_of, rng) for scoring in scorings}
            own = learner.objective.totals(groups, scores)
            totals = {name: value * context.dp_size for name, value in own.items()}
            return [strip(example) for example in learner.objective.examples(groups, scores, totals)]

        return share
