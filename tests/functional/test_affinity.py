# SPDX-License-Identifier: Apache-2.0
import numpy as np
import torch
from torch import Tensor

from tutelage.functional.affinity import affinity, affinity_loss, random_walk, together


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_affinity_by_hand() -> None:
    features = drawn(2, 3, 5)
    found = affinity(features)
    for n, i, j in np.ndindex(2, 5, 5):
        expected = 1 / (1 + np.exp(-float(features[n, :, i] @ features[n, :, j])))
        assert abs(found[n, i, j].item() - expected) < 1e-12


def test_overlapping_masks_join_their_positions() -> None:
    masks = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0]], [[0, 0, 0, 0], [1, 0, 0, 1]]], dtype=torch.bool)
    found = together(masks)
    for n, i, j in np.ndindex(2, 4, 4):
        assert found[n, i, j].item() == any(bool(mask[i] and mask[j]) for mask in masks[n])


def test_the_loss_is_small_where_affinities_say_who_belongs_together() -> None:
    target = together(torch.tensor([[[1, 1, 0], [0, 0, 1]]]))
    good, bad = (affinity_loss(one.double(), target) for one in (target, ~target))
    assert good == 0
    torch.testing.assert_close(bad, torch.tensor([(5 / 6 + 4 / 5) / 2], dtype=torch.float64))


def test_no_pair_of_a_kind_is_no_division_by_zero() -> None:
    likeness = torch.full((1, 2, 2), 0.5)
    for target in (torch.ones(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)):
        torch.testing.assert_close(affinity_loss(likeness, target), torch.tensor([0.2]))


def test_a_walk_by_hand() -> None:
    scores, likeness = drawn(2, 3, 4), drawn(2, 4, 4, seed=1).exp()
    found = random_walk(scores, likeness)
    probabilities = scores.softmax(1)
    for n, k, j in np.ndindex(2, 3, 4):
        expected = sum(float(probabilities[n, k, i] * likeness[n, i, j] / likeness[n, i].sum()) for i in range(4))
        assert abs(found[n, k, j].item() - expected) < 1e-12


def test_classes_that_cannot_be_there_get_nothing() -> None:
    scores, likeness = drawn(2, 3, 4), drawn(2, 4, 4, seed=1).exp()
    valid = torch.tensor([[True, False, True], [False, False, False]])
    found = random_walk(scores, likeness, valid)
    assert not found[0, 1].any()
    assert not found[1].any()
    torch.testing.assert_close(found[:1, ::2], random_walk(scores[:1, ::2], likeness[:1]))


def test_a_walk_that_stays_where_it_is() -> None:
    scores = drawn(2, 3, 4)
    torch.testing.assert_close(
        random_walk(scores, torch.eye(4, dtype=torch.float64).expand(2, 4, 4)), scores.softmax(1)
    )


def test_gradcheck() -> None:
    features, scores = drawn(1, 2, 3).requires_grad_(), drawn(1, 2, 3, seed=1).requires_grad_()
    target = together(torch.tensor([[[1, 1, 0]]]))
    assert torch.autograd.gradcheck(lambda f: affinity_loss(affinity(f), target), features)
    assert torch.autograd.gradcheck(lambda f, s: random_walk(s, affinity(f)), (features, scores))


def test_a_row_without_affinity_gives_nothing_and_a_finite_gradient() -> None:
    likeness = torch.zeros(1, 3, 3, requires_grad=True)
    found = random_walk(torch.zeros(1, 2, 3), likeness)
    assert not found.any()
    assert torch.autograd.grad(found.sum(), likeness)[0].isfinite().all()
