# SPDX-License-Identifier: Apache-2.0
import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from golden_answer import with_gradients
from method_case import MethodCase, gaussian, labelled_batch
from oracles import crosskd as oracle
from tutelage.core import Batch, Distiller, Facts, Live, Model, Objective, Signals, Tap
from tutelage.core.batch import Frame
from tutelage.core.error import UserError
from tutelage.functional.anchors import by_image, grid_anchors, levels, on_boxes
from tutelage.methods.detection.crosskd import CrossKD, align, crosskd, quality_focal
from tutelage.models.detectors.gfl import GFL
from tutelage.tasks.detection import Detection

Arrays = dict[str, NDArray[Any]]
GRIDS = ((6, 8), (3, 4))
WIDTH, CLASSES, BINS = 4, 3, 5
BOXES = torch.tensor(
    [[3.0, 5.0, 21.0, 30.0], [30.0, 10.0, 55.0, 40.0], [5.0, 2.0, 40.0, 44.0], [10.0, 20.0, 30.0, 35.0]]
)
IMAGES = torch.tensor([0, 0, 1, 3])
HEADS = {"head.cls": CLASSES, "head.box": 4 * BINS}
SCALES = tuple(f"head.box[{n}]" for n in range(len(GRIDS)))


def head(role: str) -> nn.Sequential:
    """The last tower layer and the predictor."""
    convolutions = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, HEADS[role], 3, padding=1)]
    for n, layer in enumerate(convolutions):
        drawn = gaussian(n, {"weight": tuple(layer.weight.shape), "bias": (layer.out_channels,)}, 0.5)
        layer.load_state_dict(drawn)
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1])


def towers(seed: int) -> dict[str, Tensor]:
    """Features before their activation, of both towers and all levels."""
    shapes = {f"{role}[{n}].pre": (6, WIDTH, *grid) for role in HEADS for n, grid in enumerate(GRIDS)}
    return gaussian(seed, shapes)


def teacher(seed: int) -> dict[str, Tensor]:
    """Features, and what the teacher's own head says to them."""
    features = towers(seed)
    with torch.no_grad():
        answers = {
            f"{role}[{n}]": head(role)(features[f"{role}[{n}].pre"].relu()) for role in HEADS for n in range(len(GRIDS))
        }
    return {**features, **answers}


def dense_batch() -> Batch:
    sizes = torch.tensor([[48, 64], [48, 64], [48, 64], [30, 40], [48, 64], [48, 50]])
    return replace(labelled_batch(), frame=Frame((48, 64), sizes, BOXES, IMAGES))


def places(role: str, end: str = "") -> tuple[str, ...]:
    return tuple(f"{role}[{n}]{end}" for n in range(len(GRIDS)))


def case(**options: Any) -> MethodCase:
    taps: dict[str, Any] = {
        **{f"{side}_class_taps": places("head.cls", ".pre") for side in ("student", "teacher")},
        **{f"{side}_box_taps": places("head.box", ".pre") for side in ("student", "teacher")},
        **{"score_taps": places("head.cls"), "box_taps": places("head.box"), "box_scales": SCALES},
    }
    return MethodCase(
        term=lambda: CrossKD(**{"anchor_scale": 2.0, **taps, **options}),
        student=towers,
        teacher=lambda seed: teacher(seed + 1000),
        batch=dense_batch,
        borrowed=lambda: {role: head(role) for role in HEADS} | {scale: nn.Identity() for scale in SCALES},
    )


def total(parts: dict[str, Tensor]) -> Tensor:
    return parts["cls"] + parts["box"]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        given_ = {
            name: torch.tensor(array, dtype=dtype)
            for name, array in arrays.items()
            if array.dtype.kind == "f" and not name.startswith(("loss", "grad", "out"))
        }
        found = focal(given_, meta, arrays) if meta.get("kind") == "qfl_only" else crossed(given_, meta, arrays)
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


