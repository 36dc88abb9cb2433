"""Tokens go to the experts chosen for them: gradients and scores against float64 with those experts forced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from full_logits import load, reference_score, reference_step
from layout_cases import share
from tiny_policy import EXPERTS, SEVERAL, SIZES, SPEC, build_policy, gradients_of, joined, make_checkpoint
from tiny_policy import make_examples as plain_examples
from tiny_policy import make_scorings as plain_scorings
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_hdpo.model.packing import RowLayout, pack
from megatron_hdpo.model.routing_replay import pack_routing
from megatron_hdpo.types.learning import Example, Scoring

LAYERS, COUNT, PER_TOKEN = SIZES["num_hidden_layers"], EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
FULL = {"recompute": "full"}
OF_EXPERTS = {"recompute": "selective", "recompute_modules": ["moe"]}
PIPELINE = {"pipeline": 2, "virtual_stages": 2}
# name: (ranks, layout, more of the model's section)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one_rank": (1, {}, {}),
    "recompute": (1, {}, FULL),
    "recompute_experts": (1, {}, OF_EXPERTS),
    "ep2": (2, {"expert": 2}, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}, {}),
    "cp2": (2, {"context": 2}, {}),
    "pp2": (2, {"pipeline": 2}, OF_EXPERTS),
    "pp2_vp2": (2, PIPELINE, {}),
    "pp2_vp2_recompute": (2, PIPELINE, FULL),
    "pp2_vp2_recompute_experts": (2, PIPELINE, OF_EXPERTS),
}
Tensors = dict[str, np.ndarray]


def chosen_at_random(seed: int, length: int) -> np.ndarray:
    """[length - 1, L, K], no expert twice for a token."""
    order = np.random.default_rng(seed).random((length - 1, LAYERS, COUNT)).argsort(axis=-1)
    return order[..., :PER_TOKEN].astype(np.uint8)


def examples_with_others() -> list[Example]:
    """Return examples; for a few the router chooses all experts, for the others only those of the last token."""
    return [
        replace(e, routed_experts=None if index in (1, 6) else chosen_at_random(index, e.num_tokens))
        for index, e in enumerate(plain_examples())
    ]


def scorings_with_others() -> list[Scoring]:
    return [
        replace(
            s, routed_experts=chosen_at_random(100 + i, len(s.context_ids) + len(s.response_ids)) if i % 3 else None
        )
        for i, s in enumerate(plain_scorings())
    ]


def examples_with_own(path: Path) -> list[Example]:
    """With the experts that the routers choose anyway."""
    model, examples = load(path), []
    for example in plain_examples():
        ids = torch.tensor([*example.prompt_ids.tolist(), *example.response_ids.tolist()])
        with torch.no_grad():
            logits = model(ids[None], output_router_logits=True).router_logits
        own = torch.stack([of_layer.topk(PER_TOKEN).indices for of_layer in logits], dim=1)
        examples.append(replace(example, routed_experts=own[:-1].flip(-1).numpy().astype(np.uint8)))
    return examples


@contextmanager
def forced(sequences: Sequence[tuple[int, np.ndarray | None]]) -> Iterator[None]:
    """Routers of `transformers` that send the tokens of one sequence after the other (length, experts) to its experts,
    with a softmax over all experts, normalised over the chosen ones where the model does so."""
    queue = iter([(n, None if e is None else e[:, layer]) for n, e in sequences for layer in range(LAYERS)])

    def forward(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = hidden.reshape(-1, router.hidden_dim) @ router.weight.T
        probs = logits.softmax(-1)
        length, experts_TK = next(queue)
        assert length == len(logits)
        chosen = probs.topk(router.top_k).indices
        if experts_TK is not None:
            chosen[:-1] = torch.from_numpy(experts_TK.astype(np.int64))
        weights = probs.gather(1, chosen)
        return logits, weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights, chosen

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3MoeTopKRouter, "forward", forward)
        yield
    assert next(queue, None) is None


def expected_gradients(path: Path, examples: list[Example]) -> Tensors:
    with forced([(e.num_tokens, e.routed_experts) for e in examples]):
        return reference_step(path, examples, SPEC).gradients


def expected_logprobs(path: Path, scorings: list[Scoring]) -> dict[Any, np.ndarray]:
    with forced([(len(s.context_ids) + len(s.response_ids), s.routed_experts) for s in scorings]):
        model = load(path)
        return {s.key: reference_score(model, s)[0] for s in scorings}


def distance(actual: Tensors, expected: Tensors) -> float:
    """The largest of any tensor, over its norm (or a thousandth of all tensors' norm)."""
    total = np.sqrt(sum(np.sum(tensor.astype(np.float64) ** 2) for tensor in expected.values()))
    assert actual.keys() == expected.keys()
    return max(np.linalg.norm(actual[n] - e) / max(np.linalg.norm(e), 1e-3 * total) for n, e in expected.items())


def _outcomes(names: list[str], path: Path, own: list[Example]) -> dict[str, Any]:
    """Return by case: gradients with other experts, with the own ones, without any; log-probs."""
    found = {}
    for name in names:
        _, layout, model = CASES[name]
        with joined(**layout) as context:
            policy = build_policy(path, context, budget=SEVERAL, model=model)
            gradients = []
            for examples in (examples_with_others(), own, plain_examples()):
                policy.accumulate_gradients(share(policy, examples), SPEC)
                gradients.append(gradients_of(policy))
            scores = policy.score(scorings_with_others()[context.dp_rank :: context.dp_size])
            found[name] = *gradients, {key: score.logprobs_T for key, score in scores.items()}
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def outcomes(path: Path) -> dict[str, list[Any]]:
    """Run the cases; return by case the results of its ranks."""
    own, found = examples_with_own(path), {}
    for size in (1, 2):
        names = [name for name, case in CASES.items() if case[0] == size]
        ranks = run_ranks(size, _outcomes, names, path, own)
        found |= {name: [rank[name] for rank in ranks] for name in names}
    return found


@pytest.fixture(scope="module")
def expected(path: Path) -> Tensors:
    return expected_gradients(path, examples_with_others())


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_chosen_experts(case: str, outcomes: Any, expected: Tensors) -> None:
    others, own, plain, _ = outcomes[case][0]
    assert distance(others, expected) < 2e-5
    assert distance(plain, expected) > 0.1, "the choice must make a difference, or this test sees nothing"
    assert distance(own, plain) < 2e-6


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_chosen_experts(case: str, outcomes: Any, path: Path) -> None:
    scores: dict[Any, np.ndarray] = {}
    for *_, of_rank in outcomes[case]:
        scores |= of_rank
    wanted = expected_logprobs(path, scorings_with_others())
    assert scores.keys() == wanted.keys()
    for key, logprobs_T in wanted.items():
        assert scores[key] == pytest.approx(logprobs_T, abs=2e-5)


def test_routing_that_is_not_normalised(path: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(path, tmp_path / "model"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"norm_topk_prob": False}))
    (found,) = run_ranks(1, _outcomes, ["one_rank"], other, examples_with_own(other))
    others, own, plain, _ = found["one_rank"]
    assert distance(others, expected_gradients(other, examples_with_others())) < 2e-5
    assert distance(own, plain) < 2e-6


