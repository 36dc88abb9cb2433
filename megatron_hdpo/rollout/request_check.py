"""Check of requests before anything is sampled, because some of them would crash a server."""

from __future__ import annotations

import numpy as np

from megatron_hdpo.types.rollouts import GenerationRequest


def problem_with(request: GenerationRequest, vocab_size: int, context_length: int) -> str:
    """Return what is wrong with a request, or an empty string."""
    prompt, sampling = request.prompt_ids, request.sampling
    if prompt.ndim != 1 or prompt.size == 0:
        return f"prompt_ids has shape {prompt.shape}, want at least one token in one dimension"
    if not np.issubdtype(prompt.dtype, np.integer):
        return f"prompt_ids has dtype {prompt.dtype}, want integers"
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        return f"prompt holds ids from {prompt.min()} to {prompt.max()}, outside the vocabulary of {vocab_size}"
    if sampling.max_new_tokens < 1 or sampling.n < 1:
        return f"max_new_tokens {sampling.max_new_tokens} and n {sampling.n} must both be at least 1"
    if len(prompt) + sampling.max_new_tokens > context_length:
        return f"{len(prompt)} prompt + {sampling.max_new_tokens} new tokens exceed the context of {context_length}"
    if not 0 <= sampling.temperature < float("inf"):
        return f"temperature {sampling.temperature} is not a finite number >= 0"
    if not 0 < sampling.top_p <= 1:
        return f"top_p {sampling.top_p} is not in (0, 1]"
    if sampling.top_k is not None and sampling.top_k < 1:
        return f"top_k {sampling.top_k} is not at least 1; None means no limit"
    if not 0 <= sampling.top_logprobs <= vocab_size:
        return f"top_logprobs {sampling.top_logprobs} is not between 0 and the vocabulary of {vocab_size}"
    if not 0 <= request.seed < 2**64:
        return f"seed {request.seed} is not in [0, 2**64)"
    return ""


def problem_with_room(request: GenerationRequest, max_prompt: int, max_sequence: int) -> str:
    """Return why servers would refuse a request or cut its response short, or an empty string.

    max_prompt: longest prompt, and max_sequence: longest prompt plus response, in tokens.
    """
    prompt, response = len(request.prompt_ids), request.sampling.max_new_tokens
    if prompt > max_prompt:
        return f"a prompt of {prompt} tokens; the servers accept at most {max_prompt}"
    if prompt + response > max_sequence:
        return f"{prompt} prompt + {response} new tokens; the servers sample at most {max_sequence} together"
    return ""
