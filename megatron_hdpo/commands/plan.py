"""`megatron_hdpo plan`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command, add_recipe
from megatron_hdpo.commands.numbers import integer, real


def _add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="h100 or h200 (default h100)")
    parser.add_argument("--nodes", type=integer(1), default=1, metavar="N", help="nodes of the cluster (default 1)")
    parser.add_argument("--gpus-per-node", type=integer(1), default=8, metavar="N", help="GPUs of a node (default 8)")
    parser.add_argument(
        "--model", metavar="MODEL", help="plan for this model in place of model.path: qwen2.5-7b, or a folder"
    )
    parser.add_argument(
        "--rollout-gpus", type=integer(0), default=0, metavar="N", help="GPUs of separate servers (default 0)"
    )
    parser.add_argument(
        "--cliff-rate", type=real(0, 1), default=0.25, metavar="X", help="share of prompts with wrong samples only"
    )
    parser.add_argument(
        "--solved-rate", type=real(0, 1), default=0.0, metavar="X", help="share of prompts with right samples only"
    )
    parser.add_argument(
        "--privileged-success", type=real(0, 1), default=0.5, metavar="X", help="share of privileged rollouts kept"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=integer(1),
        metavar="N",
        help="mean; default a quarter of data.prompts.max_prompt_tokens",
    )
    parser.add_argument(
        "--privileged-prompt-tokens", type=integer(1), metavar="N", help="mean; default a quarter of the longest"
    )
    parser.add_argument(
        "--response-tokens", type=integer(1), metavar="N", help="mean; default half of rollout.max_new_tokens"
    )


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.planner.command import plan_recipe

    print(plan_recipe(arguments.recipe, arguments.overrides, arguments))


COMMAND = Command(
    "plan",
    "Estimate the memory and time of a step on a cluster.",
    _add,
    _plan,
    description="Needs no GPU, no weights and no data; proposes faster layouts.",
    examples=("examples/qwen2.5-7b/hdpo.yaml --model qwen2.5-7b --gpu h100 --nodes 2",),
)
