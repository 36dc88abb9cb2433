"""A Hugging Face model on this machine, run by `transformers`, for the commands that show what a model says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hdpo.commands.numbers import integer
from megatron_hdpo.types.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, TextStreamer

Message = dict[str, str]


class LocalModelError(UserError, ValueError):
    """A model that cannot be loaded from this machine, or that cannot take the prompt."""


def add_device_and_seed(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_local_model` reads."""
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="of a model (default auto)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="seed of the sampling (default 0)")


@dataclass
class LocalModel:
    """A loaded model. name: as the user gave it. stop_token_ids: end an answer."""

    name: str
    model: Any  # PreTrainedModel: the types of its `generate` differ between versions of transformers
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: list[int]

    @property
    def has_chat_template(self) -> bool:
        """Return whether messages can be written as a prompt."""
        return self.tokenizer.chat_template is not None

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt of a conversation. Raises LocalModelError when the model has no chat template."""
        if not self.has_chat_template:
            raise LocalModelError(f"{self.name} has no chat template: use `sample --raw` with a whole prompt")
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.tokenizer(str(text), add_special_tokens=False)["input_ids"]

    def raw_ids(self, text: str) -> list[int]:
        """Return the tokens of a text as it stands."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answers(
        self,
        prompt_ids: Sequence[int],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 512,
        streamer: TextStreamer | None = None,
    ) -> list[list[int]]:
        """Return the tokens of n answers, up to and with the one that ends an answer; no top-p, no top-k.

        Raises LocalModelError when the prompt leaves no room in the model's context.
        """
        import torch

        context = self.model.config.get_text_config().max_position_embeddings
        room = min(max_new_tokens, context - len(prompt_ids))
        if room < 1 or not prompt_ids:
            raise LocalModelError(f"a prompt of {len(prompt_ids)} tokens: {self.name} takes 1 to {context - 1}")
        sampled: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        ids_BT = torch.tensor([list(prompt_ids)], device=self.model.device)
        with torch.inference_mode():
            out_BT = self.model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                max_new_tokens=room,
                num_return_sequences=n,
                eos_token_id=self.stop_token_ids,
                pad_token_id=self.stop_token_ids[0],
                streamer=streamer,
                **(sampled if temperature > 0 else {"do_sample": False}),
            )
        return [self._until_stop(row_T) for row_T in out_BT[:, len(prompt_ids) :]]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _until_stop(self, row_T: torch.Tensor) -> list[int]:
        ids = row_T.tolist()
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_token_ids), len(ids))
        return ids[:end]


def load_local_model(name: str, device: str, seed: int) -> LocalModel:
    """Load a Hugging Face folder, or a model of the hub that has been downloaded; nothing is downloaded here.

    In float32 on a CPU, which is exact and rarely slower; in the stored type on a GPU. seed: of all sampling.
    Raises LocalModelError when it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise LocalModelError(f"{name} has no config.json: give the folder of a Hugging Face model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        dtype = "auto" if device == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise LocalModelError(f"{name}: is no model that transformers can load from this machine: {reason}") from error
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    model.generation_config = GenerationConfig()  # a model's own defaults (top-p, penalties) would change the samples
    torch.manual_seed(seed)
    stop_token_ids = sorted(token for token in stops if token is not None)
    if not stop_token_ids:
        raise LocalModelError(f"{name}: has no token that ends an answer (eos_token in tokenizer_config.json)")
    return LocalModel(name, model.to(device).eval(), tokenizer, stop_token_ids)
