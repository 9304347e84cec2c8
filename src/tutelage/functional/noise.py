# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a function of their key, not of a generator's state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Constants of the splitmix64 finalizer (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GAMMA, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def mix(*words: int) -> int:
    """Return one well-mixed 63-bit integer from several: the key of a random choice.

    Example:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    mask = (1 << 64) - 1
    x = 0
    for word in words:
        x = (x + word + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return x >> 1


def keys(key: int, index: Tensor) -> Tensor:
    """Return one well-mixed 64-bit key for each sample: `[B]` int64, a function of key and sample id.

    Example:
        >>> bool((keys(7, torch.arange(4))[2:] == keys(7, torch.tensor([2, 3]))).all())
        True
    """
    return _mix(index.long() * _GAMMA + key)


def uniform(key: int, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Return uniform numbers in [0, 1) that depend on nothing but their key and sample id.

    The draw of a sample is the same in whatever batch, micro-batch or rank the sample is met, on whatever
    device, and a resumed run needs no generator state.

    Args:
        key: of the choice: mixed from seed, step and what is drawn.
        index: `[B]` int64 sample ids.
        shape: of one sample's draw.

    Returns:
        `[B, *shape]` float32 on the device of `index`.

    Example:
        >>> whole = uniform(7, torch.arange(4), (3,))
        >>> bool((whole[2:] == uniform(7, torch.tensor([2, 3]), (3,))).all())
        True
    """
    place = torch.arange(math.prod(shape), device=index.device)
    rows = keys(key, index)
    bits = _mix(rows[:, None] + (place + 1) * _GAMMA)
    # 24 bits make every float32 in [0, 1) exact and 1.0 impossible
    return ((bits >> 40) & ((1 << 24) - 1)).float().mul(2.0**-24).view(len(index), *shape)


def subset(key: Tensor, count: int, population: Tensor, *, smallest: int, largest: int) -> Tensor:
    """Return distinct numbers below a population, drawn at random: a function of the key.

    The numbers are the first ones of a keyed permutation (a Feistel network over the next power of four,
    Luby and Rackoff 1988, of which values beyond the population are passed over), so that time and memory
    grow with `count` and not with the population. Where a population is smaller than `count`, numbers are
    drawn with replacement.

    Args:
        key: `[B]` int64, one a row.
        count: how many a row.
        population: `[B]` int64, numbers are drawn from [0, population).
        smallest: of the populations that can occur, > 0.
        largest: of them.

    Returns:
        `[B, count]` int64.

    Example:
        >>> drawn = subset(keys(7, torch.arange(2)), 4, torch.tensor([4, 4]), smallest=4, largest=4)
        >>> drawn.sort(dim=1).values
        tensor([[0, 1, 2, 3],
                [0, 1, 2, 3]])
    """
    half = max(1, ((largest - 1).bit_length() + 1) // 2)
    share = smallest / 4**half
    # six standard deviations more than are needed on average: fewer than `count` hits never happen
    tried = math.ceil((count + 6 * math.sqrt(count * (1 - share)) + 16) / share)
    place = torch.arange(min(tried, 4**half), device=key.device)
    high, low = (place >> half)[None], (place & (2**half - 1))[None]
    for turn in range(6):
        high, low = low, high ^ (_mix(low + _mix(key + turn)[:, None]) & (2**half - 1))
    drawn = (high << half) | low
    hit = drawn < population[:, None]
    slot = torch.where(hit, hit.cumsum(dim=1) - 1, count).clamp(max=count)
    bits = _mix(key[:, None] + (torch.arange(count + 1, device=key.device) + 7) * _GAMMA)
    repeated = ((bits >> 1) & ((1 << 62) - 1)) % population[:, None]
    distinct = repeated.scatter(1, slot, drawn)
    return torch.where(population[:, None] < count, repeated, distinct)[:, :count]
