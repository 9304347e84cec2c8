# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: the same bits, each batch read once."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

from tiny_run import alone, kd_mgd, tiny_loop
from tutelage.core import Batch
from tutelage.train.lockstep import InStep, advance, exhaust
from tutelage.train.loop import Loop


class Counted:
    """Batches that remember which were read."""

    def __init__(self) -> None:
        self.loader = tiny_loop(objective=alone()).batches
        self.read: list[tuple[int, int]] = []

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for position, batch in enumerate(self.loader.epoch(epoch, start), start):
            self.read.append((epoch, position))
            yield batch


def counting(steps: int, end: str, start: int = 0) -> Generator[int, None, str]:
    yield from range(start, steps)
    return end


def reading(batches: InStep, loop: Loop) -> Loop:
    loop.batches = batches
    return loop


def states(objectives: int, *, steps: int = 7) -> tuple[Counted, dict[int, dict[str, torch.Tensor]]]:
    counted = Counted()
    batches = InStep(counted, torch.device("cpu"))
    loops = {
        number: reading(batches, tiny_loop(objective=kd_mgd() if number else alone(), steps=steps))
        for number in range(objectives)
    }
    for _ in advance({number: loop.running() for number, loop in loops.items()}):
        pass
    return counted, {number: loop.distiller.state_dict() for number, loop in loops.items()}


def test_side_by_side_gives_the_bits_of_one_after_another() -> None:
    counted, found = states(3)
    assert counted.read == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]  # each once for all three
    for number, state in found.items():
        loop = tiny_loop(objective=kd_mgd() if number else alone(), steps=7)
        loop.run()
        wanted = loop.distiller.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[name], wanted[name]) for name in state)


def test_a_run_that_resumes_elsewhere_gets_its_own_batches(tmp_path: Path) -> None:
    first = tiny_loop(tmp_path, steps=7, save_every=3)
    running = first.running()
    for _ in range(4):
        next(running)
    running.close()  # killed after the third step
    counted = Counted()
    batches = InStep(counted, torch.device("cpu"))
    resumed = reading(batches, tiny_loop(tmp_path, steps=7, save_every=3))
    fresh = reading(batches, tiny_loop(steps=7))
    for _ in advance({"resumed": resumed.running(), "fresh": fresh.running()}):
        pass
    assert counted.read == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]
    one, other = resumed.distiller.state_dict(), fresh.distiller.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loop_that_is_elsewhere_costs_time_only() -> None:
    batches = InStep(Counted(), torch.device("cpu"))
    plain = tiny_loop(objective=alone()).batches
    for epoch, start in ((0, 0), (1, 3), (0, 1), (0, 1)):
        for one, other in zip(batches.epoch(epoch, start), plain.epoch(epoch, start), strict=True):
            assert torch.equal(one.index, other.index)
            assert torch.equal(one.inputs, other.inputs)


def test_the_one_furthest_behind_goes_first() -> None:
    order: list[str] = []

    def told(name: str, start: int) -> Generator[int, None, str]:
        for step in range(start, 3):
            order.append(name)
            yield step
        return name

    ends = list(advance({"ahead": told("ahead", 2), "behind": told("behind", 0)}))
    assert order == ["ahead", "behind", "behind", "behind"]
    assert ends == [("ahead", "ahead"), ("behind", "behind")]


def test_a_failure_closes_the_others() -> None:
    closed: list[bool] = []

    def patient() -> Generator[int, None, None]:
        try:
            yield from range(100)
        finally:
            closed.append(True)

    def broken() -> Generator[int, None, None]:
        yield 0
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(advance({"patient": patient(), "broken": broken()}))
    assert closed == [True]


def test_what_a_generator_returns() -> None:
    assert exhaust(counting(4, "end")) == "end"
    assert exhaust(counting(0, "at once")) == "at once"
