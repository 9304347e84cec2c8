# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor, distributed

from gloo_pool import GlooPool
from tutelage.functional.collective import gather_rows

ROWS = torch.arange(15.0).view(5, 3)
CUTS = ((0, 2), (2, 5))  # ranks with different numbers of rows


def coupled(own: Tensor, everyone: Tensor) -> Tensor:
    """A mean over own rows of a comparison with all rows."""
    return (own @ everyone.T / 50).sin().sum() / (len(own) * len(everyone))


def on_a_rank() -> tuple[Tensor, Tensor, int]:
    start, stop = CUTS[distributed.get_rank()]
    own = ROWS[start:stop].clone().requires_grad_()
    everyone, first = gather_rows(own)
    share = len(own) * distributed.get_world_size() / len(everyone)
    loss = share * coupled(own, everyone)
    return loss.detach(), torch.autograd.grad(loss, own)[0], first


def test_the_mean_over_ranks_is_one_process_with_all_rows(gloo: GlooPool) -> None:
    whole = ROWS.clone().requires_grad_()
    expected = coupled(whole, whole)
    answers = gloo.run(on_a_rank)
    torch.testing.assert_close(torch.stack([loss for loss, _, _ in answers]).mean(), expected.detach())
    gradients = torch.cat([gradient for _, gradient, _ in answers]) / 2
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, whole)[0])
    assert [first for _, _, first in answers] == [0, 2]


def test_one_process_keeps_its_rows() -> None:
    everyone, first = gather_rows(ROWS)
    assert everyone is ROWS
    assert first == 0
