"""An optimizer on the CPU takes the steps that one on the device takes, and its checkpoints bring it back.

Megatron's HybridDeviceOptimizer asks tensors whether they are on a GPU. Here a stand-in answers: all are, but the
copies that it makes for the host. What it computes is its own; that copies and updates overlap, only a GPU can show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed_helper import run_ranks
from layout_cases import share
from megatron.core.optimizer import optimizer_config
from tiny_policy import OPTIMIZER, SPEC, build_policy, joined, make_checkpoint, make_examples, weights_of
from torch.overrides import TorchFunctionMode

from megatron_hdpo.checkpoint.store import CheckpointStore
from megatron_hdpo.model.config import OptimizerConfig
from megatron_hdpo.model.policy import Policy
from megatron_hdpo.parallel import cpu
from megatron_hdpo.parallel.context import ParallelContext


class PretendedGpu(TorchFunctionMode):
    """Stand-in for a GPU: every tensor is on it, except results of `Tensor.cpu` and their copies."""

    copies = (torch.Tensor.detach, torch.Tensor.clone, torch.Tensor.float)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cpu:
            args[0].rests_on_host = True
            return args[0]
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func == torch.Tensor.is_cuda.__get__:
            return not getattr(args[0], "rests_on_host", False)
        if func is torch.Tensor.to and args[1:] == ("cuda",):
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func in self.copies and getattr(args[0], "rests_on_host", False):
            result.rests_on_host = True
        return result


def _policy(path: Path, context: ParallelContext, optimizer: OptimizerConfig) -> Policy:
    with PretendedGpu():
        return build_policy(path, context, optimizer=optimizer, dtype="bfloat16")


def _update(policy: Policy, seed: int) -> dict[str, Any]:
    metrics = policy.accumulate_gradients(share(policy, make_examples(seed)), SPEC)
    with PretendedGpu():
        metrics |= policy._optimizer_step()
    return {"metrics": metrics, "weights": weights_of(policy)}


def run_cases(path: Path, folder: Path) -> dict[str, Any]:
    cpu._Stream.wait = lambda *_: None  # type: ignore[attr-defined]
    optimizer_config.is_te_min_version = lambda version: True  # all that it asks Transformer Engine for
    found: dict[str, Any] = {}
    with joined() as context:
        store = CheckpointStore(folder, context, keep=2)
        stores = {"resumed": store, "resharded": CheckpointStore(folder / "any", context, keep=2, reshardable=True)}
        for share_of in (0.0, 0.5, 1.0):
            optimizer = OPTIMIZER.model_copy(update={"offload": share_of})
            policy = _policy(path, context, optimizer)
            steps = [_update(policy, seed) for seed in (0, 3)]
            if share_of:
                found[f"kinds {share_of}"] = _sub_optimizers(policy)
            with PretendedGpu():
                saved = {way: to.save(2, policy) for way, to in stores.items()}
            found[str(share_of)] = [*steps, _update(policy, 4)]
            for way, path_saved in saved.items():
                fresh = _policy(path, context, optimizer)
                with PretendedGpu():
                    store.load(path_saved, fresh)
                found[f"counts {way} {share_of}"] = _counts_and_waste(fresh)
                found[f"{way} {share_of}"] = _update(fresh, 4)
        other = _policy(path, context, OPTIMIZER)
        store.load(saved["resumed"], other)
        found["resumed on the device"] = _update(other, 4)
        other = _policy(path, context, OPTIMIZER)
        store.load(saved["resharded"], other)
        found["resharded on the device"] = _update(other, 4)
        unmoved = _policy(path, context, optimizer)
        weights = weights_of(unmoved)
        with PretendedGpu():
            store.save(0, unmoved)
        found["unmoved"] = weights, weights_of(unmoved), _update(unmoved, 0)
    return found


def _counts_and_waste(policy: Policy) -> tuple[int, int]:
    """Groups that tell their parts a step before each (Transformer Engine's Adam counts there itself), and bytes that
    moments keep in memory beside their own."""
    (part,) = policy.optimizer.chained_optimizers
    groups = sum("step" in group for group in part.optimizer.param_groups)
    tensors = [v for moments in part.optimizer.state.values() for v in moments.values() if isinstance(v, torch.Tensor)]
    return groups, sum(v.untyped_storage().nbytes() - v.nbytes for v in tensors if v.numel() > 1)


def _sub_optimizers(policy: Policy) -> tuple[int, int]:
    """Elements whose moments are on the host, and on the device."""
    hybrid = policy.optimizer.chained_optimizers[0].optimizer
    count = lambda optimizers: sum(p.numel() for o in optimizers for g in o.param_groups for p in g["params"])  # noqa: E731
    return count(hybrid.cpu_optimizers), count([hybrid.gpu_optimizer] if hybrid.gpu_optimizer else [])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("offload")
    return run_ranks(2, run_cases, make_checkpoint("llama", folder), folder, fresh=True)


@pytest.mark.parametrize("share_of", ["0.5", "1.0"])
def test_the_steps_are_those_of_the_device(found: list[dict[str, Any]], share_of: str) -> None:
    for rank in found:
        for here, there in zip(rank[share_of], rank["0.0"], strict=True):
            assert here["metrics"] == pytest.approx(there["metrics"], rel=1e-5)
            assert here["metrics"]["train/grad_norm"] > OPTIMIZER.clip_grad
            for name, weights in there["weights"].items():
                np.testing.assert_allclose(here["weights"][name], weights, atol=1e-6, err_msg=name)


def test_the_share_is_offloaded(found: list[dict[str, Any]]) -> None:
    for rank in found:
        host, device = rank["kinds 0.5"]
        assert host > 0.4 * (host + device) and device > 0
        assert rank["kinds 1.0"] == (host + device, 0)


@pytest.mark.parametrize("way", ["resumed", "resharded"])
@pytest.mark.parametrize("share_of", ["0.0", "0.5", "1.0"])
def test_a_resumed_run_goes_on(found: list[dict[str, Any]], share_of: str, way: str) -> None:
    for rank in found:
        resumed, third = rank[f"{way} {share_of}"], rank[share_of][2]
        for name, weights in third["weights"].items():
            np.testing.assert_array_equal(resumed["weights"][name], weights, err_msg=name)


@pytest.mark.parametrize("way", ["resumed", "resharded"])
def test_the_share_may_change(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        for name, weights in rank["1.0"][2]["weights"].items():
            np.testing.assert_array_equal(rank[f"{way} on the device"]["weights"][name], weights, err_msg=name)


@pytest.mark.parametrize("way", ["resumed", "resharded"])
@pytest.mark.parametrize("share_of", ["0.5", "1.0"])
def test_a_resumed_optimizer_counts_for_itself_and_keeps_its_share_alone(
    found: list[dict[str, Any]], share_of: str, way: str
) -> None:
    for rank in found:
        assert rank[f"counts {way} {share_of}"] == (0, 0)


def test_a_checkpoint_before_the_first_step_changes_nothing(found: list[dict[str, Any]]) -> None:
    for rank in found:
        before, after, first = rank["unmoved"]
        for name, weights in before.items():
            np.testing.assert_array_equal(after[name], weights, err_msg=name)
            np.testing.assert_array_equal(first["weights"][name], rank["0.0"][0]["weights"][name], err_msg=name)
