# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest
import torch

from tutelage.core import Batch
from tutelage.core.error import UserError
from tutelage.data.mix import Mix, patch


def batch(rows: int = 8, unlabelled: tuple[int, ...] = ()) -> Batch:
    """Each row has a value of its own in all pixels."""
    target = torch.arange(rows) % 4
    target[list(unlabelled)] = -1
    images = torch.arange(rows).float().view(-1, 1, 1, 1).expand(-1, 2, 10, 10).clone()
    return Batch.of(images, target, views={"strong": images + 100})


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_targets_are_mixed_as_the_pixels_are(options: dict[str, float]) -> None:
    mix = Mix(4, **options)
    for key in range(20):
        mixed = mix(batch(), key)
        # a row's value says how much of which row is in it; the target must say the same
        assert torch.allclose(mixed.target.sum(1), torch.ones(8))
        assert torch.allclose(mixed.inputs.flatten(1).sum(), batch().inputs.sum(), rtol=0.5)
        one = torch.nn.functional.one_hot(torch.arange(8) % 4, 4).float()
        value = mixed.inputs.flatten(1).mean(1)
        for row in range(8):
            candidates = [
                (share, partner)
                for partner in range(8)
                if partner != row and 0 <= (share := float((value[row] - partner) / (row - partner))) <= 1
            ] + [(1.0, row)]
            fits = [
                torch.allclose(mixed.target[row], s * one[row] + (1 - s) * one[p], atol=1e-4) for s, p in candidates
            ]
            assert any(fits)


def test_mixup_is_a_linear_mean_and_cutmix_a_rectangle() -> None:
    up, cut = Mix(4, mixup=1.0)(batch(), 5), Mix(4, cutmix=1.0)(batch(), 5)
    assert (up.inputs.flatten(1).std(1) < 1e-5).all()
    for row, image in enumerate(cut.inputs[:, 0]):
        foreign = image != row
        if foreign.any():
            y, x = foreign.nonzero().T
            assert foreign[y.min() : y.max() + 1, x.min() : x.max() + 1].all()
            assert len(image[foreign].unique()) == 1


def test_unlabelled_rows_are_neither_changed_nor_used() -> None:
    given = batch(unlabelled=(1, 4))
    for key in range(20):
        for options in ({"mixup": 1.0}, {"cutmix": 1.0}):
            mixed = Mix(4, **options)(given, key)
            assert torch.equal(mixed.inputs[[1, 4]], given.inputs[[1, 4]])
            assert (mixed.target[[1, 4]] == 0).all()
            assert torch.equal(mixed.labelled, given.labelled)
    # nothing of rows 1 and 4 is anywhere else: cutmix keeps values apart
    cut = Mix(4, cutmix=0.1)(given, 3)
    assert not torch.isin(cut.inputs[[0, 2, 3, 5, 6, 7]], torch.tensor([1.0, 4.0])).any()


def test_it_is_a_function_of_the_key() -> None:
    mix = Mix(4, mixup=1.0, cutmix=1.0)
    before = (torch.get_rng_state(), str(np.random.get_state()))  # noqa: NPY002
    assert torch.equal(mix(batch(), 3).inputs, mix(batch(), 3).inputs)
    assert not torch.equal(mix(batch(), 3).inputs, mix(batch(), 4).inputs)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == str(np.random.get_state())  # noqa: NPY002


def test_views_are_mixed_alike() -> None:
    mixed = Mix(4, mixup=1.0)(batch(), 3)
    assert torch.allclose(mixed.views["strong"], mixed.inputs + 100, atol=1e-4)


def test_soft_targets_may_be_mixed_again() -> None:
    twice = Mix(4, mixup=1.0)(Mix(4, cutmix=1.0)(batch(), 3), 4)
    assert torch.allclose(twice.target.sum(1), torch.ones(8))


def test_the_share_follows_beta() -> None:
    shares = [float(Mix(2, mixup=0.5)(two(), key).inputs[0, 0, 0, 0]) for key in range(400)]
    mixed = [share for share in shares if share > 0]
    # the permutation of two rows changes places half the time; Beta(0.5, 0.5) has mean 1/2 and variance 1/8
    assert 140 < len(mixed) < 260
    assert np.mean(mixed) == pytest.approx(0.5, abs=0.08)
    assert np.var(mixed) == pytest.approx(0.125, abs=0.03)


def two() -> Batch:
    return Batch.of(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([0, 1]))


def test_a_patch_counts_its_pixels() -> None:
    draw = np.random.default_rng(0)
    for share in (0.0, 0.3, 0.9, 1.0):
        stays, exact = patch((9, 12), share, draw)
        assert exact == pytest.approx(float(stays.float().mean()))
        assert exact >= share - 0.1
    assert patch((9, 12), 1.0, draw)[1] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to mix: give data.mixup or data.cutmix"),
        ({"mixup": -1.0}, "data.mixup is the alpha of a Beta distribution, at least 0; not -1.0"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Mix(4, **options)


def test_other_inputs_are_refused() -> None:
    with pytest.raises(UserError, match=r"^mixup and cutmix need images and one class an image$"):
        Mix(4, mixup=1.0)(Batch.of({"ids": torch.zeros(2, 3)}, torch.tensor([0, 1])), 0)