def _packed(lengths: Sequence[int], experts: Sequence[np.ndarray | None], **layout: int) -> Any:
    packed = pack([np.arange(n) for n in lengths], torch.device("cpu"), RowLayout(**layout))
    return pack_routing(packed, experts, lengths), packed


def test_rows_of_padding_and_last_tokens_have_no_experts() -> None:
    first, third = chosen_at_random(0, 3), chosen_at_random(1, 4)
    rows, _ = _packed([3, 2, 4], [first, None, third], multiple=4)
    found = rows.numpy()
    assert found.shape == (12, LAYERS, PER_TOKEN)
    assert (found[:2] == first).all() and (found[5:8] == third).all()
    assert (found[[2, 3, 4, 8, 9, 10, 11]] == -1).all()


def test_context_ranks_have_the_experts_of_their_rows() -> None:
    experts = [chosen_at_random(2, 5), chosen_at_random(3, 7)]
    whole, _ = _packed([8, 8], [np.pad(e, ((0, 8 - 1 - len(e)), (0, 0), (0, 0))) for e in experts])
    for rank in range(2):
        rows, packed = _packed([5, 7], experts, context=2, context_rank=rank)
        real = rows.numpy()[..., 0, 0] >= 0
        assert (rows.numpy()[real] == whole.numpy()[packed.own_rows_M][real]).all()
        assert real.sum() in range(4, 7)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "other tokens": (lambda: _packed([5], [chosen_at_random(0, 6)]), "experts of 5 tokens for a sequence of 5"),
    "other models": (
        lambda: _packed([3, 3], [chosen_at_random(0, 3), chosen_at_random(0, 3)[:, :1]]),
        "different layers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_of_something_else_are_refused(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        make()
