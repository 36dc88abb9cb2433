"""`transformers` model of the embedded engine: built empty, filled from a weight stream, run step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PretrainedConfig

from megatron_hdpo.model.attention_kernels import without_cudnn
from megatron_hdpo.rollout.slot_cache import SlotCache
from megatron_hdpo.types.transfer import to_device

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe")


class WeightSlice(NamedTuple):
    """Part of a parameter that a checkpoint's tensor fills: parameter name, index, and the part's shape."""

    parameter: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]


class _Hidden(Protocol):
    @property
    def last_hidden_state(self) -> torch.Tensor: ...


class _Decoder(Protocol):
    """A `transformers` model without its head."""

    @property
    def layers(self) -> Iterable[Any]: ...

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache,
        use_cache: bool,
    ) -> _Hidden: ...


class _CausalLM(Protocol):
    """A `transformers` model with its head."""

    @property
    def model(self) -> _Decoder: ...

    @property
    def lm_head(self) -> Callable[[torch.Tensor], torch.Tensor]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def get_input_embeddings(self) -> torch.nn.Embedding: ...


class EmbeddedModel:
    """A decoder without weights until `load`; `prefill` and `decode` return float logits of the real vocabulary.

    vocab_size: ids from here on are padding; None: the model's own size. Raises ValueError on an unsupported model.
    """

    def __init__(
        self, config: PretrainedConfig | str | Path, dtype: torch.dtype, device: torch.device, vocab_size: int | None
    ) -> None:
        self.config = config if isinstance(config, PretrainedConfig) else _read_config(Path(config))
        self.device, self.dtype = device, dtype
        self.vocab_size = _checked_vocab_size(self.config, vocab_size)
        _check_architecture(self.config)
        self._model, self._shapes = _build_empty(self.config, dtype, device)
        self._chosen: list[torch.Tensor] = []  # experts of the last pass by layer; _pass_shape: its rows and columns
        self._pass_shape: tuple[int, ...] = ()
        for layer in self._model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.register_forward_hook(self._note_experts)
        self._slices = {name: piece for parameter in self._shapes.items() for name, piece in _slices_of(*parameter)}

    @property
    def context_length(self) -> int:
        """Longest prompt plus response in tokens."""
        return int(self.config.max_position_embeddings)

    @property
    def has_experts(self) -> bool:
        """Return whether the model has experts."""
        return bool(getattr(self.config, "num_experts", 0))

    def experts_of_last_pass(self) -> np.ndarray:
        """Return the experts of each token of the last pass, padding included.

        [B, columns, L, K] after `prefill`, [B, 1, L, K] after `decode`; uint8, or uint16 for more than 256 experts.
        """
        kind = np.uint8 if self.config.num_experts <= 256 else np.uint16
        return torch.stack(self._chosen, dim=1).unflatten(0, self._pass_shape).cpu().numpy().astype(kind)

    def _note_experts(self, router: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._chosen.append(output[2])

    def new_cache(self, max_tokens: int) -> SlotCache:
        """Return an empty decoding cache for this model."""
        return SlotCache(self.config.num_hidden_layers, max_tokens)

    def release(self) -> None:
        """Free the weights' memory, until the next `load`."""
        for parameter in self._model.parameters():
            parameter.data = torch.empty(0, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def load(self, stream: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy in (name, full tensor) pairs.

        A tied `lm_head.weight` may be absent, and must equal the embedding. Raises ValueError on a missing, unknown,
        repeated or misshapen parameter; the weights are undefined then.
        """
        parameters = dict(self._model.named_parameters())
        seen: set[str] = set()
        head: torch.Tensor | None = None
        for name, tensor in stream:
            if name in seen:
                raise ValueError(f"weight {name} arrived twice in one update: every parameter must come exactly once")
            seen.add(name)
            if name == "lm_head.weight" and name not in self._slices:
                head = tensor
                continue
            self._check_weight(name, tensor)
            piece = self._slices[name]
            target = parameters[piece.parameter]
            if target.numel() == 0:
                target.data = torch.empty(self._shapes[piece.parameter], dtype=self.dtype, device=self.device)
            target[piece.part].copy_(tensor)
        missing = sorted(self._slices.keys() - seen)
        if missing:
            raise ValueError(f"update lacks {len(missing)} of {len(self._slices)} weights: {', '.join(missing[:5])}")
        if head is not None:
            self._check_tied_head(head)

    def _check_weight(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._slices:
            raise ValueError(f"unknown weight {name}: {self.config.model_type} with this config.json does not have it")
        if tuple(tensor.shape) != self._slices[name].shape:
            wanted = self._slices[name].shape
            raise ValueError(f"weight {name} has shape {tuple(tensor.shape)}, this model needs {wanted}")
        if not tensor.is_floating_point():
            raise ValueError(f"weight {name} has dtype {tensor.dtype}, not a floating point dtype")

    def _check_tied_head(self, head: torch.Tensor) -> None:
        embedding = self._model.get_input_embeddings().weight
        if head.shape != embedding.shape:
            raise ValueError(f"weight lm_head.weight has shape {tuple(head.shape)}, want {tuple(embedding.shape)}")
        if not torch.equal(head.to(embedding), embedding):
            raise ValueError("lm_head.weight differs from the embedding although config.json ties them")

    @torch.inference_mode()
    def prefill(self, prompts: list[np.ndarray]) -> tuple[torch.Tensor, DynamicCache]:
        """Run prompts side by side; return the logits after each prompt's last token, [B, V], and the cache.

        Columns of the cache beyond a prompt's own length are garbage (right padding: causality hides it from the
        prompt).
        """
        last_B = to_device(torch.tensor([len(p) - 1 for p in prompts]), self.device)
        ids_BP = torch.zeros(len(prompts), max(len(p) for p in prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_BP[row, : len(prompt)] = torch.from_numpy(prompt.astype(np.int64))
        cache = DynamicCache()
        self._chosen, self._pass_shape = [], tuple(ids_BP.shape)
        with without_cudnn(self.device):
            hidden_BPH = self._model.model(
                input_ids=to_device(ids_BP, self.device), past_key_values=cache, use_cache=True
            ).last_hidden_state
        return self._logits(hidden_BPH[torch.arange(len(prompts), device=self.device), last_B]), cache

    @torch.inference_mode()
    def decode(self, tokens: np.ndarray, lengths: np.ndarray, cache: SlotCache) -> torch.Tensor:
        """Decode one token for each of the first B rows of `cache`; return logits [B, V].

        tokens: int [B], the last token of each row. lengths: int [B], tokens that row r of the cache holds.
        """
        width = int(lengths.max()) + 1
        cache.reserve(len(lengths), width)
        positions_B = to_device(torch.from_numpy(lengths.astype(np.int64)), self.device)
        cache.plan_step(positions_B, width)
        columns_W = torch.arange(width, device=self.device)
        self._chosen, self._pass_shape = [], (len(tokens), 1)
        mask_B11W = (columns_W[None] <= positions_B[:, None])[:, None, None]
        with without_cudnn(self.device):
            output = self._model.model(
                input_ids=to_device(torch.from_numpy(tokens.astype(np.int64)), self.device)[:, None],
                attention_mask=mask_B11W,
                position_ids=positions_B[:, None],
                past_key_values=cache,
                use_cache=True,
            )
        return self._logits(output.last_hidden_state[:, -1])

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        return self._model.lm_head(hidden_BH)[:, : self.vocab_size]


def _slices_of(parameter: str, shape: tuple[int, ...]) -> Iterator[tuple[str, WeightSlice]]:
    """Yield (name in a checkpoint, piece) of each tensor that a parameter consists of.

    `transformers` holds a layer's experts in two parameters, gates above ups in one of them; checkpoints have separate
    matrices for every expert.
    """
    stem, _, leaf = parameter.rpartition(".")
    if not stem.endswith(".experts"):
        yield parameter, WeightSlice(parameter, (), shape)
        return
    experts, rows, columns = shape
    for expert in range(experts):
        if leaf == "down_proj":
            yield f"{stem}.{expert}.down_proj.weight", WeightSlice(parameter, (expert,), (rows, columns))
        else:
            for number, name in enumerate(("gate_proj", "up_proj")):
                half = slice(number * rows // 2, (number + 1) * rows // 2)
                yield f"{stem}.{expert}.{name}.weight", WeightSlice(parameter, (expert, half), (rows // 2, columns))


def _read_config(path: Path) -> PretrainedConfig:
    """Read a config.json, checking first that it exists: transformers takes a missing path for a name on its hub."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file}: no such file; want a Hugging Face config.json or the folder that holds it")
    return AutoConfig.from_pretrained(file)


