"""The embedded engine against full-sequence forwards of the same transformers model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.types.rollouts import Completion, GenerationRequest, GenerationResult, SamplingParams

VOCAB = 97
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True
    ),
}


def random_model(config: PretrainedConfig, seed: int = 0) -> torch.nn.Module:
    """Weights large enough that attention and positions matter: a wrong mask must move the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.25))
            if "norm" in name:
                parameter.add_(1.0)
    return model


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """As a checkpoint has them: every expert's matrices apart."""
    return [pair for name, parameter in model.named_parameters() for pair in _saved(name, parameter.detach())]


def _saved(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return [(name, value)]
    stem, leaf = name.rsplit(".", 1)
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[leaf]
    return [
        (f"{stem}.{expert}.{part}.weight", matrix)
        for expert, matrices in enumerate(value)
        for part, matrix in zip(parts, matrices.chunk(len(parts)), strict=True)
    ]


def engine_for(model: torch.nn.Module, **settings) -> EmbeddedEngine:
    engine = EmbeddedEngine(model.config, EmbeddedEngineConfig(dtype="float32", **settings))
    engine.update_weights(weights_of(model), version=3)
    return engine


def request(name: str, length: int, **sampling) -> GenerationRequest:
    ids = np.random.default_rng(length).integers(0, VOCAB, length).astype(np.int32)
    return GenerationRequest(name, ids, SamplingParams(**{"max_new_tokens": 12, **sampling}), seed=length)


def run(engine: EmbeddedEngine, requests: list[GenerationRequest]) -> dict[str, GenerationResult]:
    engine.submit(requests)
    return {result.request_id: result for result in engine.results()}


def full_forward_logprobs(
    model: torch.nn.Module, prompt: np.ndarray, completion: Completion, temperature: float
) -> torch.Tensor:
    """float32 [T, V]: the reference, one forward over prompt and response without any cache."""
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)


