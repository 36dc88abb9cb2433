"""`megatron_hdpo doctor`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command


def _add(parser: argparse.ArgumentParser) -> None:
    pass


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.health.doctor import main

    main()


COMMAND = Command("doctor", "check this machine's packages and GPUs", _add, _doctor)
