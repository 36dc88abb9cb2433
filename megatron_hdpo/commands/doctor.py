"""`megatron_hdpo doctor`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command, add_nothing


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.health.doctor import main

    main()


COMMAND = Command(
    "doctor",
    "Check the packages and GPUs of this machine.",
    add_nothing,
    _doctor,
    description="Exit code 1 when something that every run needs is missing.",
    examples=("",),
)
