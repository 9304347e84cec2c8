# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from tutelage.train.average import Average


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)


def test_follows_the_recursion_it_states() -> None:
    student = Network()
    average = Average(student, decay=0.9)
    expected = student.linear.weight.detach().double().clone()
    for step in range(5):
        with torch.no_grad():
            student.linear.weight.add_(step + 1.0)
        average.update(step)
        expected = 0.9 * expected + 0.1 * student.linear.weight.detach().double()
    assert average.weights["linear.weight"].double() == pytest.approx(expected, abs=1e-5)


def test_a_ramp_follows_the_recursion_of_the_published_code() -> None:
    """Momentum (1 - m) exp(-(1 + t) / gamma) + m, of which the first update is a copy."""
    student = Network()
    average = Average(student, decay=0.9, ramp=3.0)
    expected: list[float] = []
    for step in range(12):
        with torch.no_grad():
            student.linear.weight.add_(step + 1.0)
        average.update(step)
        momentum = (1 - 0.1) * math.exp(-(1 + step) / 3.0) + 0.1
        weights = student.linear.weight.detach().double().flatten().tolist()
        if step == 0:
            expected = weights
        expected = [(1 - momentum) * old + momentum * new for old, new in zip(expected, weights, strict=True)]
        assert average.weights["linear.weight"].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    shares = [average.share(step) for step in range(200)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == pytest.approx(0.1)


def test_buffers_are_averaged_where_they_float_and_copied_where_they_count() -> None:
    student = Network()
    average = Average(student, decay=0.5)
    student.norm(torch.randn(4, 3) + 8)
    average.update(0)
    assert student.norm.running_mean is not None
    assert torch.allclose(average.weights["norm.running_mean"], student.norm.running_mean / 2)
    assert int(average.weights["norm.num_batches_tracked"]) == 1


def test_is_lent_and_taken_back_bit_by_bit() -> None:
    student = Network()
    average = Average(student, decay=0.5)
    with torch.no_grad():
        student.linear.weight.mul_(3.0)
    own = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with average.applied():
        assert torch.equal(student.linear.weight, average.weights["linear.weight"])
    assert all(torch.equal(tensor, own[name]) for name, tensor in student.state_dict().items())
    assert not any(tensor.requires_grad for tensor in average.weights.values())


def test_takes_up_the_weights_of_a_checkpoint() -> None:
    average = Average(Network(), decay=0.5)
    other = {name: torch.ones_like(tensor) for name, tensor in average.weights.items()}
    average.load(other)
    assert all(bool((tensor == 1).all()) for tensor in average.weights.values())
    other["linear.weight"].zero_()
    assert bool((average.weights["linear.weight"] == 1).all())
