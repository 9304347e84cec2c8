# SPDX-License-Identifier: Apache-2.0
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tutelage.functional.noise import keys, subset


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**40),
    populations=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    count=st.integers(1, 320),
)
def test_numbers_are_distinct_and_below_the_population(seed: int, populations: list[int], count: int) -> None:
    sizes = torch.tensor(populations)
    drawn = subset(
        keys(seed, torch.arange(len(sizes))),
        count,
        sizes,
        smallest=min(populations),
        largest=max(populations),
    )
    assert drawn.shape == (len(sizes), count)
    assert bool(((drawn >= 0) & (drawn < sizes[:, None])).all())
    for row, size in zip(drawn, populations, strict=True):
        assert len(row.unique()) == count or size < count


def test_every_number_is_equally_likely_at_every_place() -> None:
    rows, size, count = 40_000, 10, 4
    drawn = subset(keys(3, torch.arange(rows)), count, torch.full((rows,), size), smallest=size, largest=size)
    for place in range(count):
        share = drawn[:, place].bincount(minlength=size) / rows
        assert (share - 1 / size).abs().max() < 6 * (0.09 / rows) ** 0.5
    pairs = (drawn[:, 0] * size + drawn[:, 1]).bincount(minlength=size**2).view(size, size) / rows
    apart = pairs[~torch.eye(size, dtype=torch.bool)]
    assert (apart - 1 / 90).abs().max() < 6 * (1 / 90 / rows) ** 0.5


def test_few_numbers_of_a_large_population_cost_little() -> None:
    drawn = subset(keys(3, torch.arange(2)), 50, torch.tensor([10**9, 7 * 10**8]), smallest=7 * 10**8, largest=10**9)
    assert all(len(row.unique()) == 50 for row in drawn)
    assert drawn.max() > 10**8


def test_a_row_depends_on_its_key_alone() -> None:
    key = keys(5, torch.arange(6))
    sizes = torch.tensor([50, 60, 70, 80, 90, 100])
    whole = subset(key, 9, sizes, smallest=50, largest=100)
    assert torch.equal(whole[2:4], subset(key[2:4], 9, sizes[2:4], smallest=50, largest=100))
