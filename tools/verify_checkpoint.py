"""Prove a conversion: every tensor accounted for, bit-equal round trip, log-probs of `transformers`.

    python tools/verify_checkpoint.py HF_FOLDER                     HF -> Megatron layout -> HF
    python tools/verify_checkpoint.py HF_FOLDER MEGATRON_FOLDER     the second is a conversion of the first
    torchrun --standalone --nproc-per-node 2 tools/verify_checkpoint.py HF_FOLDER --tensor 2

Exit status: 0 all checks passed, 1 a check failed (names are printed), 2 there is nothing to check.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import _environment  # noqa: F401
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from megatron_hdpo.model.architecture import ArchitectureError
from megatron_hdpo.parallel.context import start, stop
from megatron_hdpo.parallel.layout import LayoutError, ParallelConfig
from megatron_hdpo.weights.errors import WeightsError
from megatron_hdpo.weights.verify import Tolerance, print_checks, verify


def main() -> int:
    """Run the checks; see the module's docstring for the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="Hugging Face or Megatron checkpoint folder")
    parser.add_argument("second", type=Path, nargs="?", help="checkpoint that should hold the same weights")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks (TP)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages (PP)")
    parser.add_argument("--expert", type=int, default=1, help="expert-parallel ranks (EP)")
    parser.add_argument("--config", type=Path, help="Hugging Face folder with config and tokenizer, where one has none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the Megatron model runs")
    parser.add_argument(
        "--max-difference", type=float, default=Tolerance.max, help="of log-probs (default %(default)s)"
    )
    parser.add_argument("--mean-difference", type=float, default=Tolerance.mean, help="(default %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for a temporary export, seen by all ranks")
    arguments = parser.parse_args()
    disable_progress_bar()
    leads = os.environ.get("RANK", "0") == "0"
    try:
        layout = ParallelConfig(
            tensor=arguments.tensor,
            pipeline=arguments.pipeline,
            expert=arguments.expert,
            sequence=arguments.tensor > 1,  # Megatron needs it to combine experts with tensor parallelism
        )
        context = start(layout, device=arguments.device)
        checks = verify(
            arguments.first,
            arguments.second,
            context,
            config=arguments.config,
            tolerance=Tolerance(arguments.max_difference, arguments.mean_difference),
            scratch=arguments.scratch,
        )
    except (WeightsError, ArchitectureError, LayoutError) as error:
        if leads:
            Console(stderr=True).print(str(error), markup=False, style="red", soft_wrap=True)
        return 2
    finally:
        stop()
    if leads:
        print_checks(checks, Console())
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
