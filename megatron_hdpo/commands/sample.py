"""`megatron_hdpo sample`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from megatron_hdpo.commands.base import Command
from megatron_hdpo.commands.local_model import LocalModelError, add_device_and_seed, load_local_model
from megatron_hdpo.commands.numbers import integer, real
from megatron_hdpo.commands.opened_run import opened_run

if TYPE_CHECKING:
    from megatron_hdpo.training.run import Run
    from megatron_hdpo.types.rollouts import Group

_DESCRIPTION = """\
Of a model: samples of the prompts, by transformers on one device; the chat
template is used where the model has one. Of a recipe: samples of held-out
problems with the reward of each, by the recipe's own engine and prompts;
KEY.PATH=VALUE changes the recipe, for example model.path."""
_SUFFIXES = (".yaml", ".yml")
T = TypeVar("T")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=Path, metavar="RECIPE_OR_MODEL", help="YAML file of a recipe, or Hugging Face folder"
    )
    parser.add_argument("rest", nargs="*", metavar="PROMPT_OR_KEY.PATH=VALUE", help="prompts; overrides of a recipe")
    parser.add_argument(
        "-n", "--samples", type=integer(1), default=4, metavar="N", help="samples per prompt (default 4)"
    )
    parser.add_argument("--problems", type=integer(1), default=4, metavar="N", help="problems of a recipe (default 4)")
    parser.add_argument("--raw", action="store_true", help="use no chat template: the prompt as it stands")
    parser.add_argument(
        "--temperature",
        type=real(0, 1000),
        metavar="X",
        help="0: the greedy answer (default 1, or as in an evaluation)",
    )
    parser.add_argument(
        "--max-new-tokens", type=integer(1), metavar="N", help="longest answer (default 512, or as in an evaluation)"
    )
    add_device_and_seed(parser)


def _sample(arguments: argparse.Namespace) -> None:
    if arguments.target.suffix in _SUFFIXES:
        with opened_run(arguments.target, arguments.rest) as run:
            groups = _of_problems(run, arguments)
            if run.context.is_leader:
                for line in _group_lines(groups):
                    print(line)
    else:
        _of_prompts(arguments)


def _of_prompts(arguments: argparse.Namespace) -> None:
    if not arguments.rest:
        raise LocalModelError(f"{arguments.target}: name a prompt (a recipe, which has its own, ends in .yaml)")
    model = load_local_model(str(arguments.target), arguments.device, arguments.seed)
    chat = model.has_chat_template and not arguments.raw
    temperature = 1.0 if arguments.temperature is None else arguments.temperature
    for prompt in arguments.rest:
        ids = model.chat_ids([{"role": "user", "content": prompt}]) if chat else model.raw_ids(prompt)
        answers = model.answers(
            ids,
            n=arguments.samples if temperature > 0 else 1,
            temperature=temperature,
            max_new_tokens=arguments.max_new_tokens or 512,
        )
        print(f"=== {prompt}")
        for number, answer in enumerate(answers, start=1):
            reason = "stop" if answer and answer[-1] in model.stop_token_ids else "length"
            print(f"--- sample {number}: {len(answer)} tokens, {reason}\n{model.text(answer)}")


def _of_problems(run: Run, arguments: argparse.Namespace) -> list[Group]:
    """Return on rank 0 judged samples of held-out problems, which are taken from all sets alike. Collective."""
    from megatron_hdpo.config import RecipeError
    from megatron_hdpo.sampling.delivery import deliver_to_leader
    from megatron_hdpo.types.rollouts import SamplingParams

    if run.recipe.rollout.replay is not None:
        raise RecipeError("rollout.replay: samples need an engine: leave replay out")
    if not run.data.evaluation:
        raise RecipeError("data.evaluation: there is no problem to sample: name a task")
    config = run.recipe.evaluation
    sampling = SamplingParams(
        max_new_tokens=arguments.max_new_tokens or config.max_new_tokens or run.recipe.rollout.max_new_tokens,
        n=arguments.samples,
        temperature=config.temperature if arguments.temperature is None else arguments.temperature,
        top_p=config.top_p,
        stop_token_ids=run.coordinator.stop_token_ids,
    )
    run.sync(0)
    problems = _spread(run.data.evaluation, arguments.problems)
    with run.console.phase("sample", total=0, unit="sample") as phase:
        sampled = run.coordinator.groups(problems, sampling, ("sample", arguments.seed), phase)
    return deliver_to_leader(sampled, run.context)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return at most `count` items from all over a sequence, in its order."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _group_lines(groups: Iterable[Group]) -> Iterable[str]:
    for group in groups:
        yield f"=== {group.problem.id}: {group.problem.question}\nanswer: {group.problem.answer}"
        for number, sample in enumerate(group.samples, start=1):
            tokens = f"{sample.length} tokens, {sample.finish_reason}"
            parts = "".join(f", {name} {value:g}" for name, value in sample.components.items())
            yield f"--- sample {number}: reward {sample.reward:g}{parts}, {tokens}\n{sample.text}"
        for reason, count in group.dropped.items():
            yield f"--- {count} samples dropped: {reason}"


COMMAND = Command(
    "sample",
    "Print samples of a model, or of a recipe's problems.",
    _add,
    _sample,
    description=_DESCRIPTION,
    examples=(
        'runs/my-run/hf "What is 12 * 12?" -n 2',
        "my.yaml model.path=runs/my-run/hf --problems 8",
    ),
)