def experts_of_full_forward(model: torch.nn.Module, prompt: np.ndarray, completion: Completion) -> np.ndarray:
    """[P + T - 1, layers, K], sorted: those of all tokens but the last."""
    ids = torch.from_numpy(np.concatenate([prompt, completion.token_ids[:-1]]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(ids, output_router_logits=True).router_logits
    return torch.stack([of_layer.topk(2).indices for of_layer in logits], dim=1).sort(-1).values.numpy()


def test_experts_are_those_that_the_tokens_went_to() -> None:
    """With more samples than slots, of prompts of different lengths; some are not asked for theirs."""
    model = random_model(CONFIGS["qwen3_moe"])
    engine = engine_for(model, max_batch_sequences=5, prefill_tokens=16)
    stops = tuple(range(12))
    requests = [request(f"r{i}", 3 + 4 * i, n=3, routed_experts=i != 1, stop_token_ids=stops) for i in range(4)]
    results = run(engine, requests)
    lengths = set()
    for asked in requests:
        for completion in results[asked.request_id].completions:
            lengths.add(len(completion.token_ids))
            if asked.request_id == "r1":
                assert completion.routed_experts is None
                continue
            assert completion.routed_experts.dtype == np.uint8
            wanted = experts_of_full_forward(model, asked.prompt_ids, completion)
            assert (np.sort(completion.routed_experts, axis=-1) == wanted).all()
    assert len(lengths) > 3, "rows end at different steps"
    with pytest.raises(ValueError, match="the model has no experts"):
        engine_for(random_model(CONFIGS["llama"])).submit([request("r", 3, routed_experts=True)])


def mixed_requests() -> list[GenerationRequest]:
    """Different prompt lengths, n, temperatures, limits and stop tokens: rows end at different steps."""
    stops = tuple(range(0, 12))
    return [
        request("a", 3, n=5, stop_token_ids=stops),
        request("b", 17, n=1, temperature=0.7, top_logprobs=4),
        request("c", 9, n=3, temperature=0.0),
        request("d", 1, n=4, top_p=0.8, stop_token_ids=stops, max_new_tokens=30),
        request("e", 33, n=2, top_k=5, top_logprobs=VOCAB),
        request("f", 9, n=6, temperature=1.3, stop_token_ids=stops, max_new_tokens=1),
        request("g", 5, n=7, stop_token_ids=stops, max_new_tokens=40),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_equal_full_forward(name):
    model = random_model(CONFIGS[name])
    requests = mixed_requests()
    results = run(engine_for(model, max_batch_sequences=8, prefill_tokens=40), requests)
    assert results.keys() == {r.request_id for r in requests}
    reasons = set()
    for item in requests:
        result = results[item.request_id]
        assert len(result.completions) == item.sampling.n and not result.errors
        for completion in result.completions:
            reference_TV = full_forward_logprobs(model, item.prompt_ids, completion, item.sampling.temperature)
            expected = reference_TV.gather(1, torch.from_numpy(completion.token_ids.astype(np.int64))[:, None])[:, 0]
            np.testing.assert_allclose(completion.logprobs, expected.numpy(), atol=1e-4)
            check_tops(completion, reference_TV, item.sampling.top_logprobs)
            assert (completion.weight_versions == 3).all() and len(completion.weight_versions) == len(expected)
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def check_tops(completion: Completion, reference_TV: torch.Tensor, k: int) -> None:
    if not k:
        assert completion.top_logprobs is None
        return
    tops = completion.top_logprobs
    assert tops.ids_TK.shape == tops.logprobs_TK.shape == (len(completion.token_ids), k)
    assert tops.ids_TK.dtype == np.int32 and tops.logprobs_TK.dtype == np.float32
    expected = reference_TV.topk(k, dim=-1)
    np.testing.assert_allclose(tops.logprobs_TK, expected.values.numpy(), atol=1e-4)
    at_ids = reference_TV.gather(1, torch.from_numpy(tops.ids_TK.astype(np.int64)))
    np.testing.assert_allclose(tops.logprobs_TK, at_ids.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_sample_is_the_same_alone_and_in_any_batch(name):
    model = random_model(CONFIGS[name])
    requests = mixed_requests()
    together = run(engine_for(model), requests)
    narrow = run(engine_for(model, max_batch_sequences=5, prefill_tokens=1), list(reversed(requests)))
    alone_engine = engine_for(model)
    for item in requests:
        alone = run(alone_engine, [item])[item.request_id]
        for other in (together, narrow):
            for mine, its in zip(alone.completions, other[item.request_id].completions, strict=True):
                np.testing.assert_array_equal(mine.token_ids, its.token_ids)
                assert mine.finish_reason == its.finish_reason


def test_greedy_is_argmax_of_full_forward_and_seeds_matter():
    model = random_model(CONFIGS["qwen2"])
    engine = engine_for(model)
    item = request("g", 6, n=2, temperature=0.0)
    for completion in run(engine, [item])["g"].completions:
        reference_TV = full_forward_logprobs(model, item.prompt_ids, completion, 0.0)
        np.testing.assert_array_equal(completion.token_ids, reference_TV.argmax(-1).numpy())
    sampled = run(engine, [request("s", 6, n=3)])["s"].completions
    assert len({tuple(c.token_ids) for c in sampled}) == 3
    reseeded = GenerationRequest("s", item.prompt_ids, request("s", 6, n=3).sampling, seed=1234)
    assert [tuple(c.token_ids) for c in run(engine, [reseeded])["s"].completions] != [
        tuple(c.token_ids) for c in sampled
    ]


def test_stop_token_is_last_and_only_last():
    stops = tuple(range(0, 30))
    completions = run(engine_for(random_model(CONFIGS["llama"])), [request("a", 4, n=40, stop_token_ids=stops)])
    lengths = set()
    for completion in completions["a"].completions:
        assert not np.isin(completion.token_ids[:-1], stops).any()
        assert (completion.finish_reason == "stop") == bool(np.isin(completion.token_ids[-1], stops))
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12
        lengths.add(len(completion.token_ids))
    assert len(lengths) > 3, "rows end at different steps"


def test_padded_vocabulary_is_never_sampled_and_carries_no_probability():
    model = random_model(CONFIGS["llama"])
    with torch.no_grad():
        model.model.embed_tokens.weight[90:] *= 5
    engine = EmbeddedEngine(model.config, EmbeddedEngineConfig(dtype="float32", vocab_size=90))
    engine.update_weights(weights_of(model), 0)
    item = GenerationRequest("a", np.arange(5, dtype=np.int32), SamplingParams(20, n=8, top_logprobs=90))
    for completion in run(engine, [item])["a"].completions:
        assert completion.token_ids.max() < 90 and completion.top_logprobs.ids_TK.max() < 90
        np.testing.assert_allclose(np.exp(completion.top_logprobs.logprobs_TK).sum(-1), 1.0, atol=1e-5)
        ids = torch.from_numpy(np.concatenate([item.prompt_ids, completion.token_ids]).astype(np.int64))[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits[0, 4:-1, :90], -1)
        np.testing.assert_allclose(
            completion.logprobs, expected.numpy()[np.arange(20), completion.token_ids], atol=1e-4
        )
