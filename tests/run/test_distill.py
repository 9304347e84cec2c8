# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_recipe import KD_MGD, MODEL
from tutelage.core import Live
from tutelage.core.error import UserError
from tutelage.models.load import load as load_model
from tutelage.run.assemble import assemble
from tutelage.run.distill import distill, distilling, rehearse, score, teacher_recipe
from tutelage.run.recipe import Recipe, parse
from tutelage.train.log import Log
from tutelage.train.runtime import Runtime


@pytest.fixture(autouse=True)
def model() -> None:
    Path("model.py").write_text(MODEL)


def tiny(**sections: Any) -> Recipe:
    """Return the tiny recipe with keys of its sections changed."""
    made = dict(KD_MGD)
    for key, value in sections.items():
        made[key] = {**made[key], **value}
    return parse(made)


# --- what is assembled -------------------------------------------------------------------------------------


def test_first_weights_are_a_function_of_the_seed_and_of_nothing_else() -> None:
    def first(recipe: Recipe, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        return {name: tensor.clone() for name, tensor in assemble(recipe).student.module.state_dict().items()}

    taught = first(tiny(), 0)
    alone = first(parse({**KD_MGD, "teacher": None, "objective": {"task": 1.0}}), 99)
    seeded = first(tiny(train={"seed": 1}), 0)
    assert all(torch.equal(taught[name], alone[name]) for name in taught)
    assert not torch.equal(taught["0.weight"], seeded["0.weight"])


def test_lengths_are_counted_in_optimizer_steps() -> None:
    by_epochs = assemble(tiny(train={"steps": None, "epochs": 2, "accumulate": 5}))
    assert by_epochs.data.train.steps_per_epoch == 12  # 1197 samples, 100 a batch
    assert (by_epochs.steps_per_epoch, by_epochs.total_steps) == (3, 6)
    assert assemble(tiny(train={"steps": None, "epochs": 0.01})).total_steps == 1
    assert assemble(tiny()).total_steps == 4


@pytest.mark.parametrize(
    ("train", "epochs"), [({"steps": None, "epochs": 2.5, "accumulate": 5}, 3), ({"steps": 13}, 2), ({"steps": 4}, 1)]
)
def test_the_last_epochs_are_counted_from_the_end_of_the_run(train: dict[str, Any], epochs: int) -> None:
    late = {"epochs": 1, "augment": "digits"}
    loader = assemble(tiny(train=train, data={"augment_late": late})).data.train
    plain = assemble(tiny(train=train)).data.train
    assert loader.epochs == epochs
    for epoch in range(epochs):
        same = torch.equal(next(loader.epoch(epoch)).inputs, next(plain.epoch(epoch)).inputs)
        assert same == (epoch < epochs - 1)


def test_a_run_stopped_in_its_last_epochs_ends_with_the_same_bits() -> None:
    late = {"epochs": 1, "augment": "digits"}
    train = {"steps": 30, "log_every": 100, "save_every": "5 steps"}
    recipe = tiny(train=train, data={"augment_late": late})
    whole = distill(recipe, Path("whole"), quiet=True)
    stopped = distilling(recipe, Path("stopped"), quiet=True)
    assert next(step for step in stopped if step == 27) == 27  # the last epoch began at 24, the checkpoint is of 25
    stopped.close()
    resumed = distill(recipe, Path("stopped"), quiet=True)
    assert whole.folder.weights.read_bytes() == resumed.folder.weights.read_bytes()


def test_decay_spares_vectors_unless_told_otherwise() -> None:
    def decays(**optimizer: Any) -> dict[int, set[float]]:
        loop = assemble(tiny(optimizer=optimizer)).loop(Log(None, quiet=True))
        found: dict[int, set[float]] = {}
        for group in loop.optimizer.param_groups:
            for parameter in group["params"]:
                found.setdefault(min(parameter.ndim, 2), set()).add(group["weight_decay"])
        return found

    assert decays(weight_decay=0.1) == {1: {0.0}, 2: {0.1}}
    assert decays(weight_decay=0.1, decay_norms=True) == {1: {0.1}, 2: {0.1}}


def test_every_setting_of_the_loop_arrives() -> None:
    train = {
        "accumulate": 3,
        "clip": 0.5,
        "ema": 0.9,
        "precision": "bf16",
        "seed": 11,
        "log_every": 2,
        "decay": "multistep",
        "milestones": [1, 2],
        "gamma": 0.3,
        "end": 0.2,
        "warmup": "0.5 epochs",
    }
    made = assemble(tiny(train=train))
    loop = made.loop(Log(None, quiet=True))
    assert (loop.accumulate, loop.clip, loop.seed, loop.log_every) == (3, 0.5, 11, 2)
    assert loop.average is not None
    assert loop.average.decay == 0.9
    assert loop.runtime.precision == "bf16"
    assert (loop.rate.decay, tuple(loop.rate.milestones), loop.rate.gamma, loop.rate.end) == (
        "multistep",
        (1, 2),
        0.3,
        0.2,
    )
    assert loop.rate.warmup == 0.5 * made.steps_per_epoch == 2
    assert loop.distiller.facts.seed == 11
    assert loop.distiller.facts.steps_per_epoch == 4


@pytest.mark.parametrize(("ramp", "expected"), [(None, None), ("0 steps", None), ("7 steps", 7), ("0.5 epochs", 6)])
def test_the_ramp_of_the_average_is_counted_in_optimizer_steps(ramp: str | None, expected: float | None) -> None:
    average = assemble(tiny(train={"ema": {"decay": 0.9, "ramp": ramp}})).loop(Log(None, quiet=True)).average
    assert average is not None
    assert (average.decay, average.ramp) == (0.9, expected)


@pytest.mark.parametrize(("steps", "asked", "expected"), [(4, 50, 1), (60, 50, 3), (100, 50, 50), (4, 2, 2), (3, 2, 1)])
def test_a_short_run_has_more_than_one_line(steps: int, asked: int, expected: int) -> None:
    made = assemble(tiny(train={"steps": steps, "log_every": asked}))
    assert made.loop(Log(None, quiet=True)).log_every == expected


def test_the_mode_of_the_teacher_arrives() -> None:
    made = assemble(tiny(teacher={"mode": "batch_statistics"}))
    teacher = made.distiller.teachers["teacher"]
    assert isinstance(teacher, Live)
    assert teacher.mode == "batch_statistics"


# --- the fit of a teacher ----------------------------------------------------------------------------------


def test_a_fit_is_the_recipe_of_the_task_with_its_changes() -> None:
    fit = {"data": {"labels": 100}, "optimizer": {"lr": 0.5}, "train": {"epochs": 3}}
    found = teacher_recipe(tiny(teacher={"fit": fit}, train={"seed": 4, "clip": 2.0}))
    assert (found.student.model, found.student.options) == ("python:model.py:small", {"width": 6})
    assert found.teacher is None
    assert found.objective == {"task": 1.0}
    assert (found.data.labels, found.data.batch_size) == (100, 100)
    assert (found.optimizer.name, found.optimizer.lr) == ("adamw", 0.5)
    assert (found.train.epochs, found.train.steps, found.train.clip) == (3, None, 2.0)
    assert found.train.seed == 0, "one teacher for all seeds of the student"


def test_another_optimizer_takes_no_options_of_the_students() -> None:
    recipe = tiny(optimizer={"betas": [0.8, 0.9]}, teacher={"fit": {"optimizer": {"name": "sgd", "lr": 0.2}}})
    assert teacher_recipe(recipe).optimizer.model_dump(exclude_defaults=True) == {"lr": 0.2}


def test_a_run_with_a_fit_is_rehearsed_before_the_teacher_is_trained() -> None:
    late = tiny(teacher={"fit": {"train": {"steps": 2}}}, objective={"mgd": {"weight": 1.0, "student_tap": "nowhere"}})
    with pytest.raises(UserError, match="no module or role 'nowhere'"):
        distill(late, Path("run"), quiet=True)
    assert not Path("run").exists()
    rehearse(tiny(teacher={"fit": {"train": {"steps": 2}}}), Runtime("cpu"))
    assert not Path("run").exists()


def test_a_teacher_may_be_fitted_once_for_several_runs() -> None:
    recipe = tiny(teacher={"fit": {"train": {"steps": 2}}})
    for name in ("one", "two"):
        distill(recipe, Path(name), quiet=True, teacher_folder=Path("teacher"))
    assert Path("teacher/student.safetensors").exists()
    assert not Path("one/teacher").exists()
    assert Path("one/student.safetensors").read_bytes() == Path("two/student.safetensors").read_bytes()


# --- the run -----------------------------------------------------------------------------------------------


def test_seeds_are_runs_of_their_own() -> None:
    for seed in (0, 1):
        distill(tiny(train={"seed": seed}), Path(f"seed-{seed}"), quiet=True)
    assert Path("seed-0/student.safetensors").read_bytes() != Path("seed-1/student.safetensors").read_bytes()


def test_what_is_said_is_handed_to_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    result = distill(tiny(), Path("run"), quiet=True, say=said.append)
    assert "student reads map [2, 4, 4, 4], logits [2, 10]" in said
    assert capsys.readouterr() == ("", "")
    assert result.folder.path == Path("run")
    assert result.scores == result.folder.result()["scores"]  # type: ignore[index]
    said.clear()
    again = distill(tiny(), Path("run"), quiet=True, say=said.append)
    assert said == ["run holds this run, finished; remove the folder to run it again"]
    assert again.scores == result.scores


def test_hooks_are_gone_when_a_run_ends() -> None:
    made = assemble(tiny())
    assert any(module._forward_hooks for module in made.student.module.modules())
    student = made.settled()
    assert not any(module._forward_hooks for module in student.module.modules())


# --- students that learn together --------------------------------------------------------------------------


def test_every_student_of_a_cohort_is_kept(tmp_path: Path) -> None:
    model = KD_MGD["student"]["model"]
    objective = {
        "task": 1.0,
        "dml": {"weight": 1.0, "student": "student", "teacher": "peer"},
        "back": {"method": "dml", "weight": 1.0, "student": "peer", "teacher": "student"},
    }
    recipe = parse({**KD_MGD, "teacher": None, "peers": {"peer": {"model": model, "width": 6}}, "objective": objective})
    found = distill(recipe, tmp_path / "run", quiet=True)
    result = found.folder.result()
    assert result is not None
    kept = load_model(f"run:{found.folder.path}/peers/peer", num_classes=10, in_channels=1)
    assert len(kept.module.state_dict()["0.weight"]) == 6
    made = assemble(recipe)
    again = score(kept, made.task, made.data.validation, torch.device("cpu"))
    assert result["peers"] == {"peer": pytest.approx(again)}
    before = made.distiller.models["peer"].module.state_dict()
    assert not torch.equal(kept.module.state_dict()["0.weight"], before["0.weight"])
