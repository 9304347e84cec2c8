# SPDX-License-Identifier: Apache-2.0
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from golden_answer import with_gradients
from method_case import MethodCase, Tensors, gaussian
from oracles import reviewkd as oracle
from tutelage.core import Batch, Entry, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.reviewkd import OBJECTIVE, ReviewKD, as_map, reviewkd
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
STUDENT = ("stages[0]", "stages[1]", "pooled")
TEACHER = ("stages[0].pre", "stages[1].pre", "pooled")


def case(rows: int = 6, levels: int = 2, **options: Any) -> MethodCase:
    """Two levels of maps, or three with the pooled vectors, which no batch of one can train."""
    shapes: list[tuple[int, ...]] = [(rows, 4, 4, 4), (rows, 5, 2, 2), (rows, 5)]
    goals: list[tuple[int, ...]] = [(rows, 5, 6, 6), (rows, 6, 2, 2), (rows, 6)]
    student = dict(zip(STUDENT[:levels], shapes, strict=False))
    teacher = dict(zip(TEACHER[:levels], goals, strict=False))
    return MethodCase(
        term=lambda: ReviewKD(student_taps=STUDENT[:levels], teacher_taps=TEACHER[:levels], **options),
        student=lambda seed: gaussian(seed, student),
        teacher=lambda seed: gaussian(seed + 1000, teacher),
    )


def run(student: list[Tensor], teacher: list[Tensor], weights: Tensors, **options: Any) -> tuple[Tensor, ReviewKD]:
    """The term over these levels, shallow to deep, with these weights, in the tensors' type."""
    places = [f"level{n}" for n in range(len(student))]
    sides = [Signals(None, dict(zip(places, tensors, strict=True))) for tensors in (student, teacher)]
    term = ReviewKD(student_taps=places, teacher_taps=places, **options)
    term.build(sides[0].detach(), sides[1], Facts())
    term.to(student[0].dtype)
    term.load_state_dict(weights, strict=False)
    return term(*sides, case().batch()), term


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    held = {name: torch.tensor(array) for name, array in arrays.items()}
    held = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    if meta.get("kind") == "hcl_only":
        free = {"s_feat": held["s_feat"].requires_grad_()}
        loss = reviewkd([held["s_feat"]], [held["t_feat"]])
        return with_gradients({"loss": loss, "alt_torchdistill": loss}, free, arrays)
    count = range(sum(name.startswith("s_feat") for name in arrays))
    free = {name: held[name].requires_grad_() for name in [*(f"s_feat{n}" for n in count), "s_pooled", "s_logits"]}
    weights = {name.removeprefix("w_"): held[name] for name in held if name.startswith("w_")}
    loss, term = run(
        [held[name] for name in free if name != "s_logits"],
        [*(held[f"t_preact{n}"] for n in count), held["t_pooled"]],
        weights,
        middle=meta["mid_channel"],
    )
    schedule = {"linear": [0, meta["reviewkd_weight"]], "until": f"{meta['warmup_epochs']} epochs"}
    objective = Objective({"reviewkd": Entry(ReviewKD(), schedule)})
    objective.facts = Facts(steps_per_epoch=10)
    weight = objective.weight("reviewkd", 10 * meta["epoch"])
    task = Classification(held["s_logits"].shape[1])
    batch = Batch.of(torch.zeros(len(held["target"]), 1), held["target"])
    losses = {
        "loss": loss,
        "loss_kd_weighted_warmup": weight * loss,
        "loss_ce": task.loss(held["s_logits"], batch),
    }
    named = {f"w_{name}": weight for name, weight in term.named_parameters()}
    return with_gradients(losses, {**free, **named}, arrays)


# the equation, worked out by loops


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 3),
    sizes=st.sampled_from([((3, 3), (3, 3)), ((2, 3), (4, 5)), ((5, 5), (5, 5)), ((4, 4), (2, 2))]),
    vector=st.booleans(),
)
def test_equals_the_loops(seed: int, rows: int, sizes: tuple[tuple[int, int], tuple[int, int]], vector: bool) -> None:
    deepest = (rows, 3) if vector else (rows, 3, 2, 2)
    drawn = gaussian(
        seed,
        {
            **{"s0": (rows, 2, *sizes[0]), "s1": deepest},
            **{"t0": (rows, 3, *sizes[1]), "t1": (*deepest[:1], 2, *deepest[2:])},
        },
    )
    student, teacher = ([drawn[f"{side}{n}"].double() for n in range(2)] for side in "st")
    torch.manual_seed(seed)
    _, term = run(student, teacher, {})
    for weight in term.parameters():
        nn.init.normal_(weight)
    weights = {name: weight.detach().clone() for name, weight in term.named_parameters()}
    loss, _ = run(student, teacher, weights)
    one, other = ([as_map(tensor).numpy() for tensor in side[::-1]] for side in (student, teacher))
    expected = oracle.reviewkd(one, other, {name: weight.numpy() for name, weight in weights.items()})
    assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (5, 7), (8, 8)])
def test_the_distance_equals_the_loops(size: tuple[int, int]) -> None:
    drawn = gaussian(0, {"s": (2, 3, *size), "t": (2, 3, *size)})
    student, teacher = drawn["s"].double(), drawn["t"].double()
    expected = oracle.hcl(student.numpy(), teacher.numpy())
    assert reviewkd([student], [teacher]).item() == pytest.approx(expected, rel=1e-12)


