# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from gloo_pool import GlooPool
from tutelage.core import ranks


def test_one_process_is_the_whole() -> None:
    value = torch.tensor([1.0, 2.0])
    assert (ranks.world_size(), ranks.rank()) == (1, 0)
    assert ranks.mean(value) is value
    assert ranks.gather(value) is value


def collect() -> dict[str, Tensor | int]:
    here = ranks.rank()
    rows = torch.arange(6.0).view(3, 2)[: 3 if here else 1] + 10 * here
    given = torch.tensor([1.0, float(here)])
    mean = ranks.mean(given)
    assert given[1] == here, "what is averaged is left as it was"
    return {
        "rank": here,
        "size": ranks.world_size(),
        "mean": mean,
        "rows": ranks.gather(rows),
        "ids": ranks.gather(torch.arange(here, 2)),
        "flags": ranks.gather(torch.tensor([bool(here)])),
        "nothing": ranks.gather(torch.zeros(0, 4)),
        "some": ranks.gather(torch.ones(here, 2, 2)),
        "half": ranks.gather(torch.full((1,), here, dtype=torch.bfloat16)),
    }


def test_ranks_join_rows_in_their_order(gloo: GlooPool) -> None:
    one, two = gloo.run(collect)
    assert (one.pop("rank"), two.pop("rank")) == (0, 1)
    expected = {
        "size": 2,
        "mean": torch.tensor([1.0, 0.5]),
        "rows": torch.tensor([[0.0, 1.0], [10.0, 11.0], [12.0, 13.0], [14.0, 15.0]]),
        "ids": torch.tensor([0, 1, 1]),
        "flags": torch.tensor([False, True]),
        "nothing": torch.zeros(0, 4),
        "some": torch.ones(1, 2, 2),
        "half": torch.tensor([0.0, 1.0], dtype=torch.bfloat16),
    }
    torch.testing.assert_close(one, expected)
    torch.testing.assert_close(two, expected)
