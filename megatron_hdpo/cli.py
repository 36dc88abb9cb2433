"""The command line of megatron_hdpo: train, evaluate, check, plan, explain, report, doctor.

Commands that run a recipe take its YAML file and `key.path=value` overrides; torchrun starts the ranks.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hdpo.environment import missing_package
from megatron_hdpo.planner.options import add_options as add_plan_options
from megatron_hdpo.types.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import Store

    from megatron_hdpo.training.run import Run

USER_ERROR = 2
_FAILED = "megatron_hdpo/failed"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; for an error that the user can fix, print one message and exit with code 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except Exception as error:
        if (message := _for_the_user(error)) is not None:
            if _first_to_fail():
                print(message, file=sys.stderr, flush=True)
            _leave()
        if not _another_failed():
            raise
        logging.getLogger(__name__).info("ended because another rank did", exc_info=True)
        _leave()


def _for_the_user(error: Exception) -> str | None:
    """Return the one line to print for an error that the user can fix; None for a bug of this package."""
    if (line := missing_package(error)) is not None:
        return line
    return f"{type(error).__name__}: {error}" if isinstance(error, UserError) else None


def _leave() -> None:
    """End the process at once, with its child processes.

    Other ranks may wait in a collective, and a normal exit would wait for them. Megatron's checkpoints keep a child
    process that would hold our output open for a while, so children are killed as a normal exit would do.
    """
    sys.stdout.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(USER_ERROR)


def _first_to_fail() -> bool:
    """Return whether this rank prints the message: an error on every rank is printed once, one on rank 3 alone too.

    Ranks count themselves in torchrun's own store, which exists before any process group, or in that of rank 0; without
    a store, the first rank of each node prints.
    """
    try:
        if (store := _agent_store()) is not None:
            return store.add(_FAILED, 1) == 1
    except RuntimeError:  # rank 0 has ended meanwhile, and the store with it
        pass
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(5)  # torchrun ends all ranks of a node when one has ended: let the first one speak before that
    return False


def _another_failed() -> bool:
    """Return whether another rank has already ended with its own message; a failure here only follows from it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    store = _agent_store()
    if store is None:  # where rank 0 keeps the store, it is gone with rank 0
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "False" and os.environ.get("RANK") != "0"
    time.sleep(0.5)  # a connection may break a moment before the rank at its other end has counted itself
    try:
        return bool(store.check([_FAILED]))
    except RuntimeError:
        return True


def _agent_store() -> Store | None:
    """Return torchrun's store, or rank 0's where agents do not share theirs (rank 0's is new after each restart)."""
    if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        return None
    from torch.distributed import PrefixStore, TCPStore, is_initialized

    of_agents = os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    if not of_agents and not is_initialized():
        return None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        patience = timedelta(seconds=10 if of_agents else 2)
        store = TCPStore(address, port, is_master=False, timeout=patience, wait_for_workers=False)
        return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if of_agents else "0", store)
    except (KeyError, ValueError, RuntimeError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron_hdpo", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _recipe_command(commands, "train", _train, "train, or resume the run in the recipe's output folder")
    _recipe_command(commands, "evaluate", _evaluate, "evaluate model.path on data.evaluation without training")
    _recipe_command(commands, "check", _check, "check recipe, data and layout; loads no weights")
    _recipe_command(
        commands,
        "plan",
        _plan,
        "estimate memory and time of a step on a cluster; needs no GPU",
    )
    add_plan_options(commands.choices["plan"])
    explain = commands.add_parser("explain", help="print meaning, type, default and bounds of recipe keys")
    explain.add_argument("key", nargs="?", metavar="key.path", help="a key or section, e.g. rollout.temperature")
    form = explain.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print all keys as docs/configuration.md")
    form.add_argument("--json-schema", action="store_true", help="print the JSON schema, docs/recipe.schema.json")
    explain.set_defaults(run=_explain)
    report = commands.add_parser("report", help="write tables, report.png and report.html of a run folder")
    report.add_argument("run_dir", type=Path)
    report.set_defaults(run=_report)
    doctor = commands.add_parser("doctor", help="check this machine's packages and GPUs")
    doctor.set_defaults(run=_doctor)
    return parser


def _recipe_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
) -> None:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("recipe", type=Path, help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="e.g. train.steps=10")
    command.set_defaults(run=run)


def _train(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.training.loop import train

    with _run(arguments, resumes=True) as run:
        train(run)
        report = run.recipe.output if run.context.is_leader else None
    if report is not None:
        _report(argparse.Namespace(run_dir=report))


def _evaluate(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.training.loop import evaluate_now

    with _run(arguments) as run:
        run.sync(0)
        metrics = evaluate_now(run)
        run.console.table("Evaluation", [{"metric": name, "value": value} for name, value in metrics.items()])


def _check(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config import check_recipe, check_sections, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_sections(recipe)  # before the imports below, which take seconds: torch and Megatron
    from megatron_hdpo.config.check import resolved_device
    from megatron_hdpo.config.precision import begun_in, choose_precision, resolve
    from megatron_hdpo.data.load import load
    from megatron_hdpo.model.architecture import read_architecture
    from megatron_hdpo.training.run import load_tokenizer

    world_size = int(os.environ.get("WORLD_SIZE", recipe.parallel.least_ranks))
    architecture = read_architecture(recipe.model.path)
    choice = choose_precision(recipe, architecture, resolved_device(recipe.device), begun_in(recipe.output))
    recipe = resolve(recipe, choice.dtype)
    warnings = check_recipe(recipe, architecture, world_size)
    print(choice.line)
    for warning in [choice.warning, *warnings] if choice.warning else warnings:
        print(f"warning: {warning}")
    data = load(recipe.data, load_tokenizer(recipe.model.path))
    print("\n".join(data.report.lines()))
    example = data.train[0]
    print(f"\nfirst prompt ({example.id}):\n{data.prompts.render_student(example)}")
    print(f"\nfirst privileged prompt:\n{data.prompts.render_privileged(example)}")
    print("\nthe recipe is fine")


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.planner.command import plan_recipe

    print(plan_recipe(arguments.recipe, arguments.overrides, arguments))


def _explain(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.config.explain import explain, json_schema, markdown

    if arguments.markdown or arguments.json_schema:
        print(markdown() if arguments.markdown else json_schema(), end="")
    else:
        print(explain(arguments.key))


def _report(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.tracking.console import Console
    from megatron_hdpo.tracking.report import write_report

    write_report(arguments.run_dir).show(Console(enabled=True))


def _doctor(arguments: argparse.Namespace) -> None:
    from megatron_hdpo.health.doctor import main

    main()


@contextmanager
def _run(arguments: argparse.Namespace, resumes: bool = False) -> Iterator[Run]:
    """Yield a built run inside its process group, and close everything at the end, also after an error."""
    from megatron_hdpo.config import check_sections, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_sections(recipe)  # before the imports below, which take seconds: torch and Megatron
    from megatron_hdpo.parallel.context import start, stop
    from megatron_hdpo.training.run import build_run, set_threads

    set_threads(recipe, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    context = start(recipe.parallel, recipe.device, recipe.seed)
    run = build_run(recipe, context, resumes=resumes)
    failed = True
    try:
        yield run
        failed = False
    finally:
        run.close(failed)
    stop()
