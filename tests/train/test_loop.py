# SPDX-License-Identifier: Apache-2.0
import errno
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from gloo_pool import GlooPool
from tiny_run import Stop, StopsAt, adapted, alone, kd_mgd, network, samples, tiny_loop, weights
from tutelage.core import Batch, Entry, Feeder, Model, Objective, Signals, Teacher, Term
from tutelage.core.error import UserError
from tutelage.core.term import Draw
from tutelage.methods.logits.kd import KD
from tutelage.train import checkpoint
from tutelage.train.checkpoint import load, save
from tutelage.train.loop import DivergedError, Loop


def lines(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in (None, line["kind"])]


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], atol=1e-6) for n in one)


def score(student: nn.Module) -> dict[str, float]:
    """Return a number that depends on every weight."""
    student.eval()
    with torch.no_grad():
        return {"top1": float(student(samples().images).square().mean())}


# --- what a step does --------------------------------------------------------------------------------------


def test_equals_a_loop_written_by_hand() -> None:
    settings: dict[str, Any] = {"optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01}}
    loop = tiny_loop(objective=alone(), steps=7, **settings)  # an epoch has 5 batches
    loop.run()

    student = network(4, seed=1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    step = 0
    for epoch in range(2):
        for batch in loop.batches.epoch(epoch):
            if step == 7:
                break
            optimizer.param_groups[0]["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / 7))
            F.cross_entropy(student(batch.inputs), batch.target).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    trained = loop.distiller.student.state_dict()
    assert step == 7
    assert close(student.state_dict(), trained)
    assert not close(network(4, seed=1).state_dict(), trained)


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    whole = tiny_loop(tmp_path / "1x8", batch_size=8, accumulate=1)
    parts = tiny_loop(tmp_path / "2x4", batch_size=4, accumulate=2)
    assert whole.steps_per_epoch == parts.steps_per_epoch == 5
    whole.run()
    parts.run()
    assert close(weights(whole), weights(parts))
    for one, other in zip(lines(tmp_path / "1x8"), lines(tmp_path / "2x4"), strict=True):
        assert one.keys() == other.keys()
        assert one["total"] == pytest.approx(other["total"], rel=1e-5)


def test_an_epoch_ends_with_a_smaller_step() -> None:
    loop = tiny_loop(objective=alone(), batch_size=8, accumulate=2, steps=6)
    loop.begin()
    sizes = []
    for group in loop._steps():
        sizes.append(len(group))
        loop.step(group)
    assert sizes == [2, 2, 1, 2, 2, 1]
    assert loop.steps_per_epoch == 3


def ranks_train(ema: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    loop = tiny_loop(batch_size=8, accumulate=2, steps=4, ema=ema, clip=0.5)
    loop.run()
    assert loop.average is not None
    return weights(loop), loop.average.weights


def test_two_ranks_equal_one_process(gloo: GlooPool) -> None:
    expected = ranks_train(0.8)
    for found in gloo.run(ranks_train, 0.8):
        assert close(expected[0], found[0])
        assert close(expected[1], found[1])


def test_gradients_are_clipped_to_their_norm() -> None:
    sgd: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 1.0}, "rate": {"decay": "constant"}}
    loop = tiny_loop(objective=alone(), steps=1, clip=0.01, **sgd)
    before = [parameter.detach().clone() for parameter in loop.distiller.student.parameters()]
    loop.run()
    moved = [p.detach() - b for p, b in zip(loop.distiller.student.parameters(), before, strict=True)]
    assert float(torch.cat([part.flatten() for part in moved]).norm()) == pytest.approx(0.01, rel=1e-4)


def test_rates_follow_their_schedule(tmp_path: Path) -> None:
    rate = {"decay": "multistep", "milestones": (1,), "gamma": 0.1, "warmup": 2}
    tiny_loop(tmp_path, objective=alone(), steps=8, rate=rate).run()
    assert [line["lr"] for line in lines(tmp_path, "train")] == pytest.approx(
        [0.005, 0.01, 0.01, 0.01, 0.01, 0.001, 0.001, 0.001]
    )


def test_the_weight_of_a_term_follows_its_schedule(tmp_path: Path) -> None:
    ramp = {"linear": [0, 1], "until": "4 steps"}
    tiny_loop(tmp_path, objective=Objective(task=0.5, kd=Entry(KD(), ramp)), steps=6).run()
    found = [(line["total"] - 0.5 * line["task"]) / line["kd"] for line in lines(tmp_path, "train")]
    assert found == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1], abs=1e-4)


