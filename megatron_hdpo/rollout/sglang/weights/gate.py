"""Gate: what servers must pass after every weight update, before anything is sampled from them.

Their checksum of every parameter equals that of the trainer's stream, and a short sample is finite, far from uniform
and of the right version. It matters because the same weights are the drifting teacher of the privileged rollouts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_fixed
from torch import Tensor

from megatron_hdpo.rollout.sglang.answers import BadAnswerError, parse_completion
from megatron_hdpo.rollout.sglang.api import ApiError
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.stamps import RunStamp
from megatron_hdpo.rollout.sglang.weights.digests import digests_of_servers
from megatron_hdpo.rollout.sglang.weights.participants import Participants
from megatron_hdpo.rollout.sglang.weights.served_parameters import ServedParameters
from megatron_hdpo.types.rollouts import Completion, SamplingParams

LOGGER = logging.getLogger(__name__)
PROBE_TOP = 8
PROBE_TOKENS = 4
TRIES = 3
WAIT_S = 0.5
"""Pause before a server is asked again."""
_QUANTISED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_EXPERTS = (".experts.w13_weight", ".experts.w2_weight")


class GateError(RuntimeError):
    """A server does not serve what it was sent; the message names tensor, server and step."""


class Expected:
    """Digests that the servers should hold, for each split of a server's weights (`Replica.split`)."""

    def __init__(self, splits: Sequence[tuple[int, int]], kv_heads: int, device: str, num_experts: int = 0) -> None:
        self.by_split = {
            (ranks, groups): ServedParameters(ranks, kv_heads, digests_of_servers(device), num_experts, groups)
            for ranks, groups in set(splits)
        }

    def add(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Add a bucket of the stream."""
        for parameters in self.by_split.values():
            for name, tensor in bucket:
                parameters.add(name, tensor)


class Gate:
    """The gate: checksums and a probe.

    kv_heads, vocab_size: of the model. device: of the servers (cpu or cuda), which decides how they hash. min_peak: see
    WeightSyncConfig. num_experts: per layer, 0 in a dense model.
    """

    def __init__(
        self,
        kv_heads: int,
        vocab_size: int,
        device: str,
        timeout_s: float,
        min_peak: float = 2.0,
        num_experts: int = 0,
    ) -> None:
        self.min_peak, self.num_experts = min_peak, num_experts
        self.kv_heads, self.vocab_size, self.device, self.timeout_s = kv_heads, vocab_size, device, timeout_s
        self._audited = False

    def expect(self, replicas: Sequence[Replica]) -> Expected:
        """Return an object that collects the stream's buckets for `check`."""
        return Expected([replica.split for replica in replicas], self.kv_heads, self.device, self.num_experts)

    async def check(self, servers: Participants, expected: Expected, version: int) -> None:
        """Compare checksums; raise GateError at the first server that holds other weights than were sent."""
        found: dict[str, list[dict[str, Any]]] = {}

        async def ask(replica: Replica) -> None:
            found[replica.url] = await _asked_again(self.timeout_s)(replica.api.checksums, self.timeout_s)

        await servers.each(ask)
        digests = {split: parameters.by_rank() for split, parameters in expected.by_split.items()}
        for replica in servers.replicas:
            sent = digests[replica.split]
            for rank in found[replica.url]:
                place = _tensor_parallel_rank(rank)
                if replica.info.quantization and not self._audited:
                    self._log_audit(rank["checksums"], sent[place], replica)
                wrong = differences(rank["checksums"], sent[place], replica.info.quantization)
                if wrong:
                    raise GateError(
                        f"step {version}: server {replica.url}, its rank {place}: {wrong[0]}"
                        + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
                        + ": it does not serve the weights that it was sent; nothing is trained on them"
                    )

    def _log_audit(self, served: dict[str, str], expected: dict[str, str], replica: Replica) -> None:
        """Log, once per run, each parameter and whether the server holds it as it was sent."""
        self._audited = True
        audited = audit(served, expected)
        for name, is_quantised in audited.items():
            LOGGER.info("%s: %s", name, replica.info.quantization if is_quantised else "as sent")
        LOGGER.warning(
            "%s: %d of %d parameters are quantised (%s); their values are not compared with the trainer's",
            replica.url, sum(audited.values()), len(audited), replica.info.quantization,
        )  # fmt: skip

    async def probe(self, servers: Participants, version: int, stamp: RunStamp) -> None:
        """Sample a few tokens from every server; exclude one that gives no sample.

        A failed or broken answer is no evidence against the weights: the server is asked again, TRIES times and for
        `timeout_s` seconds at most. Raises GateError when none of the samples passes: when their distribution is
        near uniform, or of other weights.
        """

        async def ask(replica: Replica) -> None:
            if problem := await self._asked(replica, version, stamp):
                raise GateError(f"step {version}: server {replica.url}: {problem}; nothing is trained on it")

        await servers.each(ask)

    async def _asked(self, replica: Replica, version: int, stamp: RunStamp) -> str:
        """Return the problem with the server's samples, "" for none. Raises ApiError when there is no sample."""
        evidence, failure = "", None
        deadline = time.monotonic() + self.timeout_s
        for turn in range(TRIES):
            await asyncio.sleep(WAIT_S if turn else 0)
            left = deadline - time.monotonic()
            if left <= 0:
                break
            try:
                completion = await self._sample(replica, stamp, left)
            except ApiError as error:
                failure = error
                LOGGER.warning("the probe after weight update %d failed: %s", version, error)
                continue
            evidence = self._evidence(completion, version)
            if not evidence:
                return ""
        if failure is not None and not evidence:
            raise failure
        return evidence

    async def _sample(self, replica: Replica, stamp: RunStamp, timeout_s: float) -> Completion:
        """Return a short sample of a server. Raises ApiError when there is none."""
        sampling = SamplingParams(PROBE_TOKENS, top_logprobs=min(PROBE_TOP, self.vocab_size))
        body = {
            "input_ids": [0, 1],
            "sampling_params": {"max_new_tokens": PROBE_TOKENS, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
            "top_logprobs_num": sampling.top_logprobs,
        }
        answer = await replica.api.generate(body, timeout_s)
        try:
            return parse_completion(answer, sampling, self.vocab_size, stamp)
        except BadAnswerError as error:
            raise ApiError(replica.url, "/generate", f"a sample of a few tokens failed: {error}", 500) from error

    def _evidence(self, completion: Completion, version: int) -> str:
        """Return why a sample shows that the server does not hold the weights, or an empty string."""
        served = set(completion.weight_versions.tolist())
        if served != {version}:
            return f"it states weights of version {sorted(served)}, not {version} of this run"
        assert completion.top_logprobs is not None
        likeliest = float(np.exp(completion.top_logprobs.logprobs_TK[:, 0]).mean())
        if likeliest * self.vocab_size < self.min_peak:
            return (
                f"its next-token distribution is near uniform (likeliest token at {likeliest:.2g} on average; for "
                "an untrained model set rollout.sglang.sync.min_peak=0)"
            )
        return ""


def _asked_again(timeout_s: float) -> AsyncRetrying:
    """Return a caller that repeats a call, while the time lasts, when it failed in a way that may pass."""
    return AsyncRetrying(
        stop=stop_after_attempt(TRIES) | stop_after_delay(timeout_s),
        wait=wait_fixed(WAIT_S),
        retry=retry_if_exception(lambda error: isinstance(error, ApiError) and error.may_pass),
        reraise=True,
    )


def differences(served: dict[str, str], expected: dict[str, str], quantization: str | None) -> list[str]:
    """Return one line per parameter that differs, is missing or was never sent.

    Quantised parameters are skipped: there is no digest to compare with.
    """
    lines = []
    for name, value in expected.items():
        if quantization and quantised(name):
            continue
        if name not in served:
            # Includes a tied head, which the server stores under the embedding's name only.
            lines.append(f"{name} is not among its parameters")
        elif served[name] != value:
            lines.append(f"{name} has checksum {served[name]}, the trainer's is {value}")
    lines += [f"{name} was never sent" for name in served if name not in expected and not derived(name)]
    return lines


def quantised(name: str) -> bool:
    """Return whether `quantization: fp8` applies to this parameter: weights of the linear layers inside the blocks."""
    return name.endswith(_EXPERTS) or (name.endswith(".weight") and name.split(".")[-2] in _QUANTISED)


def audit(served: dict[str, str], expected: dict[str, str]) -> dict[str, bool]:
    """Return, for each parameter, whether the server holds another value than was sent (that is, quantised it)."""
    return {name: served.get(name) != value for name, value in expected.items()}


def derived(name: str) -> bool:
    """Return whether the server computes this parameter itself, such as the scales of quantised layers."""
    return name.endswith(("_scale", "_scale_inv", "_scales")) or "rotary_emb" in name


def _tensor_parallel_rank(rank: dict[str, Any]) -> int:
    places = rank["parallelism_info"]
    return int((places[0] if isinstance(places, list) else places)["tp_rank"])