def focal(given_: dict[str, Tensor], meta: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    student = given_["s_cls"].requires_grad_()
    rows = quality_focal(student, given_["t_cls"], meta["beta"])
    there = torch.ones(1, len(rows), dtype=torch.bool)
    edges = torch.zeros(1, len(rows), 4, 2)
    one = torch.tensor(1.0)
    plain = crosskd(student[None], given_["t_cls"][None], edges, edges, there, one, beta=meta["beta"])["cls"]
    torch.testing.assert_close(plain, rows.sum(), rtol=1e-6, atol=0)
    weighted = (given_["weight"][:, None] * rows).sum() / (meta["avg_factor"] + oracle.EPS32)
    return with_gradients({"loss": rows.mean(), "loss_weighted": weighted}, {"s_cls": student}, arrays)


class Scale(nn.Module):
    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def crossed(given_: dict[str, Tensor], meta: dict[str, Any], arrays: Arrays) -> dict[str, Any]:
    """The whole of the term but for which positions count, which the case says."""
    free = {name: given_[name].requires_grad_() for name in ("s_cls_feat", "s_reg_feat")}
    lent: dict[str, nn.Module] = {"scale": Scale(given_["w_scale"])}
    start = meta["reused_teacher_head_idx"]
    modules: dict[str, list[str]] = {}
    for kind, predictor in (("cls", "gfl_cls"), ("reg", "gfl_reg")):
        names = [f"w_{kind}_convs.{n}.conv" for n in range(start, meta["stacked_convs"])]
        modules[kind] = [*names, f"w_{predictor}"]
        for name in modules[kind]:
            outputs, inputs = given_[f"{name}.weight"].shape[:2]
            layer = nn.Conv2d(inputs, outputs, 3, padding=1)
            layer.to(given_["w_scale"].dtype)
            layer.load_state_dict({part: given_[f"{name}.{part}"] for part in ("weight", "bias")})
            lent[name] = nn.Sequential(layer, nn.ReLU()) if name in names else layer
    term = CrossKD(
        lambda_cls=meta["cls_weight"],
        lambda_box=meta["reg_weight"],
        beta=meta["cls_beta"],
        temperature=meta["reg_T"],
        activated=start != 0,
        student_class_taps=["s_cls_feat"],
        teacher_class_taps=["t_cls_feat"],
        student_box_taps=["s_reg_feat"],
        teacher_box_taps=["t_reg_feat"],
        score_taps=["t_cls_score"],
        box_taps=["t_bbox_pred"],
        class_modules=modules["cls"],
        box_modules=modules["reg"],
        box_scales=["scale"],
    )
    for module in lent.values():
        module.requires_grad_(False)
    student, taught = Signals(None, free), Signals(None, given_, lent)
    term.build(student, taught, Facts())
    (scores,), (boxes,) = term._cross(student, taught)
    count = given_["label_weights"]
    parts = crosskd(
        levels([scores]).squeeze(2),
        levels([given_["t_cls_score"]]).squeeze(2),
        levels([boxes], 4),
        levels([given_["t_bbox_pred"]], 4),
        count != 0,
        torch.tensor(meta["avg_factor"]),
        lambda_cls=meta["cls_weight"],
        lambda_box=meta["reg_weight"],
        beta=meta["cls_beta"],
        temperature=meta["reg_T"],
    )
    certainty = levels([given_["t_cls_score"]]).squeeze(2).sigmoid().amax(dim=2).where(count != 0, 0.0)
    answer: dict[str, Any] = with_gradients(
        {"loss": parts["cls"], "loss_reg_over_weight_sum": parts["box"]}, free, arrays
    )
    return answer | {
        "out_reused_cls_score": scores,
        "out_reused_bbox_pred": boxes,
        "out_aligned_cls": align(free["s_cls_feat"], given_["t_cls_feat"], meta["eps_align"]),
        "out_reg_weight_sum": certainty.sum(),
    }


# the equations, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 2),
    classes=st.integers(1, 4),
    bins=st.integers(2, 5),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    beta=st.sampled_from([1.0, 1.5, 2.0]),
    temperature=st.floats(0.5, 3),
)
def test_equals_the_loops(
    seed: int, images: int, classes: int, bins: int, grid: tuple[int, int], beta: float, temperature: float
) -> None:
    shapes = {"s": (images, classes, *grid), "t": (images, classes, *grid)}
    shapes |= {"sb": (images, 4 * bins, *grid), "tb": (images, 4 * bins, *grid)}
    maps = {name: value.double() for name, value in gaussian(seed, shapes, 2.0).items()}
    valid = torch.rand(images, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)) < 0.7
    valid[0, 0] = True
    arrays = {name: value.numpy() for name, value in maps.items()}
    parts = crosskd(
        levels([maps["s"]]).squeeze(2),
        levels([maps["t"]]).squeeze(2),
        levels([maps["sb"]], 4),
        levels([maps["tb"]], 4),
        valid,
        torch.tensor(3.0),
        beta=beta,
        temperature=temperature,
    )
    weights = valid.double().numpy()
    expected = oracle.class_term(arrays["s"], arrays["t"], weights, 3.0, beta)
    assert parts["cls"].item() == pytest.approx(expected, rel=1e-9)
    expected = oracle.box_term(arrays["sb"], arrays["tb"], arrays["t"], weights, temperature)["loss"]
    assert parts["box"].item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), images=st.integers(1, 2), grid=st.tuples(st.integers(1, 3), st.integers(2, 3)))
