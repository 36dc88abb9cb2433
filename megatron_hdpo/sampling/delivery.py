"""Delivery of groups from the ranks that sampled them to the ranks that need them, and to no others.

Tokens and texts go to every rank that wants a group, log-probs and top log-probs only to those that compute a loss.
Arrays travel as the bytes that they are: only what describes them is pickled.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_hdpo.parallel.context import ParallelContext
from megatron_hdpo.parallel.exchange import exchange
from megatron_hdpo.sampling.step_rollouts import StepRollouts
from megatron_hdpo.types.problem import Problem
from megatron_hdpo.types.rollouts import Completion, FinishReason, Group, Sample, TopKArrays

_ALIGNMENT = 16
"""Bytes at whose multiples an array begins in a message."""

_NO_LOGPROBS = np.zeros(0, dtype=np.float32)
_NO_VERSIONS = np.zeros(0, dtype=np.int32)


Needs = Mapping[int, Sequence[int]]
"""Indices of the groups that a rank needs, by rank; equal on every rank. A rank that is left out needs none."""


def deliver_to_replicas(
    rollouts: StepRollouts, parts: Sequence[Sequence[int]], context: ParallelContext
) -> list[Group]:
    """Return the groups of this rank's data-parallel replica. Collective.

    parts: for each replica, the indices of its groups. The last pipeline stage gets the log-probs too.
    """
    places = context.gather_objects((context.dp_rank, context.is_last_stage))
    needs = {rank: parts[replica] for rank, (replica, _) in enumerate(places)}
    return _deliver(rollouts, needs, [rank for rank, (_, is_last) in enumerate(places) if is_last], context)


def deliver_to_all(rollouts: StepRollouts, context: ParallelContext) -> list[Group]:
    """Return all groups on every rank: for a handful of groups. Collective."""
    ranks = range(context.world_size)
    return _deliver(rollouts, dict.fromkeys(ranks, range(len(rollouts))), ranks, context)


def deliver_to_leader(rollouts: StepRollouts, context: ParallelContext) -> list[Group]:
    """Return all groups on rank 0, and none elsewhere: for a handful of groups. Collective."""
    return _deliver(rollouts, {0: range(len(rollouts))}, [0], context)


def _deliver(
    rollouts: StepRollouts, needs: Needs, with_logprobs: Collection[int], context: ParallelContext
) -> list[Group]:
    """Return the groups that this rank needs, in the order of `needs`; those that it holds as they are. Collective."""
    mine = needs.get(context.rank, ())
    if _all_there(rollouts, needs):
        return [rollouts.held[index] for index in mine]
    tokens = _received(_outgoing(rollouts, needs, _tokens, context), context)
    losses = {rank: needs[rank] for rank in with_logprobs}
    logprobs = _received(_outgoing(rollouts, losses, _logprobs, context), context)
    return [
        rollouts.held[index]
        if index in rollouts.held
        else _group(rollouts.outlines[index].problem, tokens[index], logprobs.get(index))
        for index in mine
    ]


def _all_there(rollouts: StepRollouts, needs: Needs) -> bool:
    return all(rollouts.holders[i] in (rank, None) for rank, indices in needs.items() for i in indices)


def _outgoing(
    rollouts: StepRollouts, needs: Needs, pack: Callable[[Group], Any], context: ParallelContext
) -> dict[int, np.ndarray]:
    """Return the message to each other rank with what it needs of the groups that this rank holds."""
    messages: dict[tuple[int, ...], np.ndarray] = {}  # the ranks of a replica get one and the same
    outgoing = {}
    for rank, indices in needs.items():
        sent = tuple(index for index in indices if rollouts.holders[index] == context.rank != rank)
        if sent and sent not in messages:
            messages[sent] = to_bytes({index: pack(rollouts.held[index]) for index in sent})
        if sent:
            outgoing[rank] = messages[sent]
    return outgoing


def _received(outgoing: Mapping[int, np.ndarray], context: ParallelContext) -> dict[int, Any]:
    """Exchange the messages; return what came for this rank, by the index of its group. Collective."""
    incoming = exchange(outgoing, context.host)
    return {index: packed for message in incoming.values() for index, packed in from_bytes(message).items()}


def _samples(group: Group) -> Iterator[Sample]:
    yield from group.samples
    yield from group.privileged_samples


def _tokens(group: Group) -> tuple[Any, ...]:
    samples = [
        (
            sample.completion.token_ids,
            sample.completion.finish_reason,
            sample.completion.routed_experts,
            sample.text,
            sample.reward,
            sample.feedback,
            sample.components,
            sample.decided_by,
        )
        for sample in _samples(group)
    ]
    return group.prompt_ids, group.privileged_prompt_ids, group.dropped, len(group.samples), samples


def _logprobs(group: Group) -> list[tuple[np.ndarray, np.ndarray, TopKArrays | None]]:
    completions = [sample.completion for sample in _samples(group)]
    return [(completion.logprobs, completion.weight_versions, completion.top_logprobs) for completion in completions]


def _group(problem: Problem, tokens: tuple[Any, ...], logprobs: Sequence[Any] | None) -> Group:
    prompt_ids, privileged_prompt_ids, dropped, students, packed = tokens
    samples = [_sample(*sample) for sample in packed]
    for sample, (values, versions, top) in zip(samples, logprobs or [], strict=logprobs is not None):
        sample.completion = replace(sample.completion, logprobs=values, weight_versions=versions, top_logprobs=top)
    return Group(problem, prompt_ids, samples[:students], privileged_prompt_ids, samples[students:], dropped)


def _sample(
    token_ids: np.ndarray,
    finish_reason: FinishReason,
    routed_experts: np.ndarray | None,
    text: str,
    reward: float,
    feedback: str | None,
    components: Mapping[str, float],
    decided_by: str,
) -> Sample:
    completion = Completion(
        token_ids, _NO_LOGPROBS, finish_reason, _NO_VERSIONS, top_logprobs=None, routed_experts=routed_experts
    )
    return Sample(completion, text, reward, feedback, components, decided_by)


def to_bytes(value: Any) -> np.ndarray:
    """Return a value as one message, uint8 [bytes]: a pickle without the arrays in it, and then these as they are."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    lengths = np.array([len(parts), *map(len, parts)], dtype=np.int64)
    starts = list(accumulate(map(_padded, map(len, parts)), initial=_padded(lengths.nbytes)))
    message = np.zeros(starts[-1], dtype=np.uint8)
    message[: lengths.nbytes] = lengths.view(np.uint8)
    for start, part in zip(starts, parts, strict=False):
        message[start : start + len(part)] = np.frombuffer(part, dtype=np.uint8)
    return message


def from_bytes(message: np.ndarray) -> Any:
    """Return the value of a message. Its arrays are views of the message."""
    count = int(message[:8].view(np.int64)[0])
    lengths = message[8 : 8 * (count + 1)].view(np.int64).tolist()
    starts = accumulate(map(_padded, lengths), initial=_padded(8 * (count + 1)))
    parts = [message[start : start + length].data for start, length in zip(starts, lengths, strict=False)]
    return pickle.loads(parts[0], buffers=parts[1:])


def _padded(length: int) -> int:
    return length + -length % _ALIGNMENT
