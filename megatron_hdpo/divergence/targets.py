"""Targets of a divergence: a teacher's top-k, its logits, or the hidden states that its logits come from.

Every target may cover a subset of the tokens: `rows` holds, for each row of the target, the index of its token among
the flattened tokens, strictly increasing. Tokens that are not in `rows` have no target: divergence 0, no gradient.
`rows` may lie on the host whatever the device of the target, and should: there the values are checked, and the chunked
head cuts them, without waiting for the device. A flat target on a device has them on both: `host_rows` on the host.
Targets are constants: no gradient flows into them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hdpo.types.transfer import to_device


def _check_rows(rows: Tensor | None, length: int, tokens: int, what: str) -> None:
    if rows is None:
        if length != tokens:
            raise ValueError(f"{what} has {length} rows for {tokens} tokens: pass rows= to say which tokens they are")
        return
    if rows.dtype != torch.int64 or rows.shape != (length,):
        raise ValueError(f"rows must be int64 [{length}], one per row of {what}; got {rows.dtype} {list(rows.shape)}")
    if rows.device.type == "cpu" and length:  # on a GPU reading the values would stall the device
        if length > 1 and not bool((rows[1:] > rows[:-1]).all()):
            raise ValueError("rows must be strictly increasing: one target per token, in token order")
        if int(rows[0]) < 0 or int(rows[-1]) >= tokens:
            raise ValueError(f"rows must lie in [0, {tokens}); got {int(rows[0])} to {int(rows[-1])}")


@dataclass(frozen=True)
class TopK:
    """A teacher's log-probs at k ids per token, normalised over the FULL vocabulary.

    ids_TK: int [..., K] global token ids, distinct within a row. logprobs_TK: [..., K], at the temperature of the
    divergence. An entry with id < 0 or log-prob -inf is padding and not in the support: a row may have fewer than K
    entries, or none (then divergence 0, no gradient). rows: int64 [R], see the module; ids and log-probs are then
    [R, K].
    """

    ids_TK: Tensor
    logprobs_TK: Tensor
    rows: Tensor | None = None
    host_rows: Tensor | None = None

    def flat(self, tokens: int, vocab_size: int, device: torch.device) -> TopK:
        """Return the same target as 2-D tensors on `device` (`rows` stay where they are).

        Raises ValueError on shapes or ids that do not fit.
        """
        if self.ids_TK.shape != self.logprobs_TK.shape or not self.ids_TK.shape or not self.ids_TK.shape[-1]:
            raise ValueError(
                f"TopK ids {list(self.ids_TK.shape)} and log-probs {list(self.logprobs_TK.shape)} must have one shape, "
                "[..., K] with K at least 1"
            )
        k = self.ids_TK.shape[-1]
        ids_RK = to_device(self.ids_TK.detach().reshape(-1, k), device).to(torch.int64)
        _check_rows(self.rows, ids_RK.shape[0], tokens, "TopK")
        check_ids(ids_RK, vocab_size, "TopK")
        return TopK(ids_RK, to_device(self.logprobs_TK.detach().reshape(-1, k), device), self.rows, self.host_rows)

    def pruned(self) -> TopK:
        """Return the same target with id -1 at every entry that has log-prob -inf."""
        never_TK = self.logprobs_TK == -torch.inf
        if never_TK.device.type == "cpu" and not bool(never_TK.any()):
            return self
        return replace(self, ids_TK=self.ids_TK.masked_fill(never_TK, -1))


@dataclass(frozen=True)
class FullLogits:
    """A teacher's logits [..., V / tp], sharded like the student's; `rows` as in the module (then [R, V / tp])."""

    logits_TV_local: Tensor
    rows: Tensor | None = None
    host_rows: Tensor | None = None

    def flat(self, tokens: int, width: int, device: torch.device) -> FullLogits:
        """Return the same target as 2-D tensors on `device` (`rows` stay where they are).

        Raises ValueError on shapes that do not fit. tokens: T. width: columns of the student's shard.
        """
        logits_RV = self.logits_TV_local.detach()
        if logits_RV.shape[-1] != width:
            raise ValueError(
                f"the teacher's shard has {logits_RV.shape[-1]} columns, the student's {width}: they must match"
            )
        logits_RV = logits_RV.reshape(-1, width)
        _check_rows(self.rows, logits_RV.shape[0], tokens, "FullLogits")
        return FullLogits(to_device(logits_RV, device), self.rows, self.host_rows)

    @property
    def height(self) -> int:
        """Smallest sensible number of rows of a block."""
        return 1

    def block(self, rows: slice) -> Tensor:
        """Return the logits [n, V / tp] of a slice of rows (flat targets only)."""
        return self.logits_TV_local[rows]

    def __len__(self) -> int:
        return self.logits_TV_local.shape[0]


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states [..., H] and its shard [V / tp, H] of the head; logits are made block by block.

    The hidden states are the input of the head (after the final norm), whole on every rank of the group.
    """

    hidden_TH: Tensor
    head_weight_VH: Tensor
    rows: Tensor | None = None
    host_rows: Tensor | None = None

    def flat(self, tokens: int, width: int, device: torch.device) -> Hidden:
        """Return the same target as 2-D tensors on `device` (`rows` stay where they are).

        Raises ValueError on shapes that do not fit. tokens: T. width: columns of the student's shard.
        """
        size = self.hidden_TH.shape[-1]
        if self.head_weight_VH.shape != (width, size):
            raise ValueError(
                f"the teacher's head is {list(self.head_weight_VH.shape)}; the student's shard and the teacher's "
                f"hidden size ask for [{width}, {size}]"
            )
        hidden_RH = self.hidden_TH.detach().reshape(-1, size)
        _check_rows(self.rows, hidden_RH.shape[0], tokens, "Hidden")
        return Hidden(
            to_device(hidden_RH, device), to_device(self.head_weight_VH.detach(), device), self.rows, self.host_rows
        )

    @property
    def height(self) -> int:
        """Smallest sensible number of rows of a block."""
        return 128  # a matrix product with fewer rows is inefficient

    def block(self, rows: slice) -> Tensor:
        """Return the logits [n, V / tp] of a slice of rows (flat targets only)."""
        return self.hidden_TH[rows] @ self.head_weight_VH.t()

    def __len__(self) -> int:
        return self.hidden_TH.shape[0]


Target = TopK | FullLogits | Hidden


def check_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Raise ValueError on ids beyond the vocabulary: no rank owns them, so they would silently count as logit 0.

    On a GPU the error is a device-side assertion, reported at the next synchronisation. what: name of the ids in the
    error.
    """
    inside = ids < vocab_size
    if ids.device.type == "cpu":
        if not bool(inside.all()):
            raise ValueError(f"{what} holds id {int(ids.max())}, but the vocabulary has {vocab_size} tokens")
    else:  # an assertion on the device does not stall it
        torch._assert_async(inside.all(), f"{what} holds an id beyond the vocabulary of {vocab_size} tokens")
