"""`megatron_hdpo explain`."""

from __future__ import annotations

import argparse

from megatron_hdpo.commands.base import Command, write_out


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", nargs="?", metavar="KEY.PATH", help="key or section; without it, the sections")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print all keys as docs/configuration.md")
    form.add_argument("--json-schema", action="store_true", help="print the JSON schema, docs/recipe.schema.json")


def _explain(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config.explain import explain, json_schema, markdown

    if arguments.markdown or arguments.json_schema:
        write_out(markdown() if arguments.markdown else json_schema())
    else:
        write_out(f"{explain(arguments.key)}\n")


COMMAND = Command(
    "explain",
    "Print meaning, type, default and bounds of keys.",
    _add,
    _explain,
    examples=("", "rollout", "rollout.temperature", "--json-schema"),
)
