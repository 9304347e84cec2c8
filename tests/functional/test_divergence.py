# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from tutelage.functional.divergence import cross_entropy, kl_divergence, soft_cross_entropy


def pair(*shape: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = scale * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return drawn[0].requires_grad_(), drawn[1]


def test_each_row_is_the_entropy_of_scipy() -> None:
    student, teacher = pair(7, 11)
    p, q = student.detach().softmax(1), teacher.softmax(1)
    expected = torch.tensor([stats.entropy(t, s) for s, t in zip(p.numpy(), q.numpy(), strict=True)])
    torch.testing.assert_close(kl_divergence(student, teacher).detach(), expected)
    entropy = torch.tensor([stats.entropy(t) for t in q.numpy()])
    torch.testing.assert_close(cross_entropy(student, teacher).detach(), expected + entropy)
    torch.testing.assert_close(soft_cross_entropy(student, q), cross_entropy(student, teacher))


def test_a_hard_target_is_the_usual_cross_entropy() -> None:
    student, _ = pair(6, 5)
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    expected = F.cross_entropy(student, target, reduction="none")
    torch.testing.assert_close(soft_cross_entropy(student, F.one_hot(target, 5).double()), expected)


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,), (0, 5)])
def test_the_last_dimension_is_summed(shape: tuple[int, ...]) -> None:
    student, teacher = pair(*shape)
    for divergence in (kl_divergence, cross_entropy):
        assert divergence(student, teacher).shape == shape[:-1]
        flat = divergence(student.reshape(-1, 5), teacher.reshape(-1, 5))
        torch.testing.assert_close(divergence(student, teacher).flatten(), flat.flatten())


def test_zero_and_without_gradient_where_they_agree() -> None:
    student, teacher = pair(4, 5)
    same = teacher.clone().requires_grad_()
    value = kl_divergence(same, teacher + 7)  # a shift of a row changes no probability
    assert value.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(value.sum(), same)
    assert grad.abs().max() < 1e-12
    assert (kl_divergence(student, teacher) > 0).all()


def test_the_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = pair(4, 5)
    expected = (student.softmax(1) - teacher.softmax(1)).detach()
    for divergence in (kl_divergence, cross_entropy):
        (grad,) = torch.autograd.grad(divergence(student, teacher).sum(), student)
        torch.testing.assert_close(grad, expected)


def test_gradients_are_those_of_finite_differences() -> None:
    student, teacher = pair(3, 4)
    taught = teacher.clone().requires_grad_()
    for divergence in (kl_divergence, cross_entropy):
        torch.autograd.gradcheck(divergence, (student, taught))


def test_classes_masked_in_both_count_nothing() -> None:
    student, teacher = pair(4, 5)
    mask = torch.tensor([True, True, False, True, False])
    for divergence in (kl_divergence, cross_entropy):
        masked = student.masked_fill(~mask, -torch.inf)
        value = divergence(masked, teacher.masked_fill(~mask, -torch.inf))
        torch.testing.assert_close(value, divergence(student[:, mask], teacher[:, mask]))
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert grad.isfinite().all()
        assert not grad[:, ~mask].any()


def test_a_teacher_that_is_certain_stays_finite() -> None:
    student = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    teacher = torch.tensor([[400.0, 0.0, 0.0]])
    for divergence in (kl_divergence, cross_entropy):
        value = divergence(student, teacher)
        torch.testing.assert_close(value, torch.tensor([200.0]))
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert grad.isfinite().all()


def test_only_the_student_s_mask_makes_it_infinite() -> None:
    student, teacher = pair(1, 3)
    assert kl_divergence(student.masked_fill(torch.tensor([True, False, False]), -torch.inf), teacher).isinf().all()
