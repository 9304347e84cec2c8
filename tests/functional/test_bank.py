# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.functional.bank import as_written, write


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 6),
    writes=st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9, width=32), st.booleans()), max_size=9),
)
def test_the_last_valid_writer_of_a_place_counts(size: int, writes: list[tuple[int, float, bool]]) -> None:
    bank = torch.arange(100.0, 100.0 + size)[:, None].repeat(1, 2)
    index = torch.tensor([place % size for place, _, _ in writes], dtype=torch.int64)
    rows = torch.tensor([[value, -value] for _, value, _ in writes]).view(-1, 2)
    valid = torch.tensor([flag for _, _, flag in writes], dtype=torch.bool)
    expected = bank.clone()
    for place, row, flag in zip(index.tolist(), rows, valid.tolist(), strict=True):
        if flag:
            expected[place] = row
    before = bank.clone()
    everywhere = torch.arange(size)
    torch.testing.assert_close(as_written(bank, everywhere, index, rows, valid), expected)
    torch.testing.assert_close(bank, before)
    write(bank, index, rows, valid)
    torch.testing.assert_close(bank, expected)


def test_rows_take_the_type_of_the_bank() -> None:
    bank = torch.zeros(2, 1, dtype=torch.float16)
    write(bank, torch.tensor([1]), torch.tensor([[0.1]], dtype=torch.float64))
    assert bank.tolist() == [[0.0], [torch.tensor(0.1).half().item()]]
