"""Tokenizers made on the spot: one byte per token with a chat template, and one that knows a few characters only."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_hdpo.types.problem import Problem

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think></think>{% endif %}"
)

PROBLEM = Problem(id="t/1", task="t", question="What is 2+2?", answer="4", solution="2+2 = 4, so \\boxed{4}")


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens <|start|>, <|end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per known character, <unk> for all others."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *characters])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