def test_the_average_follows_the_weights_and_is_what_is_scored(tmp_path: Path) -> None:
    scored: list[dict[str, Tensor]] = []

    def look(student: nn.Module) -> dict[str, float]:
        scored.append({name: tensor.clone() for name, tensor in student.state_dict().items()})
        return {"top1": 0.5}

    loop = tiny_loop(tmp_path, objective=alone(), steps=4, ema=0.75, evaluate=look, evaluate_every=1)
    expected = {name: tensor.clone() for name, tensor in loop.distiller.student.state_dict().items()}
    loop.begin()
    for group in loop._steps():
        loop.step(group)
        now = loop.distiller.student.state_dict()
        expected = {name: 0.75 * tensor + 0.25 * now[name] for name, tensor in expected.items()}
    assert loop.average is not None
    assert close(expected, loop.average.weights)

    again = tiny_loop(tmp_path, objective=alone(), steps=4, ema=0.75, evaluate=look, evaluate_every=1)
    again.run()
    assert len(scored) == 4
    assert same(scored[-1], loop.average.weights)
    assert same(weights(again), weights(loop))  # the loan was given back


def test_bf16_computes_models_in_half_and_compares_in_full() -> None:
    seen: list[torch.dtype] = []

    class Probe(Term):
        def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
            seen.append(student.logits.dtype)
            return student.logits.square().mean()

    loop = tiny_loop(objective=Objective(task=1.0, probe=Probe(), kd=KD()), steps=2, precision="bf16")
    seen.clear()
    loop.begin()
    losses = loop.step(next(loop._steps()))
    assert seen == [torch.bfloat16]
    assert losses[0].total.dtype == torch.float32
    assert losses[0].parts["kd"].dtype == torch.float32
    assert {parameter.dtype for parameter in loop.distiller.parameters()} == {torch.float32}


def test_random_choices_depend_on_their_keys_alone() -> None:
    def trained(seed: int, noise: int) -> dict[str, Tensor]:
        loop = tiny_loop(student=network(4, seed=1, dropout=0.5))
        loop.seed = seed
        torch.manual_seed(noise)
        loop.run()
        return weights(loop)

    assert same(trained(7, noise=0), trained(7, noise=99))
    assert not same(trained(7, noise=0), trained(8, noise=0))


# --- what is recorded --------------------------------------------------------------------------------------


def test_records_come_when_they_are_due(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path, steps=7, log_every=3, evaluate=score, evaluate_every=2, ema=0.5)
    last = loop.run()
    assert [line["step"] for line in lines(tmp_path, "train")] == [3, 6, 7]
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [2, 4, 6, 7]
    assert lines(tmp_path)[-1] == {"kind": "evaluation", "step": 7, "epoch": 1.4, **last}
    assert set(lines(tmp_path)[-2]) == {"kind", "step", "epoch", "lr", "total", "task", "kd", "mgd"}


def test_without_scores_there_are_none(tmp_path: Path) -> None:
    assert tiny_loop(tmp_path, steps=2).run() == {}
    assert lines(tmp_path, "evaluation") == []


# --- resume ------------------------------------------------------------------------------------------------


