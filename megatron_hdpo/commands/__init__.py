"""The commands of `megatron_hdpo`, one module each; `base` says what a command is, `ALL` lists them for the help.

A module here imports nothing heavy at its top: the help of every command builds them all.
"""

from megatron_hdpo.commands import check, doctor, evaluate, explain, plan, report, train
from megatron_hdpo.commands.base import Command

ALL: tuple[Command, ...] = (
    train.COMMAND,
    evaluate.COMMAND,
    check.COMMAND,
    plan.COMMAND,
    explain.COMMAND,
    report.COMMAND,
    doctor.COMMAND,
)
