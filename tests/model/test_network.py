"""The model stops before its head, in the way that Megatron supports where it does."""

from __future__ import annotations

import logging
from inspect import signature
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks
from megatron.core.models.gpt import GPTModel
from tiny_policy import build_policy, joined, make_checkpoint, make_scorings

from megatron_hdpo.model.network import HeadlessGPTModel


def test_private_method_is_replaced_only_without_an_output_processor() -> None:
    supported = "output_processor" in signature(GPTModel.forward).parameters
    assert ("_postprocess" in vars(HeadlessGPTModel)) != supported


def _outputs(path: Path) -> tuple[bool, list[str]]:
    """Score; return whether all outputs were the decoder's, and the warnings that Megatron logged since the build."""
    decoded: list[torch.Tensor] = []
    returned: list[torch.Tensor] = []
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    with joined() as context:
        policy = build_policy(path, context)
        policy.model.decoder.register_forward_hook(lambda module, inputs, output: decoded.append(output))
        policy.model.register_forward_hook(lambda module, inputs, output: returned.append(output))
        policy.model.output_layer.register_forward_pre_hook(_fail)
        assert policy.score(make_scorings())
    logging.getLogger("megatron").removeHandler(handler)
    same = [a is b for a, b in zip(decoded, returned, strict=True)]
    return len(same) > 0 and all(same), [record.getMessage() for record in logged]


def _fail(*_: object) -> None:
    raise AssertionError("the head ran")


@pytest.mark.parametrize("model", ["llama", "llama_tied"])
def test_output_is_the_input_of_the_head(model: str, tmp_path: Path) -> None:
    path = make_checkpoint(model, tmp_path)
    assert run_ranks(1, _outputs, path) == [(True, [])]
