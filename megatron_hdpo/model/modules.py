"""Small torch modules for Megatron's extension points, where the stock ones refuse what training needs.

The stock norm refuses sequence parallelism; the stock attention refuses packed sequences.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """RMS normalisation over the last dimension, in fp32, with a learned scale.

    The scale carries Megatron's `sequence_parallel` mark: each rank sees its own part of the sequence then, and
    `finalize_model_grads` has to add up the parts of its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] -> same shape and dtype."""
        return F.rms_norm(x.float(), (x.shape[-1],), eps=self.eps).to(x.dtype) * self.weight


class PackedAttention(MegatronModule):
    """Causal attention on torch's fused SDPA, over packed or plain sequences.

    Packed (thd): query [T, heads, d], key and value [T, kv heads, d]; sequence i is rows cu_seqlens[i]:cu_seqlens[i+1]
    and no token attends outside its own. Plain: [s, b, heads, d].
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns [T, heads * d] when packed, [s, b, heads * d] otherwise."""
        if attention_bias is not None:
            raise NotImplementedError("PackedAttention has no attention bias")
        if packed_seq_params is None:
            out_bhsd = self._causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out_bhsd.permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        outputs = [self._causal(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
        return torch.cat(outputs).flatten(1)

    def _causal(self, query_bhsd: Tensor, key_bhsd: Tensor, value_bhsd: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(
            query_bhsd, key_bhsd, value_bhsd, is_causal=True, enable_gqa=True, scale=self.softmax_scale
        )