class Counting(Feeder):
    """Shifts every image by the number of batches it has seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def feed(
        self, batch: Batch, students: Mapping[str, Model], teachers: Mapping[str, Teacher], draw: Draw
    ) -> Iterator[Batch]:
        self.seen += 1
        yield Batch.of(batch.inputs + self.seen / 100, batch.target, index=batch.index)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen}


SETTINGS: dict[str, dict[str, Any]] = {
    "kd+mgd, average, two micro-batches": {"ema": 0.9, "accumulate": 2, "batch_size": 4, "clip": 0.5},
    "dropout and batch norm": {"student": {"dropout": 0.5, "norm": True}},
    "momentum": {"optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True}},
    "an optimizer of timm": {"optimizer": {"name": "lion"}, "rate": {"decay": "linear", "warmup": 3}},
    "a feeder with a memory": {"feeders": True},
    "half precision": {"precision": "bf16"},
}


def fresh(folder: Path, name: str) -> Loop:
    settings = dict(SETTINGS[name])
    if "student" in settings:
        settings["student"] = network(4, seed=1, **settings["student"])
    if "feeders" in settings:
        settings["feeders"] = (Counting(),)
    return tiny_loop(folder, steps=9, save_every=2, evaluate=score, evaluate_every=3, **settings)


def cut(loop: Loop, step: int) -> None:
    """Run until the batches of a step are asked for."""
    loop.batches = StopsAt(loop.batches, step * loop.accumulate)
    with pytest.raises(Stop):
        loop.run()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_was_cut_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    straight = fresh(tmp_path / "straight", name)
    scores = straight.run()
    cut(fresh(tmp_path / "cut", name), 1)  # before the first checkpoint
    cut(fresh(tmp_path / "cut", name), 5)  # after the second, in the middle of an epoch
    resumed = fresh(tmp_path / "cut", name)
    assert resumed.run() == scores
    assert same(weights(straight), weights(resumed))
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "straight" / "metrics.jsonl").read_text()
    if straight.average is not None:
        assert resumed.average is not None
        assert same(straight.average.weights, resumed.average.weights)


def test_a_finished_run_is_scored_again_and_not_recorded_twice(tmp_path: Path) -> None:
    scores = fresh(tmp_path, "momentum").run()
    before = (tmp_path / "metrics.jsonl").read_text()
    assert fresh(tmp_path, "momentum").run() == scores
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_line_cut_by_the_kill_is_written_again(tmp_path: Path) -> None:
    fresh(tmp_path / "straight", "momentum").run()
    cut(fresh(tmp_path / "cut", "momentum"), 5)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "tot')
    fresh(tmp_path / "cut", "momentum").run()
    assert lines(tmp_path / "cut") == lines(tmp_path / "straight")


def test_a_checkpoint_of_other_layers_names_the_keys(tmp_path: Path) -> None:
    cut(fresh(tmp_path, "momentum"), 4)
    other = tiny_loop(tmp_path, student=network(5, seed=1), steps=9, save_every=2)
    with pytest.raises(UserError) as caught:
        other.run()
    newest = tmp_path / "checkpoints" / "step_000000004.safetensors"
    assert str(caught.value) == (
        f"{newest} does not fit: 4 of another shape (students.student.0.weight: [4, 1, 3, 3], not "
        "[5, 1, 3, 3], students.student.0.bias: [4], not [5], students.student.6.weight: [4, 4], not [4, 5], "
        "objective.terms.mgd.align.weight: [6, 4, 1, 1], not [6, 5, 1, 1])"
    )


def test_a_checkpoint_without_its_parts_is_one_line(tmp_path: Path) -> None:
    cut(fresh(tmp_path, "momentum"), 4)
    newest = tmp_path / "checkpoints" / "step_000000004.safetensors"
    state = load(newest)
    del state["optimizer"]
    save(newest, state)
    with pytest.raises(UserError, match=r"step_000000004.safetensors does not fit this run \('optimizer'\)"):
        fresh(tmp_path, "momentum").run()


# --- what is not finite ------------------------------------------------------------------------------------


class Spoils(Term):
    """Its value or its gradient is lost at one step, where a sample is in the batch."""

    def __init__(self, step: int, *, sample: int | None = None, gradient: bool = False) -> None:
        super().__init__()
        self.step, self.sample, self.gradient, self.now = step, sample, gradient, 0

    def draw(self, student: Signals, teacher: Signals | None, batch: Batch, draw: Draw) -> None:
        self.now = draw.step

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        here = self.sample is None or bool((batch.index == self.sample).any())
        if self.now != self.step or not here:
            return student.logits.square().mean()
        if self.gradient:  # the root of nothing: its value is finite, its slope is not
            return (student.logits * 0).abs().sqrt().sum()
        return student.logits.sum() * math.nan


def test_a_lost_loss_is_named_with_its_first_step_and_never_saved(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path, objective=Objective(task=1.0, spoils=Spoils(4)), steps=9, save_every=3)
    with pytest.raises(DivergedError) as caught:
        loop.run()
    newest = tmp_path / "checkpoints" / "step_000000003.safetensors"
    assert str(caught.value) == (
        "the loss of spoils is not finite at step 5: lower optimizer.lr, clip gradients (train.clip), or lower "
        f"the weight of the term; the last finite checkpoint is {newest}"
    )
    assert loop.shelf is not None
    assert loop.shelf.newest == newest
    assert all(math.isfinite(line["total"]) for line in lines(tmp_path))


def test_it_is_named_long_after(tmp_path: Path) -> None:
    objective = Objective(task=1.0, spoils=Spoils(4))
    with pytest.raises(DivergedError, match="the loss of spoils is not finite at step 5"):
        tiny_loop(tmp_path, objective=objective, steps=20, log_every=20, save_every=20).run()
    assert not (tmp_path / "checkpoints").exists()


def test_every_micro_batch_is_watched() -> None:
    batches = list(tiny_loop(batch_size=4).batches.epoch(0))
    first = int(batches[4].index[0])  # in the first of the two micro-batches of the third step
    objective = Objective(task=1.0, spoils=Spoils(2, sample=first))
    with pytest.raises(DivergedError, match="the loss of spoils is not finite at step 3"):
        tiny_loop(objective=objective, batch_size=4, accumulate=2, log_every=6).run()


def test_a_loss_is_named_and_not_the_norm_that_it_spoils() -> None:
    with pytest.raises(DivergedError) as caught:
        tiny_loop(objective=Objective(task=1.0, spoils=Spoils(2)), clip=1.0).run()
    assert str(caught.value).startswith("the loss of spoils is not finite at step 3: ")


def test_losses_that_are_lost_together_are_named_together() -> None:
    with pytest.raises(DivergedError, match="the loss of task and the loss of spoils are not finite at step 4: "):
        tiny_loop(objective=Objective(task=1.0, spoils=Spoils(2, gradient=True)), log_every=6).run()


def test_a_lost_gradient_is_named_where_it_is_measured() -> None:
    objective = Objective(task=1.0, spoils=Spoils(2, gradient=True))
    with pytest.raises(DivergedError, match="the gradient norm is not finite at step 3"):
        tiny_loop(objective=objective, clip=1.0).run()


def test_weights_that_a_gradient_spoilt_at_the_last_step_are_not_saved(tmp_path: Path) -> None:
    objective = Objective(task=1.0, spoils=Spoils(5, gradient=True))
    with pytest.raises(DivergedError, match=r"distiller students\.student\.0\.weight is not finite at step 6"):
        tiny_loop(tmp_path, objective=objective, steps=6, save_every=6, evaluate=score).run()
    assert not (tmp_path / "checkpoints").exists()
    assert lines(tmp_path, "evaluation") == []
    with pytest.raises(DivergedError, match="is not finite at step 6"):  # nor handed on without a checkpoint
        tiny_loop(objective=Objective(task=1.0, spoils=Spoils(5, gradient=True)), steps=6).run()


def test_an_average_is_watched_too(tmp_path: Path) -> None:
    loop = tiny_loop(tmp_path, steps=2, ema=0.5, save_every=2)
    assert loop.average is not None
    loop.average.weights["0.weight"][0] = 3e38
    loop.begin()
    loop.average.update(0)
    loop.average.weights["0.weight"][0] *= 10
    loop.never_finite = set()
    with pytest.raises(DivergedError, match=r"average 0\.weight is not finite at step 0"):
        loop._finite_state()


def test_a_mask_of_infinities_is_no_divergence(tmp_path: Path) -> None:
    class Masked(nn.Sequential):
        mask: Tensor

    student = Masked(*network(4, seed=1))
    student.register_buffer("mask", torch.full((2,), -math.inf))
    loop = tiny_loop(tmp_path, student=student, steps=4, save_every=2, ema=0.5)
    loop.run()
    assert loop.shelf is not None
    assert len(loop.shelf.paths()) == 2


# --- the disk ----------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(tensors: Any, path: Path, metadata: Any) -> None:
        if "000000004" in path.name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata=metadata)

    straight = fresh(tmp_path / "straight", "momentum")
    straight.run()
    monkeypatch.setattr(checkpoint, "save_file", fills)
    with pytest.raises(UserError, match=r"step_000000004.safetensors: the disk is full"):
        fresh(tmp_path / "cut", "momentum").run()
    left = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert left == ["step_000000002.safetensors"]
    monkeypatch.undo()
    resumed = fresh(tmp_path / "cut", "momentum")
    resumed.run()
    assert same(weights(resumed), weights(straight))


def test_the_parts_of_the_tiny_run_are_what_their_names_say() -> None:
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network(4, seed=1).modules())
    assert adapted(network(4, seed=1)).roles["map"].where == "2"
    assert kd_mgd().labels == ("task", "kd", "mgd")
