# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from torch import Tensor

from peak import peak
from tutelage.functional.divergence import generalized_js, kl_divergence, skewed_kl, skewed_reverse_kl
from tutelage.functional.tokens import over_tokens, token_mean

ROWS, WORDS = 12, 7


def drawn(seed: int = 0, rows: int = ROWS, words: int = WORDS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, words, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.rand(rows, generator=generator) < 0.6


def total(student: Tensor, teacher: Tensor, mask: Tensor, **options: Any) -> Tensor:
    return token_mean(over_tokens(skewed_reverse_kl, student, teacher, mask, **options), mask)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    student, teacher, mask = drawn()
    plain, parted = total(student, teacher, mask), total(student, teacher, mask, chunk=chunk)
    assert torch.equal(plain, parted)
    assert torch.equal(torch.autograd.grad(plain, student)[0], torch.autograd.grad(parted, student)[0])


def test_chunks_bound_the_memory_of_a_step() -> None:
    student, teacher, mask = drawn(rows=512, words=300)
    logits = student.numel() * student.element_size()

    def step(chunk: int) -> None:
        torch.autograd.grad(total(student, teacher, mask, chunk=chunk), student)

    plain, parted = (peak(lambda size=size: step(size)) for size in (512, 16))  # type: ignore[misc]
    assert plain > 4 * logits
    assert parted < 2.5 * logits  # the gradient itself, the pieces it is joined from, and one chunk


@pytest.mark.parametrize("chunk", [None, 5])
def test_what_does_not_count_reaches_neither_value_nor_gradient(chunk: int | None) -> None:
    student, teacher, mask = drawn(1)
    spoiled = student.detach().clone()
    spoiled[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, 0, 0, 0], dtype=torch.float64)
    other = teacher.clone()
    other[~mask] = torch.nan
    spoiled.requires_grad_()
    clean = total(student, teacher, mask, chunk=chunk)
    dirty = total(spoiled, other, mask, chunk=chunk)
    assert torch.equal(clean, dirty)
    gradient = torch.autograd.grad(dirty, spoiled)[0]
    assert torch.equal(gradient, torch.autograd.grad(clean, student)[0])
    assert not gradient[~mask].any()


def test_no_token_is_a_connected_zero() -> None:
    student, teacher, _ = drawn()
    loss = total(student, teacher, torch.zeros(ROWS, dtype=torch.bool))
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_no_row_is_a_connected_zero() -> None:
    student = torch.zeros(0, WORDS, requires_grad=True)
    loss = total(student, torch.zeros(0, WORDS), torch.zeros(0, dtype=torch.bool))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, student)[0].shape == (0, WORDS)


def test_leading_shape_is_kept() -> None:
    student, teacher, mask = drawn()
    rows = over_tokens(kl_divergence, student.view(3, 4, WORDS), teacher.view(3, 4, WORDS), mask.view(3, 4))
    assert rows.shape == (3, 4)
    torch.testing.assert_close(rows.flatten()[mask], kl_divergence(student, teacher)[mask])


@pytest.mark.parametrize("chunk", [None, 5])
def test_compiled(chunk: int | None) -> None:
    student, teacher, mask = drawn()
    fast: Any = torch.compile(total, fullgraph=True, backend="aot_eager")
    found, plain = fast(student, teacher, mask, chunk=chunk), total(student, teacher, mask)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, student), torch.autograd.grad(plain, student))


# the divergences that only language methods use


def test_without_skew_the_divergences_are_the_plain_ones() -> None:
    student, teacher, _ = drawn(2)
    torch.testing.assert_close(skewed_kl(student, teacher), kl_divergence(student, teacher))
    torch.testing.assert_close(skewed_reverse_kl(student, teacher), kl_divergence(teacher, student))


@pytest.mark.parametrize("skew", [0.1, 0.9])
def test_forward_and_reverse_change_places(skew: float) -> None:
    student, teacher, _ = drawn(3)
    torch.testing.assert_close(skewed_kl(student, teacher, skew), skewed_reverse_kl(teacher, student, skew))
    torch.testing.assert_close(generalized_js(student, teacher, skew), generalized_js(teacher, student, 1 - skew))


def test_a_word_masked_by_one_model_counts_nothing_and_spoils_no_gradient() -> None:
    student, teacher, _ = drawn(4)
    given = student.detach().clone()
    given[:, 2] = -torch.inf
    given.requires_grad_()
    for rows in (skewed_kl, skewed_reverse_kl, lambda s, t: generalized_js(s, t, 0.3)):
        loss = rows(given, teacher).sum()
        assert loss.isfinite()
        assert torch.autograd.grad(loss, given)[0].isfinite().all()
