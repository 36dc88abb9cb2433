"""Estimate what a step of a model costs on a cluster, from shapes alone; no GPU and no weights are needed.

    python tools/scaling_study.py plan --model qwen2.5-32b --gpu h100 --nodes 4 --prompts 128 --samples 16
    python tools/scaling_study.py scaling --gpu h100 --out benchmarks/scaling
    python tools/scaling_study.py published

plan: the fastest layouts that fit, the whole plan of the fastest, and why others do not fit. scaling: weak and strong
scaling of the built-in shapes as JSON and PNG. published: planned times beside published ones, and the errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import _environment  # noqa: F401
from _published import NOT_COMPARED, comparisons
from _scaling_points import Point, strong, weak

from megatron_hdpo.costs.cluster import GPUS, cluster_of
from megatron_hdpo.costs.errors import PlanError
from megatron_hdpo.costs.layout import Layout
from megatron_hdpo.costs.workload import RolloutSetup, TrainerMemory, Workload
from megatron_hdpo.planner.plan import plan, search
from megatron_hdpo.planner.shapes import SHAPES, architecture_of
from megatron_hdpo.planner.text import describe, ranking, table

_COUNTS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
_WEAK_PROMPTS, _STRONG_PROMPTS = 4, 1024


def main() -> None:
    """Run the command of the command line."""
    arguments = _arguments()
    try:
        arguments.run(arguments)
    except PlanError as error:
        sys.exit(f"PlanError: {error}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("plan")
    one.add_argument("--model", required=True, help=f"Hugging Face folder, or one of {', '.join(SHAPES)}")
    one.add_argument("--gpu", default="h100", choices=list(GPUS))
    one.add_argument("--nodes", type=int, default=1)
    one.add_argument("--gpus-per-node", type=int, default=8)
    one.add_argument("--layout", type=int, nargs=2, metavar=("TP", "PP"), help="this one only, with SP where TP > 1")
    one.add_argument("--context", type=int, default=1, help="with --layout: context-parallel ranks")
    one.add_argument("--expert", type=int, default=1, help="with --layout: expert-parallel ranks")
    one.add_argument("--virtual-stages", type=int, default=1, help="with --layout: chunks of layers per stage")
    one.add_argument("--recompute", action="store_true", help="with --layout: recompute every layer")
    one.add_argument("--engine", default="colocated", choices=["embedded", "colocated", "separate"])
    one.add_argument("--server-gpus", type=int, default=1, help="GPUs of one server")
    one.add_argument("--rollout-gpus", type=int, default=0, help="GPUs of separate servers")
    one.add_argument("--prompts", type=int, default=_STRONG_PROMPTS)
    _workload_options(one)
    one.set_defaults(run=_plan)
    study = commands.add_parser("scaling")
    study.add_argument("--gpu", default="h100", choices=list(GPUS))
    study.add_argument("--out", type=Path, required=True, help="path of the results without their .json and .png")
    _workload_options(study)
    study.set_defaults(run=_scaling)
    commands.add_parser("published").set_defaults(run=_published)
    return parser.parse_args()


def _workload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=16, help="rollouts per prompt")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="mean")
    parser.add_argument("--response-tokens", type=int, default=2048, help="mean")
    parser.add_argument("--longest-response", type=int, default=6144)
    parser.add_argument("--privileged-prompt-tokens", type=int, default=1024, help="mean")
    parser.add_argument("--cliff-rate", type=float, default=0.25, help="share of prompts that every sample fails")
    parser.add_argument("--privileged-rollouts", type=int, default=8, help="per cliff; 0: GRPO")
    parser.add_argument("--privileged-success", type=float, default=0.5, help="share of them that are distilled")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--fp8", action="store_true", help="the layers' products in FP8")
    parser.add_argument("--offload", type=float, default=0.0, help="share of the optimizer in host memory")
    parser.add_argument(
        "--trainer-memory",
        default="keep",
        choices=get_args(TrainerMemory),
        help="what of the trainer leaves the GPUs while colocated servers sample",
    )
    parser.add_argument("--teacher", default="policy", choices=["policy", "frozen", "snapshot", "ema"])


def _workload(arguments: argparse.Namespace, prompts: int) -> Workload:
    return Workload(
        prompts=prompts,
        samples=arguments.samples,
        prompt_tokens=arguments.prompt_tokens,
        response_tokens=arguments.response_tokens,
        longest_response=arguments.longest_response,
        privileged_prompt_tokens=arguments.privileged_prompt_tokens,
        cliff_rate=arguments.cliff_rate,
        privileged_rollouts=arguments.privileged_rollouts,
        privileged_success=arguments.privileged_success,
        micro_batch_tokens=arguments.micro_batch_tokens,
        teacher=arguments.teacher if arguments.privileged_rollouts else "none",
    )


def _common(arguments: argparse.Namespace) -> Layout:
    """Return the settings that a search does not vary."""
    return Layout(fp8=arguments.fp8, offload=arguments.offload, overlap=True)


def _plan(arguments: argparse.Namespace) -> None:
    architecture = architecture_of(arguments.model)
    cluster = cluster_of(arguments.gpu, arguments.nodes, arguments.gpus_per_node)
    workload = _workload(arguments, arguments.prompts)
    rollouts = RolloutSetup(
        arguments.engine, arguments.server_gpus, arguments.rollout_gpus, trainer_memory=arguments.trainer_memory
    )
    if arguments.layout:
        tensor, pipeline = arguments.layout
        gpus = cluster.gpus - rollouts.gpus
        ranks = tensor * pipeline * arguments.context
        if gpus % ranks:
            raise PlanError(f"TP {tensor} x CP {arguments.context} x PP {pipeline} does not divide {gpus} GPUs")
        layout = replace(
            _common(arguments),
            tensor=tensor,
            pipeline=pipeline,
            data=gpus // ranks,
            sequence=tensor > 1,
            recompute=arguments.recompute,
            context=arguments.context,
            expert=arguments.expert,
            virtual_stages=arguments.virtual_stages,
        )
        print(describe(plan(architecture, cluster, layout, workload, rollouts)))
        return
    found = search(architecture, cluster, workload, rollouts, _common(arguments))
    print(ranking(found))
    if found.fitting:
        print("\n" + describe(found.fitting[0]))


def _scaling(arguments: argparse.Namespace) -> None:
    gpu, rollouts = GPUS[arguments.gpu], RolloutSetup("colocated", trainer_memory=arguments.trainer_memory)
    studies: dict[str, dict[str, list[Point]]] = {"weak": {}, "strong": {}}
    for name, architecture in SHAPES.items():
        few, many = (_workload(arguments, prompts) for prompts in (_WEAK_PROMPTS, _STRONG_PROMPTS))
        studies["weak"][name] = weak(architecture, gpu, _COUNTS, few, rollouts=rollouts, base=_common(arguments))
        studies["strong"][name] = strong(architecture, gpu, _COUNTS, many, rollouts=rollouts, base=_common(arguments))
    rows = {kind: {name: [p.row() for p in points] for name, points in of.items()} for kind, of in studies.items()}
    options = {key: value for key, value in vars(arguments).items() if key not in ("run", "out")}
    head = {
        "command": f"python tools/scaling_study.py scaling --gpu {arguments.gpu} --out {arguments.out}",
        "what": "planned, not measured; docs/planning.md states the errors of the planner",
        "options": options,
        "prompts": {"weak, per GPU": _WEAK_PROMPTS, "strong": _STRONG_PROMPTS},
    }
    arguments.out.with_suffix(".json").write_text(json.dumps(head | rows, indent=1) + "\n")
    _draw(studies, arguments.gpu, arguments.out.with_suffix(".png"))
    for kind, of in rows.items():
        print(kind)
        for name, points in of.items():
            print(f"  {name:14s}", *(f"{p['gpus']}:{p.get('tokens_per_s_per_gpu', '-')}" for p in points))


def _draw(studies: dict[str, dict[str, list[Point]]], gpu: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    titles = {
        "weak": f"Weak scaling: {_WEAK_PROMPTS} prompts per GPU",
        "strong": f"Strong scaling: {_STRONG_PROMPTS} prompts",
    }
    figure, rows = plt.subplots(2, 2, figsize=(11, 8), sharex=True)
    for column, (kind, models) in enumerate(studies.items()):
        speed, seconds = rows[0][column], rows[1][column]
        for name, points in models.items():
            made = [(p.gpus, p.plan) for p in points if p.plan is not None]
            gpus = [count for count, _ in made]
            speed.plot(gpus, [p.tokens_per_second_per_gpu for _, p in made], marker="o", ms=4, label=name)
            seconds.plot(gpus, [p.step_s for _, p in made], marker="o", ms=4, label=name)
        speed.set_title(titles[kind])
        speed.set_ylabel("tokens/s/GPU")
        seconds.set_ylabel("seconds per step")
        seconds.set_xlabel(f"{gpu.upper()} GPUs")
        for axis in (speed, seconds):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
    rows[0][1].legend(loc="upper right", fontsize=8)
    figure.suptitle("A step of HDPO by the planner's arithmetic (not measured), fastest layout that fits")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _published(arguments: argparse.Namespace) -> None:
    rows = [[c.what, f"{c.published_s:.3g}", f"{c.planned_s:.3g}", f"{c.error:+.0%}", c.note] for c in comparisons()]
    print(table(["what", "published s", "planned s", "error", "comparable"], rows))
    print("\nnot compared:")
    print("\n".join(f"  {line}" for line in NOT_COMPARED))


if __name__ == "__main__":
    main()
