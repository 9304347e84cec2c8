# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from method_case import MethodCase, gaussian
from oracles import dwpose as oracle
from tutelage.core import Batch, Facts, Signals
from tutelage.core.error import UserError
from tutelage.core.schedule import Schedule
from tutelage.functional.simcc import simcc_kl
from tutelage.methods.pose.dwpose import OBJECTIVE, DWPose, dwpose
from tutelage.models.poses.rtmcc import RTMCC
from tutelage.run.distill import distill
from tutelage.run.recipe import parse

Arrays = dict[str, NDArray[Any]]
SHAPES = {"map": (6, 4, 3, 2), "logits.x": (6, 3, 8), "logits.y": (6, 3, 10)}
BATCH = Batch.of(torch.zeros(2, 1))


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: DWPose(**options),
        student=lambda seed: gaussian(seed, SHAPES),
        teacher=lambda seed: gaussian(seed + 1000, {**SHAPES, "map": (6, 5, 3, 2)}),
    )


# the authors' numbers

NAMES = {"mlp.scale_norm.": "mlp.0.", "mlp.fc.": "mlp.1."}


def own_name(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def double(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).double()


def head(side: str, arrays: Arrays, meta: dict[str, Any]) -> RTMCC:
    """The student's or the teacher's head with the case's weights."""
    prefix = f"{side}_head."
    given_ = {own_name(name.removeprefix(prefix)): value for name, value in arrays.items() if name.startswith(prefix)}
    (width, height), (across, down) = meta["input_size"], meta["in_featuremap_size_wh"]
    keypoints, channels = given_["final_layer.weight"].shape[:2]
    module = RTMCC(
        channels,
        keypoints,
        (down, across),
        (int(width * meta["simcc_split_ratio"]), int(height * meta["simcc_split_ratio"])),
        hidden=meta[f"hidden_{side}"],
        s=meta["s"],
        expansion=meta["expansion_factor"],
        kernel=meta["final_layer_kernel_size"],
    ).double()
    module.load_state_dict({name: double(value) for name, value in given_.items()})
    return module


def weight_at(epoch: int, epochs: int, weight: Any = OBJECTIVE["dwpose"]["weight"]) -> float:  # type: ignore[index]
    return Schedule.parse(weight).at(7 * epoch + 3, steps_per_epoch=7, total_steps=7 * epochs)


def signals(axes: tuple[Tensor, Tensor], fmap: Tensor | None = None) -> Signals:
    return Signals(None, {"logits.x": axes[0], "logits.y": axes[1], **({} if fmap is None else {"map": fmap})})


def gradients(loss: Tensor, free: dict[str, Tensor], asked: Any) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in free.items() if f"grad_{name}" in asked}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        f"grad_{name}": torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(wanted.items(), found, strict=True)
    }


