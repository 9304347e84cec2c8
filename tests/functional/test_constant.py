# SPDX-License-Identifier: Apache-2.0
import torch

from tutelage.functional.constant import constant


def test_it_takes_device_and_dtype_of_another() -> None:
    found = constant((1, 2.5, -3), torch.zeros(2, dtype=torch.float64, device="meta"))
    assert (found.shape, found.dtype, found.device.type) == ((3,), torch.float64, "meta")
    assert torch.equal(constant((1, 2.5), torch.zeros((), dtype=torch.float64)), torch.tensor([1, 2.5]).double())


def test_it_is_traced() -> None:
    fast = torch.compile(lambda like: constant((1.0, 4.0), like) + like, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(torch.ones(2)), torch.tensor([2.0, 5.0]))
