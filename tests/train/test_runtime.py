# SPDX-License-Identifier: Apache-2.0
import os

import pytest
import torch
from torch import nn

from gloo_pool import GlooPool
from tutelage.core import ranks
from tutelage.core.error import UserError
from tutelage.train.runtime import Runtime


def test_autocast_is_where_it_was_asked_for() -> None:
    layer, images = nn.Linear(3, 2), torch.ones(1, 3)
    with Runtime("cpu").autocast():
        assert layer(images).dtype == torch.float32
    with Runtime("cpu", "bf16").autocast():
        assert layer(images).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


def test_what_the_machine_cannot_do_is_one_line() -> None:
    with pytest.raises(UserError, match="device 'gpu' is not known to torch"):
        Runtime("gpu")
    with pytest.raises(UserError, match="fp16 needs a GPU; use bf16 or float32"):
        Runtime("cpu", "fp16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match="torch sees no GPU"):
        Runtime("cuda")


def test_a_step_clips_tells_the_norm_and_clears() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    runtime = Runtime("cpu")
    runtime.backward((weight * torch.tensor([3.0, 4.0])).sum())
    norm = runtime.step(optimizer, [weight], clip=1.0)
    assert norm is not None
    assert float(norm) == pytest.approx(5.0)
    assert weight.detach() == pytest.approx(torch.tensor([-0.6, -0.8]))
    assert weight.grad is None
    runtime.backward(weight.sum())
    assert runtime.step(optimizer, [weight], clip=None) is None
    assert weight.detach() == pytest.approx(torch.tensor([-1.6, -1.8]))


def test_one_process_joins_nothing() -> None:
    assert int(os.environ.get("WORLD_SIZE", "1")) == 1
    with Runtime("cpu").joined():
        assert ranks.world_size() == 1
    done: list[int] = []
    Runtime.first(lambda: done.append(1))
    assert done == [1]


def acts_on_the_first_rank() -> tuple[int, str]:
    done: list[int] = []
    Runtime.first(lambda: done.append(1))

    def refuse() -> None:
        raise UserError("no room")

    try:
        Runtime.first(refuse)
    except UserError as error:
        return len(done), str(error)
    return len(done), "nothing was raised"


def test_what_goes_wrong_on_the_first_rank_is_raised_on_all(gloo: GlooPool) -> None:
    assert gloo.run(acts_on_the_first_rank) == [(1, "no room"), (0, "no room")]
