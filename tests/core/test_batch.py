# SPDX-License-Identifier: Apache-2.0
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from core.networks import images, small_batch
from tutelage.core import Batch, Frame
from tutelage.core.batch import share_counts
from tutelage.core.error import UserError


def test_rows_are_labelled_by_their_target() -> None:
    assert small_batch().labelled.tolist() == [True, True, False, True]
    assert Batch.of(images(2), torch.tensor([[0.0, 0.0], [0.5, 0.5]])).labelled.tolist() == [False, True]
    nothing = Batch.of(images(3))
    assert nothing.labelled.tolist() == [False] * 3
    assert nothing.target.tolist() == [-1] * 3
    assert Batch.of(images(2), [{"boxes": 1}, {"boxes": 2}]).labelled.tolist() == [True, True]


def test_ids_and_views_have_defaults() -> None:
    batch = Batch.of({"ids": torch.zeros(3, 7)}, torch.arange(3))
    assert (batch.index.tolist(), batch.view.tolist(), len(batch)) == ([0, 1, 2], [0, 0, 0], 3)
    assert Batch.of(images(2), index=torch.tensor([9, 4])).index.tolist() == [9, 4]


def test_a_batch_is_not_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        small_batch().target = None  # type: ignore[misc]


def test_a_view_takes_the_place_of_the_inputs() -> None:
    batch = small_batch(views={"strong": images(seed=1)})
    assert torch.equal(batch.seen_as("strong").inputs, images(seed=1))
    assert batch.seen_as("strong").target is batch.target
    with pytest.raises(UserError, match="the batch has no view 'srong'; did you mean strong"):
        batch.seen_as("srong")


def structured() -> Batch:
    return small_batch(
        extra={
            "names": ["a", "b", "c", "d"],
            "pair": (torch.arange(4), torch.arange(3)),
            "scale": torch.tensor(2.0),
            "token_mask": torch.tensor([[1, 1], [1, 0], [0, 0], [1, 1]]),
        },
        views={"strong": images(seed=1)},
    )


def test_moving_reaches_every_tensor() -> None:
    batch = structured().to("meta")
    found = [batch.inputs, batch.target, batch.labelled, batch.index, batch.view, batch.views["strong"]]
    found += [*batch.extra["pair"], batch.extra["scale"], batch.extra["token_mask"]]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert batch.extra["names"] == ["a", "b", "c", "d"]
    frame = Frame((8, 8), torch.zeros(4, 2), torch.zeros(5, 4), torch.zeros(5))
    assert small_batch(frame=frame).to("meta").frame.boxes.device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_cutting_keeps_rows_together(parts: int) -> None:
    batch = structured()
    cut = batch.split(parts)
    assert len(cut) == min(parts, 4)
    assert max(map(len, cut)) - min(map(len, cut)) <= 1
    for name in ("inputs", "target", "labelled", "index", "view"):
        assert torch.equal(torch.cat([getattr(one, name) for one in cut]), getattr(batch, name))
    assert [name for one in cut for name in one.extra["names"]] == batch.extra["names"]
    assert torch.equal(torch.cat([one.views["strong"] for one in cut]), batch.views["strong"])
    assert all(one.extra["scale"] == 2 for one in cut)


def test_a_frame_is_not_cut() -> None:
    frame = Frame((8, 8), torch.zeros(4, 2), torch.zeros(5, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="a batch with a frame cannot be split after collation"):
        small_batch(frame=frame).split(2)


def test_counts_by_what_is_averaged() -> None:
    frame = Frame((8, 8), torch.zeros(4, 2), torch.zeros(5, 4), torch.zeros(5))
    batch = structured()
    assert batch.count("samples") == 4
    assert batch.count("labelled") == 3
    assert batch.count("tokens") == 5
    assert small_batch(frame=frame).count("boxes") == 5
    assert {batch.count(what).ndim for what in ("samples", "labelled", "tokens")} == {0}


def test_shared_counts_weigh_means_into_the_mean_of_the_whole() -> None:
    whole = small_batch(8)
    values = torch.rand(8, dtype=torch.float64)
    cut = [Batch.of(images(n), t) for n, t in zip((3, 1, 4), whole.target.split([3, 1, 4]), strict=True)]
    shared = share_counts(cut, ("samples", "labelled"))
    for what, rows in (("samples", torch.ones(8, dtype=torch.bool)), ("labelled", whole.labelled)):
        total: Any = 0.0
        for batch, own, kept in zip(shared, values.split([3, 1, 4]), rows.split([3, 1, 4]), strict=True):
            mean = own[kept].sum() / kept.sum().clamp(min=1)
            total = total + batch.count(what) / batch.mean_count[what] * mean / len(shared)  # type: ignore[arg-type]
        torch.testing.assert_close(total, values[rows].mean())


def test_counts_are_averaged_over_ranks() -> None:
    (batch,) = share_counts([small_batch()], ("labelled",), lambda counts: counts * 2)
    assert batch.mean_count["labelled"] == 6
    assert share_counts([small_batch()], ())[0].mean_count == {}
