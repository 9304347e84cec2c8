# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import Tensor

from tutelage.functional.noise import keys, mix, uniform

MASK = (1 << 64) - 1


def reference(key: int, index: int, place: int) -> float:
    """The same number from Python's unbounded integers."""
    gamma = 0x9E3779B97F4A7C15

    def finalise(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    row = finalise((index * gamma + key) & MASK)
    return (finalise((row + (place + 1) * gamma) & MASK) >> 40) / 2**24


def correlation(one: Tensor, other: Tensor) -> float:
    pair = torch.stack([one.double().flatten(), other.double().flatten()])
    return torch.corrcoef(pair)[0, 1].item()


@pytest.mark.parametrize("key", [0, 1, mix(0, 5, 3), mix(2**62), (1 << 63) - 1])
def test_every_number_is_that_of_the_reference(key: int) -> None:
    index = torch.tensor([0, 1, 2, 50_000, 2**40, 2**62])
    given = uniform(key, index, (2, 3))
    assert given.dtype == torch.float32
    expected = [[reference(key, i, place) for place in range(6)] for i in index.tolist()]
    assert given.flatten(1).tolist() == expected


def test_moments_are_those_of_a_uniform() -> None:
    """Mean 1/2, variance 1/12, third and fourth central moments 0 and 1/80, each within five sigmas."""
    drawn = uniform(mix(3, 1), torch.arange(2000), (500,)).double()
    count = drawn.numel()
    centred = drawn - 0.5
    for power, expected in ((1, 0.0), (2, 1 / 12), (3, 0.0), (4, 1 / 80)):
        spread = math.sqrt((1 / ((2 * power + 1) * 4**power) - expected**2) / count)
        assert abs(centred.pow(power).mean().item() - expected) < 5 * spread
    assert 0 <= drawn.min().item() < 1e-5
    assert 1 - 1e-5 < drawn.max().item() < 1


def test_values_fill_the_interval_evenly() -> None:
    drawn = uniform(mix(9), torch.arange(1000), (100,))
    counts = torch.histc(drawn, bins=50, min=0, max=1)
    expected = drawn.numel() / 50
    chi_squared = ((counts - expected).square() / expected).sum().item()
    assert abs(chi_squared - 49) < 5 * math.sqrt(2 * 49)


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_neighbouring_samples_places_and_keys_are_independent(step: int) -> None:
    """Correlations within five sigmas of zero."""
    index, limit = torch.arange(4000), 5 / math.sqrt(4000 * 20)
    drawn = uniform(mix(0, 0), index, (20,))
    assert abs(correlation(drawn, uniform(mix(0, 0), index + step, (20,)))) < limit
    assert abs(correlation(drawn, uniform(mix(0, step), index, (20,)))) < limit
    assert abs(correlation(drawn, uniform(mix(step, 0), index, (20,)))) < limit
    assert abs(correlation(drawn, uniform(mix(0, 0) + step, index, (20,)))) < limit
    many = uniform(5, torch.arange(80), (2000,))
    assert abs(correlation(many[:, :-step], many[:, step:])) < 5 / math.sqrt(80 * (2000 - step))


def test_rows_do_not_repeat() -> None:
    drawn = uniform(mix(1), torch.arange(20_000), (4,))
    assert len(torch.unique(drawn, dim=0)) == len(drawn)
    assert len(torch.unique(keys(mix(1), torch.arange(100_000)))) == 100_000


def test_a_draw_depends_on_nothing_but_its_key() -> None:
    index = torch.arange(10)
    whole = uniform(4, index, (3, 2))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    shuffled = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(4, index[shuffled], (3, 2)), whole[shuffled])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(uniform(4, index, (6,)).view(10, 3, 2), whole)
    assert torch.equal(uniform(4, index, (4, 2))[:, :3], whole)  # a longer draw begins with the shorter
    assert torch.equal(uniform(4, index.int(), (3, 2)), whole)
    assert torch.equal(torch.compile(uniform, backend="eager")(4, index, (3, 2)), whole)


def test_shapes() -> None:
    index = torch.arange(3)
    assert uniform(0, index).shape == (3,)
    assert uniform(0, index, (0,)).shape == (3, 0)
    assert uniform(0, index[:0], (2,)).shape == (0, 2)
    assert uniform(0, index.to("meta"), (2,)).device.type == "meta"


def test_words_are_mixed_in_their_order() -> None:
    found = {mix(*words) for a in range(20) for b in range(20) for words in ((a,), (a, b), (a, b, 0))}
    assert len(found) == 20 + 400 + 400
    assert all(0 <= key < 1 << 63 for key in found)
    bits = torch.tensor([[mix(0, word) >> bit & 1 for bit in range(63)] for word in range(2000)]).double()
    assert (bits.mean(0) - 0.5).abs().max() < 5 / math.sqrt(4 * 2000)