def _check_architecture(config: PretrainedConfig) -> None:
    if config.model_type not in SUPPORTED:
        raise ValueError(f"model_type {config.model_type!r}: the embedded engine serves {', '.join(SUPPORTED)}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise ValueError("config.json asks for sliding window attention, which the embedded engine does not support")


def _checked_vocab_size(config: PretrainedConfig, vocab_size: int | None) -> int:
    if vocab_size is None:
        return int(config.vocab_size)
    if not 0 < vocab_size <= config.vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is not between 1 and the model's {config.vocab_size}")
    return vocab_size


def _build_empty(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[_CausalLM, dict[str, tuple[int, ...]]]:
    """Return the model with empty parameters, and the shapes they will have.

    Built on the meta device, because random initialisation takes seconds.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    replaced: dict[int, torch.nn.Parameter] = {}  # by identity, so that tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in replaced:
                    empty = torch.empty(0, dtype=dtype, device=device)
                    replaced[id(parameter)] = torch.nn.Parameter(empty, requires_grad=False)
                module._parameters[name] = replaced[id(parameter)]
    # Rotary frequencies are computed, not loaded, and the meta device computed nothing.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    left = [name for name, tensor in model.named_buffers() if tensor.is_meta]
    if left:
        raise RuntimeError(
            f"buffers of {type(model).__name__} were not rebuilt: {left}; report the transformers version"
        )
    return model.eval(), shapes