def test_gradcheck() -> None:
    here = case(levels=3)
    term = here.built(dtype=torch.float64)
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]

    def loss(one: Tensor, two: Tensor, three: Tensor, *weights: Tensor) -> Tensor:
        signals = here.signals(dict(zip(STUDENT, (one, two, three), strict=True)))
        given = (signals, here.teach(teacher), here.batch())
        found: Tensor = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), given)
        return found

    free = (*(student[tap] for tap in STUDENT), *term.parameters())
    assert torch.autograd.gradcheck(loss, free, fast_mode=True)


# limits and identities


def test_a_map_of_one_position_has_one_scale() -> None:
    drawn = gaussian(1, {"s": (4, 3, 1, 1), "t": (4, 3, 1, 1)})
    torch.testing.assert_close(reviewkd([drawn["s"]], [drawn["t"]]), F.mse_loss(drawn["s"], drawn["t"]))


def test_a_constant_difference_is_the_same_at_every_scale() -> None:
    student = gaussian(2, {"s": (4, 3, 8, 8)})["s"]
    torch.testing.assert_close(reviewkd([student], [student + 3]), torch.tensor(9.0))


def test_nothing_to_learn_at_the_teacher() -> None:
    fused = gaussian(3, {"s": (4, 3, 8, 8)})["s"].requires_grad_()
    loss = reviewkd([fused], [fused.detach()])
    assert loss == 0
    assert not torch.autograd.grad(loss, fused)[0].any()


def test_levels_add_up() -> None:
    drawn = gaussian(4, {"s": (4, 3, 4, 4), "t": (4, 3, 4, 4)})
    once = reviewkd([drawn["s"]], [drawn["t"]])
    torch.testing.assert_close(reviewkd([drawn["s"]] * 2, [drawn["t"]] * 2), 2 * once)


def test_a_shallow_teacher_level_teaches_the_deepest_student_level() -> None:
    here = case(levels=3)
    term = here.built()
    assert isinstance(term, ReviewKD)
    student, teacher = here.tensors()
    assert teacher is not None
    fused = term.fuse(here.signals(student), here.signals(teacher))
    assert [tuple(one.shape) for one in fused] == [(6, 6, 1, 1), (6, 6, 2, 2), (6, 5, 6, 6)]
    for tap in STUDENT:
        assert torch.autograd.grad(fused[-1].square().sum(), student[tap], retain_graph=True)[0].any()


def test_what_is_handed_upward() -> None:
    def widths(**options: Any) -> list[int]:
        return [
            w.shape[0] for n, w in case(levels=3, **options).built().named_parameters() if n.endswith("conv1.0.weight")
        ]

    assert widths() == [5, 5, 5]
    assert widths(middle=3) == [3, 3, 3]


def test_the_deepest_level_has_no_gate() -> None:
    gates = {name.split(".")[1] for name in case(levels=3).built().state_dict() if "att_conv" in name}
    assert gates == {"1", "2"}


def test_the_weight_warms_up_by_epochs() -> None:
    section: dict[str, Any] = OBJECTIVE
    objective = Objective({"reviewkd": Entry(ReviewKD(), section["reviewkd"]["weight"])})
    objective.facts = Facts(steps_per_epoch=10, total_steps=2400)
    assert [objective.weight("reviewkd", step) for step in (0, 9, 10, 199, 200, 2399)] == [
        *(0.0, 0.0, 0.25, 4.75, 5.0, 5.0)
    ]


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    here = case(rows=0, levels=3)
    term = case(levels=3).built()
    student, teacher = here.tensors()
    loss = here.loss(term, student, teacher, here.batch())
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


def test_a_batch_of_one_cannot_train_the_pooled_level() -> None:
    here = case(rows=1, levels=3)
    term = here.built()
    student, teacher = here.tensors()
    said = (
        "reviewkd: batch norm cannot train on one value a channel (one sample with a 1x1 map); "
        "use a batch size of at least 2, or drop the last incomplete batch"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(term, student, teacher, here.batch())
    assert here.loss(term.eval(), student, teacher, here.batch()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.full((2, 3, 8, 8), 1e4, dtype=dtype, requires_grad=True)
    teacher = torch.full((2, 3, 8, 8), -1e4, dtype=dtype)
    loss = reviewkd([student], [teacher])
    apart = (student.double() - teacher.double()).detach().square().mean().item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(apart, rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"middle": 0}, "middle is a number of channels, not 0"),
        ({"student_taps": "pooled"}, "student_taps: expected a list of roles or module paths, not 'pooled'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ReviewKD(**options)


def test_tokens_are_no_level() -> None:
    said = "reviewkd compares maps [B, C, H, W] and vectors [B, C], not [2, 4, 3]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        run([torch.zeros(2, 4, 3)], [torch.zeros(2, 4)], {})


def test_maps_of_two_shapes() -> None:
    said = "reviewkd compares maps of one shape: the fused one is [2, 1, 2, 2], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        reviewkd([torch.zeros(2, 1, 2, 2)], [torch.zeros(2, 3, 2, 2)])
