# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peak import peak
from tutelage.functional.block import Piece, spans, sum_over


def products(start: int, stop: int, rows: Tensor) -> Tensor:
    return (rows[start:stop] @ rows.T).square().sum()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(rows=st.integers(0, 40), width=st.integers(0, 30), size=st.integers(1, 200))
def test_spans_cover_every_row_once(rows: int, width: int, size: int) -> None:
    found = spans(rows, width, size)
    assert [row for start, stop in found for row in range(start, stop)] == list(range(rows))
    assert all(stop - start == 1 or (stop - start) * width <= size for start, stop in found)


@pytest.mark.parametrize("size", [1, 7, 40, 10_000])
def test_blocks_change_neither_value_nor_gradient(size: int) -> None:
    rows = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    whole, parts = (sum_over(p, products, rows) for p in ([(0, 9)], spans(9, 9, size)))
    torch.testing.assert_close(parts, whole)
    found, expected = (torch.autograd.grad(loss, rows)[0] for loss in (parts, whole))
    torch.testing.assert_close(found, expected)


def test_gradcheck() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: sum_over(spans(5, 5, 10), products, r), rows)


def test_memory_of_blocks_does_not_grow_with_the_square() -> None:
    def held(rows: int, size: int) -> int:
        given = torch.randn(rows, 8, requires_grad=True)
        return peak(lambda: sum_over(spans(rows, rows, size), products, given).backward())

    blocks = [held(rows, 2**14) for rows in (256, 512, 1024)]
    whole = [held(rows, 2**30) for rows in (256, 512, 1024)]
    assert whole[2] > 3.8 * whole[1] > 3.8**2 * whole[0] * 0.95
    assert blocks[2] < 1.5 * blocks[0] < whole[0] * 1.5


def test_blocks_compile_into_one_graph() -> None:
    pieces: list[Piece] = list(spans(6, 6, 12))
    rows = torch.randn(6, 3, requires_grad=True)
    compiled = torch.compile(lambda r: sum_over(pieces, products, r), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(rows), sum_over(pieces, products, rows)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, rows)[0], torch.autograd.grad(expected, rows)[0])
