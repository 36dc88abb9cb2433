"""What the embedded engine refuses, reports and forgets: weights, requests, failures, memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from megatron_hdpo.rollout.config import EmbeddedEngineConfig
from megatron_hdpo.rollout.embedded import EmbeddedEngine
from megatron_hdpo.types.rollouts import GenerationRequest, SamplingParams

VOCAB = 61
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
UNTIED = Qwen2Config(**SIZES, tie_word_embeddings=False)


def weights(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Made from the names of a real model, so that the test does not repeat the engine's own list."""
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in model.named_parameters()}


def engine_with(config=TIED, **settings) -> EmbeddedEngine:
    engine = EmbeddedEngine(config, EmbeddedEngineConfig(dtype="float32", **settings))
    engine.update_weights(weights(config).items(), version=0)
    return engine


def ask(name: str = "r", length: int = 4, **sampling) -> GenerationRequest:
    ids = (np.arange(length) * 7 % VOCAB).astype(np.int32)
    return GenerationRequest(name, ids, SamplingParams(**{"max_new_tokens": 6, **sampling}), seed=5)


def tokens(engine: EmbeddedEngine, request: GenerationRequest) -> list[list[int]]:
    engine.submit([request])
    (result,) = engine.results()
    return [c.token_ids.tolist() for c in result.completions]


# ---- weights


def wrong_updates() -> dict[str, tuple[object, str]]:
    good = weights(UNTIED)
    name = "model.layers.1.self_attn.k_proj.bias"
    return {
        "missing": ([(k, v) for k, v in good.items() if k != name], f"lacks 1 of {len(good)} weights: {name}"),
        "head missing though untied": ([(k, v) for k, v in good.items() if k != "lm_head.weight"], "lm_head.weight"),
        "unknown": ([*good.items(), ("model.extra", torch.zeros(1))], "unknown weight model.extra"),
        "twice": ([*good.items(), (name, good[name])], f"{name} arrived twice"),
        "shape": ([(k, v[:-1] if k == name else v) for k, v in good.items()], f"{name} has shape"),
        "dtype": ([(k, v.int() if k == name else v) for k, v in good.items()], f"{name} has dtype torch.int32"),
    }


@pytest.mark.parametrize("case", wrong_updates())
def test_wrong_update_is_refused_and_nothing_is_served_until_the_next(case):
    stream, message = wrong_updates()[case]
    engine = engine_with(UNTIED)
    before = tokens(engine, ask())
    with pytest.raises(ValueError, match=message):
        engine.update_weights(stream, version=1)
    assert "version 1 did not complete" in engine._unusable and engine.weight_version == 0
    engine.submit([ask()])
    with pytest.raises(RuntimeError, match="version 1 did not complete"):
        next(engine.results())
    engine.update_weights(weights(UNTIED).items(), version=2)
    assert not engine._unusable and engine.weight_version == 2
    (result,) = engine.results()
    assert [c.token_ids.tolist() for c in result.completions] == before
    assert result.completions[0].weight_versions.tolist() == [2] * 6


def test_tied_head_may_come_and_must_then_be_the_embedding():
    good = weights(TIED)
    assert "lm_head.weight" not in good
    engine = engine_with(TIED)
    before = tokens(engine, ask())
    engine.update_weights([("lm_head.weight", good["model.embed_tokens.weight"]), *good.items()], version=1)
    assert tokens(engine, ask()) == before
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        engine.update_weights([*good.items(), ("lm_head.weight", good["model.embed_tokens.weight"] + 1)], version=2)
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
        engine.update_weights([*good.items(), ("lm_head.weight", torch.zeros(3, 3))], version=2)


def test_no_weights_no_samples():
    engine = EmbeddedEngine(TIED, EmbeddedEngineConfig(dtype="float32"))
    assert engine.weight_version == -1 and "no weights yet" in engine._unusable
    engine.submit([ask()])
    with pytest.raises(RuntimeError, match="call update_weights"):
        list(engine.results())


