"""The commands of `megatron_hdpo`, one module each; `base` says what a command is, `ALL` lists them for the help.

A module here imports nothing heavy at its top: the help of every command builds them all.
"""

from megatron_hdpo.commands import (
    chat,
    check,
    compare,
    completion,
    convert,
    doctor,
    evaluate,
    explain,
    init,
    make_tiny_model,
    plan,
    prepare,
    report,
    sample,
    train,
    verify_checkpoint,
    verify_conversion,
)
from megatron_hdpo.commands.base import Command

ALL: tuple[Command, ...] = (
    init.COMMAND,
    make_tiny_model.COMMAND,
    check.COMMAND,
    plan.COMMAND,
    prepare.COMMAND,
    train.COMMAND,
    evaluate.COMMAND,
    sample.COMMAND,
    chat.COMMAND,
    report.COMMAND,
    compare.COMMAND,
    verify_checkpoint.COMMAND,
    convert.COMMAND,
    verify_conversion.COMMAND,
    explain.COMMAND,
    doctor.COMMAND,
    completion.COMMAND,
)
