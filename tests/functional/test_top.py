# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from tutelage.functional.top import largest, spread


def test_ties_go_to_the_lower_class_and_there_are_never_more_than_all() -> None:
    probs = torch.tensor([[0.1, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]])
    index, value = largest(probs, 3)
    assert index.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert value.tolist() == probs.gather(1, index).tolist()
    assert largest(probs, 9)[0].shape == (2, 4)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_rows_sum_to_1_and_keep_what_was_kept(k: int) -> None:
    probs = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)
    index, value = largest(probs, k)
    dense = spread(index, value, 4)
    torch.testing.assert_close(dense.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(dense.gather(1, index), value)
    if k >= 3:  # one class is left: it gets what is its own
        torch.testing.assert_close(dense, probs)


def test_more_than_1_leaves_nothing_or_a_debt() -> None:
    index, value = torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.5]])
    assert spread(index, value, 4).tolist() == [[0.75, 0.0, 0.5, 0.0]]
    assert spread(index, value, 4, clamped=False).tolist() == [[0.75, -0.125, 0.5, -0.125]]