def test_the_alignment_and_the_reused_head_equal_the_loops(seed: int, images: int, grid: tuple[int, int]) -> None:
    drawn = gaussian(seed, {"s": (images, WIDTH, *grid), "t": (images, WIDTH, *grid)})
    one, other = drawn["s"].double(), drawn["t"].double()
    aligned = align(one, other)
    expected = oracle.align(one.numpy(), other.numpy())
    torch.testing.assert_close(aligned, torch.tensor(expected))
    layers = head("head.cls").double().requires_grad_(False)
    weights = {
        f"{name}.{part}": getattr(layers[place], part).numpy()
        for place, name in ((0, "tower.1.conv"), (2, "predictor"))
        for part in ("weight", "bias")
    }
    reused = oracle.reuse(expected, weights, "tower", "predictor", 1)
    torch.testing.assert_close(layers(aligned.relu()), torch.tensor(reused))


def test_the_term_is_its_parts() -> None:
    here = case()
    student, taught = here.tensors(dtype=torch.float64)
    assert taught is not None
    found = here.outcome(here.built(dtype=torch.float64), student, taught, here.batch()).parts
    anchors = grid_anchors(GRIDS, (48, 64), BOXES, 2.0)
    learned = by_image(on_boxes(BOXES, anchors, [48, 12]).float(), IMAGES, 6)
    scores = [
        head("head.cls").double()(align(student[name], taught[name]).relu()) for name in places("head.cls", ".pre")
    ]
    boxes = [
        head("head.box").double()(align(student[name], taught[name]).relu()) for name in places("head.box", ".pre")
    ]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    sizes = dense_batch().frame.image_size  # type: ignore[union-attr]
    valid = (centre[:, 1] < sizes[:, :1]) & (centre[:, 0] < sizes[:, 1:])
    assert 0 < int(valid[3].sum()) < 60
    expected = crosskd(
        levels(scores).squeeze(2),
        levels([taught[name] for name in places("head.cls")]).squeeze(2),
        levels(boxes, 4),
        levels([taught[name] for name in places("head.box")], 4),
        valid,
        learned.sum(),
    )
    for name, part in expected.items():
        torch.testing.assert_close(found[name], part)


def test_gradcheck() -> None:
    drawn = gaussian(2, {"s": (2, 3, 4), "t": (2, 3, 4), "sb": (2, 3, 4, 3), "tb": (2, 3, 4, 3)})
    s, t, sb, tb = (value.double() for value in drawn.values())
    valid = torch.tensor([[True, False, True], [False, False, True]])

    def loss(scores: Tensor, boxes: Tensor) -> Tensor:
        return total(crosskd(scores, t, boxes, tb, valid, torch.tensor(2.0)))

    assert torch.autograd.gradcheck(loss, (s.requires_grad_(), sb.requires_grad_()))
    features = gaussian(3, {"s": (2, 2, 2, 2), "t": (2, 2, 2, 2)})
    goal = features["t"].double()
    assert torch.autograd.gradcheck(lambda f: align(f, goal), features["s"].double().requires_grad_())


# limits and identities


