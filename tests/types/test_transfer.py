"""Copies between host and device, as far as a CPU shows them: values, dtypes, shapes, no needless copy."""

from __future__ import annotations

import numpy as np
import torch

from megatron_hdpo.types.transfer import join_to_device, to_device, to_host, wait_for_copies

CPU = torch.device("cpu")


def test_arrays_arrive_in_one_buffer_in_their_shapes() -> None:
    arrays = [np.arange(3, dtype=np.int64), np.zeros((0, 4), dtype=np.int64), np.array([[7, -1], [2**31 - 1, 0]])]
    moved = join_to_device(arrays, torch.int32, CPU)
    assert [m.tolist() for m in moved] == [a.tolist() for a in arrays]
    assert [m.shape for m in moved] == [a.shape for a in arrays] and {m.dtype for m in moved} == {torch.int32}
    assert len({m.untyped_storage().data_ptr() for m in moved}) == 1
    assert join_to_device([], torch.float32, CPU) == []


def test_not_a_number_arrives() -> None:
    (moved,) = join_to_device([np.array([np.nan, -np.inf, 1.5])], torch.float32, CPU)
    assert moved[0].isnan() and moved[1:].tolist() == [-np.inf, 1.5]


def test_what_is_there_is_not_copied() -> None:
    values = torch.arange(4.0)
    assert to_device(values, CPU) is values and to_host(values) is values
    wait_for_copies(CPU)
