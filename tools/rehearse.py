"""Run a recipe's step on the null GPU, without a GPU: memory by phase, collectives, waits, and the plan beside them.

    make rehearsal-env
    .venv-rehearsal/bin/python tools/rehearse.py examples/qwen2.5-7b/hdpo.yaml --model qwen2.5-7b --gpu h100 --world 16
    .venv-rehearsal/bin/python tools/rehearse.py RECIPE model.recompute=true --gpu h200 --world 1024 --rank sample

Each rank is a process of its own, of any world. Ends with 1 where a rank runs out of memory. docs/rehearsal.md says
what this can tell and what it cannot.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _environment  # noqa: F401
from _rehearsal.child import call
from _rehearsal.launch import DEVICES, interpreter
from _rehearsal.planned import Line, layers_note, lines
from _rehearsal.report import failure_line, largest_errors, rank_text
from _rehearsal.setting import Asked, Setting, sampled_ranks, setting_of

from megatron_hdpo.types.errors import UserError

TIMEOUT_S = 3600.0
GUESSES = {
    "cliff_rate": float,
    "solved_rate": float,
    "privileged_success": float,
    "prompt_tokens": int,
    "privileged_prompt_tokens": int,
    "response_tokens": int,
}


def main() -> None:
    """Rehearse the ranks of the command line."""
    arguments = _parser().parse_args()
    try:
        ranks = rehearse(arguments)
    except UserError as error:
        sys.exit(str(error))
    failed = [rank for rank in ranks if rank["failure"] is not None]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"arguments": _said(arguments), "ranks": ranks}, indent=1) + "\n")
    if failed:
        sys.exit(failure_line(failed[0]))


def rehearse(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what every rank told, with the comparison in `lines`; print it on the way."""
    asked = Asked(
        recipe=str(arguments.recipe),
        overrides=arguments.overrides,
        gpu=arguments.gpu,
        world=arguments.world,
        model=arguments.model,
        micro_batches=arguments.micro_batches or None,
        guesses={name: value for name in GUESSES if (value := getattr(arguments, name)) is not None},
    )
    setting = setting_of(asked)
    print(f"{setting.layout}; {_work(setting)}", flush=True)
    told = []
    for rank in _ranks(arguments.rank, setting, arguments.world):
        found, compared = rehearse_rank(asked, setting, rank)
        if not told and (note := layers_note(setting, found["spec"])):
            print(note)
        print(f"\n{rank_text(found, compared)}\n{'; '.join(largest_errors(compared))}", flush=True)
        told.append(found | {"lines": [asdict(line) | {"error": line.error} for line in compared]})
    return told


def rehearse_rank(asked: Asked, setting: Setting, rank: int) -> tuple[dict[str, Any], list[Line]]:
    """Return what one rank told, and the plan beside it: no line if it ran out of memory."""
    found = call(
        "_rehearsal.ranks:run",
        [asdict(asked)],
        rank=rank,
        world=asked.world,
        gpu=asked.gpu,
        timeout_s=TIMEOUT_S,
        python=interpreter(),
    )
    found["rank"] = rank
    return found, lines(setting, found) if found["failure"] is None else []


def _ranks(text: str, setting: Setting, world: int) -> Sequence[int]:
    if text == "sample":
        return sampled_ranks(setting.layout)
    if not text.isdigit() or int(text) >= world:
        raise SystemExit(f"--rank {text}: a number below {world}, or sample")
    return [int(text)]


def _work(setting: Setting) -> str:
    w = setting.workload
    return (
        f"{w.prompts} prompts x {w.samples} samples of {w.prompt_tokens} + {w.response_tokens} tokens, "
        f"cliffs {w.cliff_rate:.0%}, privileged success {w.privileged_success:.0%}"
    )


def _said(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="recipe in YAML")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe to change")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100", help="default: h100")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="ranks of the trainer")
    parser.add_argument("--rank", default="sample", help="a rank, or sample: one of each kind; default: sample")
    parser.add_argument("--model", metavar="MODEL", help="in place of model.path: qwen2.5-7b, or a folder")
    parser.add_argument("--micro-batches", type=int, default=4, metavar="N",
                        help="of training in an update, at least; 0: those of the recipe; default: 4")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    for name, kind in GUESSES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help="as of `megatron_hdpo plan`")
    return parser


if __name__ == "__main__":
    main()