def test_aligned_features_have_the_teachers_statistics() -> None:
    drawn = gaussian(4, {"s": (3, WIDTH, 4, 5), "t": (3, WIDTH, 4, 5)})
    one, other = 7 * drawn["s"].double() + 2, drawn["t"].double()
    aligned = align(one, other)
    torch.testing.assert_close(aligned.mean((0, 2, 3)), other.mean((0, 2, 3)))
    torch.testing.assert_close(aligned.std((0, 2, 3)), other.std((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(align(3 * one - 1, other), aligned, rtol=1e-5, atol=1e-6)


def test_a_student_with_the_teachers_features_has_nothing_to_learn() -> None:
    here = case()
    _, taught = here.tensors(dtype=torch.float64)
    assert taught is not None
    same = {name: tensor for name, tensor in taught.items() if name.endswith(".pre")}
    parts = here.outcome(here.built(dtype=torch.float64), same, taught, here.batch()).parts
    assert parts["cls"].item() == pytest.approx(0, abs=1e-4)  # up to the epsilon of the deviation
    assert parts["box"].item() == pytest.approx(0, abs=1e-9)


def test_the_modulator_learns_too() -> None:
    student = torch.tensor([0.3], requires_grad=True)
    goal = torch.tensor([2.0])
    found = torch.autograd.grad(quality_focal(student, goal), student)[0]
    entropy = nn.functional.binary_cross_entropy_with_logits(student, goal.sigmoid(), reduction="none")
    fixed = torch.autograd.grad(entropy * (student.sigmoid() - goal.sigmoid()).abs().detach(), student)[0]
    assert not torch.allclose(found, fixed)


def test_equal_probabilities_have_no_slope() -> None:
    student = torch.tensor([0.7, -2.0], requires_grad=True)
    loss = quality_focal(student, student.detach()).sum()
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


# the borrowed head


class Detector(nn.Module):
    """A pyramid of two levels, and a shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.cls_tower = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.box_tower = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.cls_head, self.box_head = head("head.cls"), head("head.box")

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {"cls": [], "box": []}
        for step in (8, 16):
            level = nn.functional.avg_pool2d(self.stem(images), step)
            found["cls"].append(self.cls_head(self.cls_tower(level).relu()))
            found["box"].append(self.box_head(self.box_tower(level).relu()))
        return found


class Scores:
    """A task that keeps the scores small."""

    name, averages, headline, provides = "scores", "samples", "size", ("head.cls", "head.box")

    def call(self, model: Model, batch: Batch) -> Any:
        return model(batch.inputs)

    def logits(self, output: Any) -> None:
        return None

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return torch.stack([one.square().mean() for maps in output.values() for one in maps]).sum()

    def score(self, answers: Any) -> dict[str, float]:
        raise NotImplementedError


def test_layers_that_run_once_a_level_are_named_by_their_call() -> None:
    torch.manual_seed(0)
    taps = {
        f"{side}_{kind}_taps": [{"where": f"{tower}_tower", "call": n} for n in range(2)]
        for side in ("student", "teacher")
        for kind, tower in (("class", "cls"), ("box", "box"))
    }
    term = CrossKD(
        **taps,  # type: ignore[arg-type]
        score_taps=[Tap("cls_head.2", call=n) for n in range(2)],
        box_taps=[Tap("box_head.2", call=n) for n in range(2)],
        class_modules=["cls_head"],
        box_modules=["box_head"],
        box_scales=[],
        anchor_scale=2.0,
    )
    batch = replace(dense_batch(), inputs=torch.rand(6, 1, 48, 64))
    taught = Detector()
    machine = Distiller(
        Detector(),
        Objective(task=0.1, crosskd=term),
        task=Scores(),  # type: ignore[arg-type]
        teacher=taught,
        sample=batch,
    )
    before = {name: weight.clone() for name, weight in taught.state_dict().items()}
    optimizer = torch.optim.Adam(machine.param_groups(), lr=0.02)
    values = []
    for _ in range(6):
        losses = machine(batch, machine.observe(batch))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(losses)
        values.append(losses.parts["crosskd.cls"].item() + losses.parts["crosskd.box"].item())
    assert values[-1] < values[0]
    assert all(torch.equal(weight, before[name]) for name, weight in taught.state_dict().items())
    assert not [name for name in machine.state_dict() if "borrowed" in name]
    machine.close()


@pytest.mark.parametrize("convolutions", [1, 4])
def test_two_detectors_that_are_one_have_nothing_to_learn(convolutions: int) -> None:
    torch.manual_seed(0)
    detector = GFL(CLASSES, backbone="tiny8", width=16, bins=4, convolutions=convolutions, frozen_norm=True)
    for number, part in enumerate(detector.modules()):
        if isinstance(part, nn.Conv2d):  # far from the small numbers it begins with
            part.weight.data.copy_(gaussian(number, {"w": tuple(part.weight.shape)}, 0.2)["w"])
    for scale in detector.head.scales.parameters():
        scale.data.fill_(2.0)
    teacher_, student_ = (Model(one, one.roles(), one.lends()) for one in (detector, copy.deepcopy(detector)))
    known = [BOXES[n == IMAGES] for n in range(6)]
    target = [{"boxes": boxes, "labels": torch.zeros(len(boxes)).long()} for boxes in known]
    batch = replace(dense_batch(), inputs=torch.rand(6, 3, 48, 64), target=target)
    objective = Objective(crosskd=CrossKD())
    machine = Distiller({"student": student_}, objective, task=Detection(CLASSES), teacher=Live(teacher_), sample=batch)
    parts = machine(batch, machine.observe(batch)).parts
    assert parts["crosskd.box"].item() == pytest.approx(0, abs=1e-5)
    assert parts["crosskd.cls"].item() == pytest.approx(0, abs=1e-3)
    machine.close()


def test_the_students_own_last_layers_learn_from_the_labels_alone() -> None:
    here = case()
    student, taught = here.tensors()
    lent = here.teach(taught)
    assert lent is not None
    term = here.built()
    parts = term(here.signals(student), lent, here.batch())
    total(parts).backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in student.values())
    assert all(p.grad is None for module in lent.borrowed.values() for p in module.parameters())
    assert not list(term.parameters())


# odd cases


def test_no_boxes_and_nothing_valid() -> None:
    here = case()
    student, taught = here.tensors()
    batch = here.batch()
    bare = replace(batch, frame=Frame((48, 64), torch.tensor([[48, 64]] * 6), BOXES[:0], IMAGES[:0]))
    assert here.loss(here.built(), student, taught, bare).isfinite()
    empty = replace(batch, frame=Frame((48, 64), torch.zeros(6, 2, dtype=torch.int64), BOXES, IMAGES))
    loss = here.loss(here.built(), student, taught, empty)
    assert loss.item() == 0
    loss.backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in student.values())


def test_a_single_value_a_channel_becomes_the_teachers() -> None:
    student = torch.full((1, 2, 1, 1), 3.0, requires_grad=True)
    goal = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1)
    aligned = align(student, goal)
    torch.testing.assert_close(aligned.detach(), goal)
    assert torch.autograd.grad(aligned.sum(), student)[0].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_features(value: float) -> None:
    here = case()
    student, taught = here.tensors()
    free = {name: torch.full_like(tensor, value).requires_grad_() for name, tensor in student.items()}
    loss = here.loss(here.built(), free, taught, here.batch())
    loss.backward()
    assert loss.isfinite()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in free.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    scores = torch.tensor([[[1e4, -1e4, 0.0]]], dtype=dtype, requires_grad=True)
    boxes = torch.full((1, 1, 4, 3), 1e4, dtype=dtype, requires_grad=True)
    there = torch.ones(1, 1, dtype=torch.bool)
    loss = total(crosskd(scores, -scores.detach(), boxes, -boxes.detach(), there, torch.tensor(1.0)))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, [scores, boxes]))


# errors


def test_data_without_boxes() -> None:
    here = case()
    student, taught = here.tensors()
    said = "crosskd counts the anchors that learn a box, and this data has no boxes"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(here.built(), student, taught, labelled_batch())


def test_heads_of_two_shapes() -> None:
    scores, boxes, there = torch.zeros(1, 2, 3), torch.zeros(1, 2, 4, 5), torch.ones(1, 2, dtype=torch.bool)
    said = "crosskd compares heads of one shape: the student's boxes are [1, 2, 4, 5], the teacher's [1, 2, 4, 6]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        crosskd(scores, scores, boxes, torch.zeros(1, 2, 4, 6), there, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        (
            {"score_taps": ["head.cls[0]"]},
            {},
            (
                "crosskd needs one of each a level, and has 2 class features, 2 box features, 1 class predictions, "
                "2 box predictions, 2 box_scales"
            ),
        ),
        (
            {},
            {"head.cls[0].pre": (6, 7, 6, 8)},
            (
                "crosskd runs the teacher's head on the student's features, which must be as wide: "
                "'head.cls[0].pre' has 7 channels, the teacher's 4"
            ),
        ),
        (
            {"class_modules": ["head.box"]},
            {},
            (
                "crosskd: class_modules lead to 20 channels, and the teacher's 'head.cls[0]' has 3; "
                "name the modules that follow the features up to the prediction"
            ),
        ),
    ],
)
def test_signals_that_do_not_fit(options: dict[str, Any], changed: dict[str, Any], said: str) -> None:
    here = case(**options)
    student, taught = here.tensors()
    one, other = here.signals({**student, **gaussian(0, changed)}), here.teach(taught)
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.term().build(one, other, Facts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.5}, "beta is at least 1, not 0.5"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"box_modules": "head.box"}, "box_modules: expected a list of modules, not 'head.box'"),
        ({"student_class_taps": "fpn"}, "student_taps: expected a list of roles or module paths, not 'fpn'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CrossKD(**options)
