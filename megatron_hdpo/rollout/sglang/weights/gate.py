"""Gate: what servers must pass after every weight update, before anything is sampled from them.

Their checksum of every parameter equals that of the trainer's stream, and a short sample is finite, far from uniform
and of the right version. It matters because the same weights are the drifting teacher of the privileged rollouts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from megatron_hdpo.rollout.sglang.answers import BadAnswerError, parse_completion
from megatron_hdpo.rollout.sglang.replica import Replica
from megatron_hdpo.rollout.sglang.weights.digests import digests_of_servers
from megatron_hdpo.rollout.sglang.weights.participants import Participants
from megatron_hdpo.rollout.sglang.weights.served_parameters import ServedParameters

LOGGER = logging.getLogger(__name__)
PROBE_TOP = 8
PROBE_TOKENS = 4
_QUANTISED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_EXPERTS = (".experts.w13_weight", ".experts.w2_weight")


class GateError(RuntimeError):
    """A server does not serve what it was sent; the message names tensor, server and step."""


class Expected:
    """Digests that the servers should hold, for each tensor-parallel size of a server."""

    def __init__(self, sizes: Sequence[int], kv_heads: int, device: str, num_experts: int = 0) -> None:
        self.by_size = {
            size: ServedParameters(size, kv_heads, digests_of_servers(device), num_experts) for size in set(sizes)
        }

    def add(self, bucket: Sequence[tuple[str, Tensor]]) -> None:
        """Add a bucket of the stream."""
        for parameters in self.by_size.values():
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
        sizes = [replica.info.tensor_parallel for replica in replicas]
        return Expected(sizes, self.kv_heads, self.device, self.num_experts)

    async def check(self, servers: Participants, expected: Expected, version: int) -> None:
        """Compare checksums; raise GateError at the first server that holds other weights than were sent."""
        found: dict[str, list[dict[str, Any]]] = {}

        async def ask(replica: Replica) -> None:
            found[replica.url] = await replica.api.checksums(self.timeout_s)

        await servers.each(ask)
        digests = {size: parameters.by_rank() for size, parameters in expected.by_size.items()}
        for replica in servers.replicas:
            sent = digests[replica.info.tensor_parallel]
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

    async def probe(self, servers: Participants, version: int) -> None:
        """Sample a few tokens from every server.

        Raises GateError when their distribution is not finite, near uniform, or of another version.
        """

        async def ask(replica: Replica) -> None:
            top = min(PROBE_TOP, self.vocab_size)
            body = {
                "input_ids": [0, 1],
                "sampling_params": {"max_new_tokens": PROBE_TOKENS, "temperature": 1.0, "ignore_eos": True},
                "return_logprob": True,
                "top_logprobs_num": top,
            }
            answer = await replica.api.generate(body, self.timeout_s)
            if problem := self._problem(answer, top, version):
                raise GateError(f"step {version}: server {replica.url}: {problem}; nothing is trained on it")

        await servers.each(ask)

    def _problem(self, answer: dict[str, Any], top: int, version: int) -> str:
        try:
            completion = parse_completion(answer, top, self.vocab_size)
        except BadAnswerError as error:
            return f"a sample of one token failed: {error}"
        served = set(completion.weight_versions.tolist())
        if served != {version}:
            return f"it states weights of version {sorted(served)}, not {version}"
        assert completion.top_logprobs is not None
        likeliest = float(np.exp(completion.top_logprobs.logprobs_TK[:, 0]).mean())
        if likeliest * self.vocab_size < self.min_peak:
            return (
                f"its next-token distribution is near uniform (likeliest token at {likeliest:.2g} on average; for "
                "an untrained model set rollout.sglang.sync.min_peak=0)"
            )
        return ""


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
