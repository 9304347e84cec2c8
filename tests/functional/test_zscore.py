# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from tutelage.functional.zscore import zscore


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("dim", [1, (0, 2, 3), -1])
def test_equals_numpy(dim: int | tuple[int, ...], correction: int) -> None:
    values = torch.randn(3, 4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = values.numpy()
    mean, deviation = (f(dim, keepdims=True) for f in (plain.mean, lambda *a, **k: plain.std(*a, ddof=correction, **k)))
    expected = (plain - mean) / (deviation + 1e-3)
    np.testing.assert_allclose(zscore(values, dim, correction=correction, eps=1e-3).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3, -1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_becomes_0_without_a_slope(dtype: torch.dtype, value: float) -> None:
    values = torch.full((2, 11), value, dtype=dtype, requires_grad=True)
    found = zscore(values)
    assert not found.any()
    assert not torch.autograd.grad(found.square().sum() + found.sum(), values)[0].any()


def test_gradcheck() -> None:
    values = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(zscore, values)


@pytest.mark.parametrize("shape", [(0, 5), (3, 1)])
def test_nothing_to_measure(shape: tuple[int, int]) -> None:
    values = torch.ones(shape, requires_grad=True)
    found = zscore(values)
    assert found.shape == shape
    assert not found.any()
    assert not torch.autograd.grad(found.sum(), values)[0].any()