def aligned(term: DWPose, arrays: Arrays) -> dict[str, Tensor]:
    """Give the term the case's layer, and return its parameters by the case's names."""
    if "align.weight" not in arrays:
        assert isinstance(term.align, nn.Identity)
        return {}
    term.align.load_state_dict({name: double(arrays[f"align.{name}"]) for name in ("weight", "bias")})
    return {f"align.{name}": value for name, value in term.align.named_parameters()}


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    group = claim.removeprefix("core/")
    if group == "dwpose_schedule":
        epochs = int(arrays["max_epochs"])
        decay = torch.tensor([weight_at(int(epoch), epochs) for epoch in arrays["epochs"]], dtype=torch.float64)
        factor = {"kpt": torch.ones_like(decay), "fea": decay, "logit": decay}
        return {
            **{f"factor_{part}": value for part, value in factor.items()},
            **{f"loss_{part}": value * float(arrays[f"loss_{part}"][0]) for part, value in factor.items()},
        }
    if group == "dwpose_kd":
        free = {name: double(arrays[name]).requires_grad_() for name in ("student_x", "student_y")}
        taught = (double(arrays["teacher_x"]), double(arrays["teacher_y"]))
        term = DWPose(alpha=0, beta=meta["weight"], sharpness=meta["beta"])
        loss = term(signals((free["student_x"], free["student_y"])), signals(taught), BATCH)["logits"]
        return {"loss": loss, **gradients(loss, free, arrays)}
    if group == "dwpose_fea":
        free = {"student_features": double(arrays["student_features"]).requires_grad_()}
        goal = double(arrays["teacher_features"])
        term, blank = DWPose(alpha=meta["alpha_fea"]), (torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
        student = signals(blank, free["student_features"])
        term.build(student, signals(blank, goal), Facts())
        free |= aligned(term.double(), arrays)
        loss = term(student, signals(blank, goal), BATCH)["feature"]
        return {"loss": loss, **gradients(loss, free, arrays)}
    one, other = head("student", arrays, meta), head("teacher", arrays, meta)
    free = {f"student_head.{name}": parameter for name, parameter in one.named_parameters()}
    goal = double(arrays["teacher_features"])
    with torch.no_grad():
        taught = other(goal)
    own = goal
    if group == "dwpose_stage1":
        own = free["student_features"] = double(arrays["student_features"]).requires_grad_()
    answers = one(own)
    alpha = meta["alpha_fea"] or 0.0
    term = DWPose(alpha=alpha, beta=meta["logit_weight"], sharpness=meta["beta"])
    student, teacher = signals(answers, own if alpha else None), signals(taught, goal if alpha else None)
    term.build(student, teacher, Facts())
    if alpha:
        free |= aligned(term.double(), arrays)
    weight = weight_at(meta["epoch"], meta["max_epochs"]) if group == "dwpose_stage1" else 1.0
    parts = {name: weight * value for name, value in term(student, teacher, BATCH).items()}
    answer = {"loss_logit": parts["logits"]}
    if group == "dwpose_stage1":
        labels = (double(arrays[name]) for name in ("target_x", "target_y", "target_weight"))
        answer |= {"loss_fea": parts["feature"], "loss_kpt": simcc_kl(*answers, *labels, beta=meta["beta"]).sum()}
    loss = torch.stack(list(answer.values())).sum()
    theirs = {own_name(name.removeprefix("grad_")): name for name in arrays if name.startswith("grad_")}
    found = gradients(loss, free, {f"grad_{name}" for name in theirs})
    return {"loss": loss, **answer, **{theirs[name.removeprefix("grad_")]: value for name, value in found.items()}}


# the equation, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 3), keypoints=st.integers(1, 3), channels=st.integers(1, 3))
def test_equals_the_loops(seed: int, rows: int, keypoints: int, channels: int) -> None:
    shapes = {"x": (rows, keypoints, 5), "y": (rows, keypoints, 7), "map": (rows, channels, 2, 3)}
    one = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    other = {name: value.double() for name, value in gaussian(seed + 1, shapes).items()}
    parts = dwpose((one["x"], one["y"]), (other["x"], other["y"]), one["map"], other["map"], alpha=0.3, beta=0.7)
    arrays = [{name: value.numpy() for name, value in side.items()} for side in (one, other)]
    axes = [[side["x"], side["y"]] for side in arrays]
    assert parts["logits"].item() == pytest.approx(oracle.logits(axes[0], axes[1], 0.7, 10.0), rel=1e-9, abs=1e-12)
    distance = oracle.features(arrays[0]["map"], arrays[1]["map"], 1.0)
    assert parts["feature"].item() == pytest.approx(0.3 * distance, rel=1e-9)
    paper = dwpose((one["x"],) * 2, (other["x"],) * 2, one["map"], other["map"], form="paper")["feature"]
    assert paper.item() == pytest.approx(7e-5 * distance / (channels * 6), rel=1e-9)


def test_the_weight_decays_by_epoch() -> None:
    assert [weight_at(epoch, 5) for epoch in range(5)] == pytest.approx([oracle.decay(e, 5) for e in range(5)])
    assert weight_at(269, 270) == pytest.approx(1 / 270)


# limits and identities


def test_only_differences_of_logits_count() -> None:
    drawn = gaussian(0, {"s": (2, 3, 4), "t": (2, 3, 4)})
    plain = dwpose((drawn["s"],) * 2, (drawn["t"],) * 2)["logits"]
    moved = dwpose((drawn["s"] + 5,) * 2, (drawn["t"] - 3,) * 2)["logits"]
    assert moved.item() == pytest.approx(plain.item(), rel=1e-4)
    assert "feature" not in dwpose((drawn["s"],) * 2, (drawn["t"],) * 2)


def test_gradients() -> None:
    one = {name: value.double().requires_grad_() for name, value in gaussian(0, SHAPES).items()}
    other = {name: value.double() for name, value in gaussian(1, SHAPES).items()}

    def total(x: Tensor, y: Tensor, fmap: Tensor) -> Tensor:
        parts = dwpose((x, y), (other["logits.x"], other["logits.y"]), fmap, other["map"], alpha=1.0)
        return parts["feature"] + parts["logits"]

    assert torch.autograd.gradcheck(total, (one["logits.x"], one["logits.y"], one["map"]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_half_logits_stay_finite(dtype: torch.dtype) -> None:
    student = torch.tensor([1e4, -1e4, 3.0], dtype=dtype)[None, None].requires_grad_()
    teacher = torch.tensor([-1e4, 1e4, 3.0], dtype=dtype)[None, None]
    loss = dwpose((student, student), (teacher, teacher))["logits"]
    loss.backward()
    assert loss.isfinite()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_batch_without_rows_is_a_connected_zero() -> None:
    student, fmap = torch.zeros(0, 3, 4, requires_grad=True), torch.zeros(0, 2, 1, 1, requires_grad=True)
    parts = dwpose((student, student), (student.detach(),) * 2, fmap, fmap.detach())
    (parts["feature"] + parts["logits"]).backward()
    assert student.grad is not None
    assert fmap.grad is not None


def test_the_second_stage_reads_no_maps() -> None:
    term = DWPose(alpha=0, beta=1.0)
    assert [tap.where for tap in term.reads.student] == ["logits.x", "logits.y"]
    drawn = gaussian(0, {"logits.x": (2, 3, 4), "logits.y": (2, 3, 4)})
    term.build(Signals(None, drawn), Signals(None, drawn), Facts())
    assert list(term(Signals(None, drawn), Signals(None, drawn), BATCH)) == ["logits"]
    assert not list(term.parameters())


# what a user can get wrong


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "papr"}, "form 'papr' is not known"),
        ({"alpha": 0, "beta": 0}, "one of them > 0"),
        ({"alpha": -1}, "must be >= 0"),
        ({"sharpness": 0}, "sharpness must be > 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DWPose(**options)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"logits.x": (2, 3, 9)}, r"logits.x are \[3, 8\], the teacher's \[3, 9\]: both need the same keypoints"),
        ({"map": (2, 4, 3, 3)}, "maps of one grid"),
        ({"map": (2, 4)}, "compares maps"),
    ],
)
def test_signals_that_do_not_meet_are_named(shapes: dict[str, tuple[int, ...]], said: str) -> None:
    own = gaussian(0, SHAPES)
    with pytest.raises(UserError, match=said):
        DWPose().build(Signals(None, own), Signals(None, {**own, **gaussian(1, shapes)}), Facts())


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(UserError, match=r"logits.x of the student is \[1, 2, 3\], of the teacher \[1, 1, 3\]"):
        dwpose((torch.zeros(1, 2, 3),) * 2, (torch.zeros(1, 1, 3),) * 2)


