"""Arguments of SGLang servers that this package decides, refuses, or allows with a condition: one table.

The same table serves flags of a recipe (`extra_args`) and what a given server reports of itself. An argument that is
not in it is passed on as it is. Reasons were found in the sources of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

_OWN_SETTINGS = (
    "dtype quantization context-length mem-fraction-static max-total-tokens max-running-requests attention-backend "
    "enable-memory-saver enable-weights-cpu-backup api-key host tp tp-size tensor-parallel-size"
)
_OF_THE_RUN = (
    "model model-path device port nccl-port config base-gpu-id skip-server-warmup sleep-on-idle "
    "enable-return-routed-experts incremental-streaming-output skip-tokenizer-init"
)
RESERVED_FLAGS = dict.fromkeys(_OWN_SETTINGS.split(), "a setting of its own") | dict.fromkeys(
    _OF_THE_RUN.split(), "decided by the run"
)
"""Flags that `extra_args` may not name, whatever their value, and why."""

OFF = frozenset({"", "none", "false", "null"})
ONE = OFF | {"1"}


@dataclass(frozen=True)
class Rule:
    """A value of an argument that would spoil the run, and why.

    names: of the argument on a command line; a server reports it by the first one, with underscores. allowed: values
    in lower case that do no harm. device: where the rule holds, None for everywhere. reported: whether a given server's
    word is checked, too.
    """

    names: tuple[str, ...]
    reason: str
    allowed: frozenset[str] = OFF
    device: Literal["cpu", "cuda"] | None = None
    reported: bool = True

    def forbids(self, value: object, device: str) -> bool:
        """Return whether a server on this device must not have this value."""
        return self.device in (None, device) and str(value).lower() not in self.allowed


_ONE_COPY = "SGLang takes new weights only with one data-parallel copy in a server; start more servers instead"
_OTHER_SPLIT = (
    "its ranks hold other parts of the weights than those that the check after a weight sync computes; take "
    "tensor_parallel and ep-size alone"
)
_KEPT_OUTSIDE = "keys and values of old weights stay in it after a weight sync, and would be used again"
_HALF = (
    "a sample would be computed by two servers, and the run sends its weights, pauses and checks to one; leave it out"
)
_BIASED = "it accepts draft tokens that the model would not have sampled as often; its log-probs would not be theirs"

RULES = (
    Rule(
        ("speculative-algorithm",),
        "SGLang loads each weight sync into the draft model, too, which has other weights; only NGRAM has no draft "
        "model",
        OFF | {"ngram"},
    ),
    Rule(
        ("speculative-algorithm",),
        "on a CPU SGLang accepts and samples only the likeliest tokens, whatever the temperature; leave it out",
        device="cpu",
    ),
    Rule(("speculative-accept-threshold-single",), _BIASED, OFF | {"1", "1.0"}),
    Rule(("speculative-accept-threshold-acc",), _BIASED, OFF | {"1", "1.0"}),
    Rule(("disaggregation-mode",), _HALF),
    Rule(("decoupled-spec-role",), _HALF),
    Rule(("dp-size", "dp", "data-parallel-size"), _ONE_COPY, ONE),
    Rule(("attn-dp-size", "attention-data-parallel-size"), _ONE_COPY, ONE),
    Rule(("moe-dp-size", "moe-data-parallel-size"), _OTHER_SPLIT, ONE),
    Rule(("enable-dp-attention",), _ONE_COPY),
    Rule(("enable-eplb",), "it moves experts between ranks, where the check after a weight sync does not expect them"),
    Rule(("ep-num-redundant-experts",), _OTHER_SPLIT, OFF | {"0"}),
    Rule(("pp-size", "pipeline-parallel-size"), _OTHER_SPLIT, ONE),
    Rule(("attn-cp-size", "attention-context-parallel-size"), _OTHER_SPLIT, ONE),
    Rule(
        ("nnodes",),
        "a server that the run starts is on one node; start it yourself, with rollout.sglang.placement=given",
        ONE,
        reported=False,
    ),
    Rule(
        ("custom-weight-loader",),
        "the run sends whole tensors at each sync, and nothing would call it (delta sync is not there)",
        OFF | {"[]"},
    ),
    Rule(("enable-lora",), "adapters rename the layers that a weight sync writes; the run sends whole models"),
    Rule(("hicache-storage-backend",), _KEPT_OUTSIDE),
    Rule(("enable-lmcache",), _KEPT_OUTSIDE),
    Rule(("enable-flexkv",), _KEPT_OUTSIDE),
    Rule(("enable-unified-cache-external-linker",), _KEPT_OUTSIDE),
    Rule(
        ("preferred-sampling-params",),
        "it changes how tokens are sampled behind the run's back; temperature, top_p and top_k are settings of rollout",
    ),
    Rule(("enable-watermark",), "it changes how tokens are sampled, and the log-probs do not say so"),
    Rule(
        ("random-seed",),
        "all servers would draw the same random numbers, and sample the same responses to a prompt; for equal samples "
        "in each run take enable-deterministic-inference",
        reported=False,
    ),
    Rule(("admin-api-key",), "the run sends one key for all requests: take api_key", reported=False),
    Rule(("ssl-keyfile",), "the run asks its servers by http", reported=False),
    Rule(("ssl-certfile",), "the run asks its servers by http", reported=False),
    Rule(("grpc-mode",), "the run asks its servers by http", reported=False),
    Rule(("smg-grpc-mode",), "the run asks its servers by http", reported=False),
)
"""Values that a server must not have."""

REFUSED_VARIABLES = {
    "SGLANG_RETURN_ORIGINAL_LOGPROB": "log-probs would be those of temperature 1, not of the temperature sampled with",
    "SGLANG_SIMULATE_ACC_LEN": "tokens would be made up, to measure speculative decoding",
}
"""Environment variables that a server must not have, and why."""


def canonical(flag: str) -> str:
    """Return a flag as the table names it: without dashes before it, with dashes within."""
    return flag.lstrip("-").replace("_", "-")


def problems_of_flags(flags: Mapping[str, object], device: str) -> Iterator[str]:
    """Yield why flags cannot be given to a server that the run starts on this device, each by its name."""
    for flag, value in flags.items():
        name = canonical(flag)
        if name in RESERVED_FLAGS:
            yield f"{flag} is {RESERVED_FLAGS[name]}; take it out"
        elif value is False:
            yield f"{flag} is false; a flag that is not wanted is left out"
        elif full := _abbreviated(name):
            # A command line takes the beginning of a flag for the whole of it.
            yield f"{flag} is short for {full}; write it in full"
        else:
            yield from (
                f"{flag}={value}: {rule.reason}" for rule in RULES if name in rule.names and rule.forbids(value, device)
            )


def problem_of_server(said: Mapping[str, object]) -> str:
    """Return why a server cannot be used, given what /server_info reports, or an empty string."""
    device = str(said.get("device", "cuda"))
    for rule in RULES:
        field = rule.names[0].replace("-", "_")
        if rule.reported and rule.forbids(said.get(field), device):
            return f"it was started with {rule.names[0]}={said[field]}: {rule.reason}"
    return ""


def expert_parallel(flags: Mapping[str, object]) -> int:
    """Return over how many groups of ranks the experts of a server with these flags are distributed."""
    named = {canonical(flag): value for flag, value in flags.items()}
    given = [named[name] for name in _EXPERT_PARALLEL if name in named]
    return max(1, int(str(given[0]))) if given and str(given[0]).isdigit() else 1


def speculates(flags: Mapping[str, object]) -> bool:
    """Return whether servers with these flags decode speculatively."""
    return any(canonical(flag) == "speculative-algorithm" for flag in flags)


_EXPERT_PARALLEL = ("ep-size", "ep", "expert-parallel-size")
_KNOWN = {*RESERVED_FLAGS, *_EXPERT_PARALLEL, *(name for rule in RULES for name in rule.names)}


def _abbreviated(name: str) -> str:
    """Return the flag of the table that `name` is the beginning of, "" when it is none or a flag of its own."""
    if name in _KNOWN:
        return ""
    return next((full for full in sorted(_KNOWN) if full.startswith(name)), "")