def test_update_between_results_marks_every_token_with_its_version():
    engine = engine_with(max_batch_sequences=4)
    engine.submit([ask("short", max_new_tokens=2), ask("long", length=6, max_new_tokens=9)])
    results = engine.results()
    assert next(results).request_id == "short"
    engine.update_weights(weights(TIED, seed=1).items(), version=7)
    assert next(results).completions[0].weight_versions.tolist() == [0] * 2 + [7] * 7


def test_new_weights_are_the_ones_served():
    engine, fresh = engine_with(), EmbeddedEngine(TIED, EmbeddedEngineConfig(dtype="float32"))
    old = tokens(engine, ask(n=4))
    engine.update_weights(weights(TIED, seed=1).items(), version=1)
    fresh.update_weights(weights(TIED, seed=1).items(), version=1)
    assert tokens(engine, ask(n=4)) == tokens(fresh, ask(n=4)) != old


# ---- requests

WRONG_REQUESTS = {
    "empty prompt": (ask(length=0), "at least one token"),
    "float prompt": (replace(ask(), prompt_ids=np.ones(3)), "dtype float64"),
    "two-dimensional prompt": (replace(ask(), prompt_ids=np.ones((1, 3), np.int32)), "one dimension"),
    "id too large": (replace(ask(), prompt_ids=np.array([1, VOCAB], np.int32)), f"vocabulary of {VOCAB}"),
    "negative id": (replace(ask(), prompt_ids=np.array([1, -1], np.int32)), "ids from -1"),
    "too long": (ask(length=100, max_new_tokens=29), "exceed the context of 128"),
    "no new tokens": (ask(max_new_tokens=0), "max_new_tokens 0"),
    "no samples": (ask(n=0), "n 0"),
    "temperature": (ask(temperature=-0.5), "temperature -0.5"),
    "temperature nan": (ask(temperature=float("nan")), "temperature nan"),
    "top_p 0": (ask(top_p=0.0), "top_p 0.0"),
    "top_p above 1": (ask(top_p=1.5), "top_p 1.5"),
    "top_k": (ask(top_k=0), "top_k 0"),
    "top_logprobs": (ask(top_logprobs=VOCAB + 1), "top_logprobs 62"),
    "seed": (replace(ask(), seed=-1), "seed -1"),
    "cache": (ask(length=90, max_new_tokens=20), "max_batch_tokens 100"),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_wrong_request_is_refused_with_its_name_and_none_is_queued(case):
    request, message = WRONG_REQUESTS[case]
    engine = engine_with(max_batch_tokens=100)
    with pytest.raises(ValueError, match=message) as caught:
        engine.submit([ask("fine"), replace(request, request_id="bad one")])
    assert "bad one" in str(caught.value)
    assert list(engine.results()) == []


def test_the_context_can_be_filled_to_the_last_token():
    assert len(tokens(engine_with(), ask(length=100, max_new_tokens=28))[0]) == 28


def test_request_id_is_unique_among_the_outstanding():
    engine = engine_with()
    with pytest.raises(ValueError, match="r: this id"):
        engine.submit([ask(), ask()])
    engine.submit([ask()])
    with pytest.raises(ValueError, match="r: this id"):
        engine.submit([ask()])
    assert len(list(engine.results())) == 1
    assert len(tokens(engine, ask())) == 1


def test_unsupported_models_are_refused():
    with pytest.raises(ValueError, match="gpt2"):
        EmbeddedEngine(GPT2Config(), EmbeddedEngineConfig(dtype="float32"))
    with pytest.raises(ValueError, match="sliding window"):
        sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
        EmbeddedEngine(sliding, EmbeddedEngineConfig(dtype="float32"))
    with pytest.raises(ValueError, match="vocab_size 62"):
        EmbeddedEngine(TIED, EmbeddedEngineConfig(dtype="float32", vocab_size=VOCAB + 1))


# ---- the stream of results


def test_results_come_as_they_end_and_submits_are_taken_in_between():
    engine = engine_with(max_batch_sequences=4)
    engine.submit([ask("slow", max_new_tokens=40), ask("quick", length=5, max_new_tokens=3)])
    order = []
    for result in engine.results():
        order.append(result.request_id)
        if result.request_id == "quick":
            engine.submit([ask("late", length=7, max_new_tokens=2)])
    assert order == ["quick", "late", "slow"]
    assert list(engine.results()) == []


def test_a_closed_generator_loses_nothing():
    engine = engine_with()
    engine.submit([ask(f"{i}", length=i + 1, n=2) for i in range(4)])
    generator = engine.results()
    first = next(generator).request_id
    generator.close()
    assert sorted([first, *(r.request_id for r in engine.results())]) == ["0", "1", "2", "3"]


def test_more_samples_than_slots_are_drawn_in_parts():
    wide, narrow = engine_with(), engine_with(max_batch_sequences=3)
    assert tokens(wide, ask(n=8)) == tokens(narrow, ask(n=8))
    assert len({tuple(t) for t in tokens(wide, ask(n=8))}) == 8


def test_cache_stays_within_its_bound_and_slots_are_reused():
    engine = engine_with(max_batch_sequences=16, max_batch_tokens=200)
    requests = [ask(f"{i}", length=1 + i % 9, n=1 + i % 3, max_new_tokens=5 + 23 * (i % 4)) for i in range(24)]
    engine.submit(requests)
    sizes = set()
    advance = engine._advance

    def watched():
        advance()
        sizes.add((engine._cache.slots, engine._cache.columns))

    engine._advance = watched
    results = {r.request_id: [c.token_ids.tolist() for c in r.completions] for r in engine.results()}
    assert all(slots * columns <= 200 for slots, columns in sizes) and len({s for s, _ in sizes}) > 1
    roomy = engine_with()
    assert all(results[r.request_id] == tokens(roomy, r) for r in requests)


@pytest.mark.fault(
    "logits are not finite (embedded engine)",
    phase="sampling",
    seen="`rollout/generation_failed`, and the error in the log",
    lost="that sample",
)
def test_a_sample_with_broken_logits_is_an_error_not_a_completion():
    engine = engine_with()
    broken = weights(TIED)
    broken["model.embed_tokens.weight"][3] = float("nan")
    engine.update_weights(broken.items(), 1)
    engine.submit([ask(n=3)])
    (result,) = engine.results()
    assert result.completions == []
    assert result.errors == [f"sample {i}: logits are not finite at response token 0" for i in range(3)]


def test_an_exception_of_the_model_passes_and_the_engine_is_empty_afterwards():
    engine = engine_with()
    decode = engine._model.decode
    engine.submit([ask(n=2), ask("other", length=3)])

    def fail(*_):
        raise MemoryError("no room")

    engine._model.decode = fail
    with pytest.raises(MemoryError):
        list(engine.results())
    engine._model.decode = decode
    assert list(engine.results()) == []
    assert len(tokens(engine, ask(n=2))) == 2


# ---- memory


def test_released_memory_is_gone_and_an_update_brings_the_engine_back():
    engine = engine_with()
    before = tokens(engine, ask(n=4))
    assert engine._cache.slots and sum(p.numel() for p in engine._model._model.parameters())
    engine.release()
    assert engine._cache.slots == 0 and sum(p.numel() for p in engine._model._model.parameters()) == 0
    assert "released" in engine._unusable
    engine.update_weights(weights(TIED).items(), 1)
    assert tokens(engine, ask(n=4)) == before


def test_release_refuses_while_requests_are_outstanding_and_close_does_not():
    engine = engine_with()
    engine.submit([ask()])
    with pytest.raises(RuntimeError, match="1 requests outstanding"):
        engine.release()
    engine.close()
    engine.close()
    assert engine._unusable == "closed" and list(engine.results()) == []


@pytest.mark.parametrize(("dtype", "name"), [("float32", ""), ("bfloat16", "config.json")])
def test_model_comes_from_a_folder_or_file_in_the_dtype_asked_for(tmp_path, dtype, name):
    TIED.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such file"):
        EmbeddedEngine(tmp_path / "nowhere", EmbeddedEngineConfig(dtype=dtype))
    engine = EmbeddedEngine(tmp_path / name, EmbeddedEngineConfig(dtype=dtype))
    engine.update_weights(((k, v.double()) for k, v in weights(TIED).items()), 0)
    assert {str(p.dtype) for p in engine._model._model.parameters()} == {f"torch.{dtype}"}
    completion = tokens(engine, ask(n=2))
    assert len(completion) == 2