# both stages, in one run


def test_the_second_stage_keeps_the_backbone_and_learns_a_new_head(tmp_path: Path) -> None:
    model = {"model": "tutelage:rtmpose_t", "widen": 0.125, "stages": 2, "hidden": 32, "s": 16}
    recipe = parse(
        {
            "task": "pose",
            "teacher": {**model, "widen": 0.25},
            "student": model,
            "data": {
                "source": "figures",
                "image_size": [48, 48],
                "batch_size": 4,
                "pose": {"number": 8, "held_out": 4, "size": [64, 48]},
            },
            "objective": {"task": 1.0, "dwpose": OBJECTIVE["dwpose"]},
            "train": {"steps": 2},
            "stages": [
                {"name": "first"},
                {
                    "name": "second",
                    "teacher": "previous",
                    "inherit": {"backbone": "previous.backbone"},
                    "freeze": ["backbone"],
                    "objective": {"task": 0.0, "dwpose": {"weight": 1.0, "alpha": 0, "beta": 1.0}},
                },
            ],
        }
    )
    distill(recipe, tmp_path / "run", quiet=True)
    stages = tmp_path / "run" / "stages"
    first, second = (load_file(stages / name / "student.safetensors") for name in ("first", "second"))
    whole = load_file(tmp_path / "run" / "student.safetensors")
    assert first.keys() == second.keys() == whole.keys()
    for name, tensor in second.items():
        assert torch.equal(whole[name], tensor)
        if name.startswith("backbone."):
            assert torch.equal(first[name], tensor), name
    assert not torch.equal(first["head.cls_x.weight"], second["head.cls_x.weight"])
    rows = [json.loads(line) for line in (stages / "second" / "metrics.jsonl").read_text().splitlines()]
    trained = next(row for row in rows if row["kind"] == "train")
    assert {name for name in trained if name.startswith("dwpose")} == {"dwpose.logits"}
