# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.nn import functional as F

from tutelage.functional.pairwise import distances, unit


def test_vectors_of_length_one() -> None:
    given = torch.randn(5, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(unit(given, dim=1), F.normalize(given, dim=1))


def test_a_vector_of_zeros_has_neither_direction_nor_gradient() -> None:
    given = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    found = unit(given)
    assert found.tolist() == [[0.0, 0.0], [pytest.approx(0.6), pytest.approx(0.8)]]
    gradient = torch.autograd.grad((found * torch.tensor([1.0, 0.0])).sum(), given)[0]
    assert gradient[0].tolist() == [0.0, 0.0]
    assert gradient[1].tolist() == [pytest.approx(0.128), pytest.approx(-0.096)]


def test_near_rows_keep_their_distance() -> None:
    near = torch.full((1, 64), 100.0)
    apart = near.clone()
    apart[0, 0] += 1e-3
    expected = (apart.double() - near.double()).norm().item()
    assert distances(near, apart).item() == pytest.approx(expected, rel=1e-6)
    gram = (near.square().sum() + apart.square().sum() - 2 * (near * apart).sum()).clamp(min=0).sqrt()
    assert gram.item() != pytest.approx(expected, rel=0.1)  # what the usual formula makes of them


def test_equal_rows_have_no_gradient() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert not torch.autograd.grad(distances(rows, rows).sum(), rows)[0].any()
