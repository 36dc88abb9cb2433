"""`megatron_hdpo chat`."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_hdpo.commands.base import Command
from megatron_hdpo.commands.local_model import Message, add_device_and_seed, load_local_model
from megatron_hdpo.commands.numbers import integer, real

_DESCRIPTION = """\
Runs the model by transformers on one device, with its chat template. An empty
line forgets the conversation; Ctrl-D ends."""


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--temperature",
        type=real(0, 1000),
        default=0.7,
        metavar="X",
        help="0: the greedy answer (default %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens", type=integer(1), default=1024, metavar="N", help="longest answer (default %(default)s)"
    )
    add_device_and_seed(parser)


def _chat(arguments: argparse.Namespace) -> None:
    from transformers import TextStreamer

    model = load_local_model(str(arguments.model), arguments.device, arguments.seed)
    start: list[Message] = [{"role": "system", "content": arguments.system}] if arguments.system else []
    messages = list(start)
    model.chat_ids([*messages, {"role": "user", "content": "?"}])  # a model without a template is refused at once
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    for line in _lines():
        if not line:
            messages = list(start)
            print("(a new conversation)")
            continue
        messages.append({"role": "user", "content": line})
        (answer,) = model.answers(
            model.chat_ids(messages),
            temperature=arguments.temperature,
            max_new_tokens=arguments.max_new_tokens,
            streamer=streamer,
        )
        if answer[-1] not in model.stop_token_ids:
            print(f"(cut off after {len(answer)} tokens)")
        messages.append({"role": "assistant", "content": model.text(answer)})


def _lines() -> Iterator[str]:
    """Yield what the user types, line by line, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # gives `input` editing and a history
    with contextlib.suppress(EOFError):
        while True:
            yield input("> ").strip()
    print()


COMMAND = Command(
    "chat",
    "Chat with a model on the terminal.",
    _add,
    _chat,
    description=_DESCRIPTION,
    examples=("runs/my-run/hf", 'models/Qwen3-0.6B --temperature 0 --system "Answer briefly."'),
)
