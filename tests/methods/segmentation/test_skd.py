# SPDX-License-Identifier: Apache-2.0
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from golden_answer import with_gradients
from method_case import MethodCase, gaussian
from oracles import skd as oracle
from peak import peak
from tutelage.core import Draw, Facts, Signals
from tutelage.core.error import UserError
from tutelage.functional import block
from tutelage.methods.segmentation.skd import CARD, SKD, Discriminator, Form, SelfAttention, adversary, regions, skd

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"mean": "mean", "sum": "code"}  # ours, the oracle's
UNIT: dict[str, Any] = {"lambda_pixel": 1.0, "lambda_pair": 1.0}
SMALL: dict[str, Any] = {"conditional": False, "discriminator_width": 4}  # a case has no images


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: SKD(**{**SMALL, **options}),
        student=lambda seed: gaussian(seed, {"logits": (6, 5, 8, 8), "map": (6, 3, 6, 6)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 5, 8, 8), "map": (6, 4, 6, 6)}, 2.0),
    )


def made(
    seed: int = 0,
    images: int = 2,
    classes: int = 3,
    grid: tuple[int, int] = (4, 3),
    widths: tuple[int, int] = (2, 4),
    size: tuple[int, int] = (6, 5),
) -> list[Tensor]:
    """Score maps of student and teacher, then their features."""
    shapes = {"s": (images, classes, *grid), "t": (images, classes, *grid)}
    shapes |= {"sf": (images, widths[0], *size), "tf": (images, widths[1], *size)}
    drawn = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    return [drawn["s"].requires_grad_(), drawn["t"], drawn["sf"].requires_grad_(), drawn["tf"]]


def total(parts: dict[str, Tensor]) -> Tensor:
    return parts["pixel"] + parts["pair"]


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        free = {name: torch.tensor(arrays[name], dtype=dtype).requires_grad_() for name in ("s_logits", "s_feat")}
        sides = (
            {"logits": free["s_logits"], "map": free["s_feat"]},
            {
                "logits": torch.tensor(arrays["t_logits"], dtype=dtype),
                "map": torch.tensor(arrays["t_feat"], dtype=dtype),
            },
        )
        term = SKD(pool_scale=meta["pool_scale"], form="sum", lambda_holistic=0, **UNIT)
        parts = case().outcome(term, *sides, case().batch()).parts
        found = {"loss": parts["pair"], "loss_pixelwise": parts["pixel"]}
        answer |= with_gradients(found, free, arrays) if not suffix else {f"{n}_f32": v for n, v in found.items()}
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    scale=st.sampled_from([0.34, 0.5, 1.0]),
)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_loops(
    form: Form,
    seed: int,
    images: int,
    classes: int,
    grid: tuple[int, int],
    widths: tuple[int, int],
    size: tuple[int, int],
    scale: float,
) -> None:
    tensors = made(seed, images, classes, grid, widths, size)
    scores, teachers, one, other = (tensor.detach().numpy() for tensor in tensors)
    parts = skd(*tensors, pool_scale=scale, form=form)
    assert parts["pixel"].item() == pytest.approx(
        10 * oracle.pixelwise(scores, teachers, FORMS[form]), rel=1e-9, abs=1e-12
    )
    assert parts["pair"].item() == pytest.approx(oracle.pairwise(one, other, scale), rel=1e-6, abs=1e-12)


def test_gradcheck_of_the_pixels() -> None:
    tensors = made(2)
    fixed = [tensor.detach() for tensor in tensors[1:]]
    assert torch.autograd.gradcheck(lambda s: skd(s, *fixed)["pixel"], tensors[0])


def test_the_gradient_of_the_pairs_takes_the_length_for_constant() -> None:
    _, _, student, teacher = made(3)
    scores = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
    found = torch.autograd.grad(skd(scores, scores, student, teacher)["pair"], student)[0]
    goal = regions(teacher, 0.5)

    def pooled(features: Tensor) -> Tensor:
        found: Tensor = F.max_pool2d(features, (3, 2), (3, 2), ceil_mode=True).flatten(2).transpose(1, 2)
        return found

    length = pooled(student.detach().clone()).norm(dim=2, keepdim=True) + 1e-8

    def with_fixed_length(features: Tensor) -> Tensor:
        unit = pooled(features) / length
        total: Tensor = (unit @ unit.mT - goal @ goal.mT).square().sum() / (2 * length.shape[1] ** 2)
        return total

    assert torch.autograd.gradcheck(with_fixed_length, student)
    torch.testing.assert_close(found, torch.autograd.grad(with_fixed_length(student), student)[0])


def layers_of(critic: Discriminator) -> list[tuple[str, dict[str, NDArray[Any]]]]:
    """The discriminator's layers as the oracle takes them."""
    found = []
    for layer in critic.layers:
        weights = {name: one.detach().numpy() for name, one in layer.named_parameters()}
        if isinstance(layer, SelfAttention):
            found.append(("attention", weights))
        elif weights:
            found.append(("last" if layer is critic.layers[-1] else "conv", weights))
    return found


def critic_of(channels: int, grid: tuple[int, int], width: int = 2, seed: int = 0) -> Discriminator:
    torch.manual_seed(seed)
    critic = Discriminator(channels, grid, width).double()
    with torch.no_grad():
        for layer in critic.layers:
            if isinstance(layer, SelfAttention):
                layer.gamma.fill_(0.7)
    return critic


@pytest.mark.parametrize(
    ("grid", "kinds"),
    [
        pytest.param((3, 5), ["last"], id="smaller than a kernel"),
        pytest.param((8, 9), ["conv", "attention", "last"], id="halved once"),
        pytest.param((33, 34), ["conv", "conv", "attention", "conv", "attention", "last"], id="halved three times"),
    ],
)
@pytest.mark.parametrize("shown", [False, True])
def test_the_discriminator_equals_the_loops(grid: tuple[int, int], kinds: list[str], shown: bool) -> None:
    critic = critic_of(5 if shown else 2, grid)
    drawn = gaussian(1, {"scores": (2, 2, *grid), "image": (2, 3, *grid)})
    scores, image = (drawn[name].double() for name in ("scores", "image"))
    layers = layers_of(critic)
    assert [kind for kind, _ in layers] == kinds
    found = critic.judge(image if shown else None, learns=True)(scores)
    expected = oracle.judged(scores.numpy(), layers, image.numpy() if shown else None)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-10)


def test_the_published_grid_is_halved_four_times() -> None:
    with torch.device("meta"):
        critic = Discriminator(19 + 3, (65, 65))
    widths = [layer.out_channels for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]
    assert critic(torch.zeros(2, 19, 65, 65, device="meta"), torch.zeros(2, 3, 65, 65, device="meta")).shape == (2,)


def test_the_adversary_equals_the_loops() -> None:
    critic = critic_of(2, (8, 8))
    drawn = gaussian(2, {"s": (3, 2, 8, 8), "t": (3, 2, 8, 8)})
    student, teacher = (value.double() for value in drawn.values())
    share = torch.rand(3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    layers = layers_of(critic)
    parts = adversary(student, teacher, share, critic, critic, lambda_holistic=0.5, lambda_penalty=3.0)
    own, goal, draws = (one.numpy() for one in (student, teacher, share))
    expected = oracle.adversary(own, goal, draws, lambda x: oracle.judged(x, layers), 3.0, 1e-5)
    assert parts["holistic"].item() == pytest.approx(0.5 * expected[0], rel=1e-10)
    assert parts["discriminator"].item() == pytest.approx(0.5 * expected[1], rel=1e-6)


def test_the_penaltys_gradient_is_that_of_a_gradient_of_a_gradient() -> None:
    critic = critic_of(2, (8, 8))
    drawn = gaussian(4, {"s": (2, 2, 8, 8), "t": (2, 2, 8, 8)})
    student, teacher = (value.double() for value in drawn.values())
    share = torch.tensor([[0.25], [0.75]], dtype=torch.float64)
    between = (share[..., None, None] * teacher + (1 - share[..., None, None]) * student).requires_grad_()
    inner = torch.autograd.grad(critic(between).sum(), between, create_graph=True)[0]
    penalty = (inner.flatten(1).norm(dim=1) - 1).square().mean()
    plain = critic(student).mean() - critic(teacher).mean() + 10 * penalty
    judges = critic.judge(None, learns=False), critic.judge(None, learns=True)
    found = adversary(student, teacher, share, *judges, lambda_holistic=1.0)["discriminator"]
    torch.testing.assert_close(found, plain)
    weights = list(critic.parameters())
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, other)


def test_gradcheck_of_the_discriminator() -> None:
    critic = critic_of(1, (4, 4))
    drawn = gaussian(5, {"s": (2, 1, 4, 4), "t": (2, 1, 4, 4)})
    student, teacher = (value.double() for value in drawn.values())
    share = torch.full((2, 1), 0.5, dtype=torch.float64)
    last = critic.layers[-1]
    assert isinstance(last, nn.Conv2d)

    def loss(weight: Tensor, scores: Tensor) -> Tensor:
        def judge(x: Tensor) -> Tensor:
            return F.conv2d(x.tanh(), weight).mean((1, 2, 3))

        parts = adversary(scores, teacher, share, judge, judge)
        return parts["discriminator"]

    weight = last.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: loss(one, student), weight)
    free = student.requires_grad_()
    assert torch.autograd.grad(loss(weight, free), free, allow_unused=True)[0] is None


# limits and identities


def test_student_and_discriminator_learn_from_their_own_part_alone() -> None:
    student, teacher = case().tensors()
    term = case().built()
    parts = case().outcome(term, student, teacher, case().batch()).parts
    assert list(parts) == ["pixel", "pair", "holistic", "discriminator"]
    weights = list(term.parameters())
    for part, own, others in (
        ("holistic", [student["logits"]], weights),
        ("discriminator", weights, [student["logits"], student["map"]]),
    ):
        found = torch.autograd.grad(parts[part], [*own, *others], retain_graph=True, allow_unused=True)
        assert all(one is not None for one in found[: len(own)])
        assert any(one is not None and one.any() for one in found[: len(own)])
        assert all(one is None for one in found[len(own) :])


def test_the_discriminator_tells_the_models_apart_and_the_student_follows() -> None:
    torch.manual_seed(0)
    term = case(lambda_pixel=0.0, lambda_pair=0.0, lambda_holistic=1.0).built()
    student = torch.zeros(6, 5, 8, 8, requires_grad=True)
    teacher = {"logits": torch.full((6, 5, 8, 8), 1.0), "map": torch.zeros(6, 4, 6, 6)}
    features = torch.zeros(6, 3, 6, 6)
    apart = []
    for turns, groups in ((60, term.param_groups()), (60, [{"params": [student]}])):
        optimizer = torch.optim.Adam([{**group, "lr": 0.02} for group in groups])
        for step in range(turns):
            optimizer.zero_grad()
            sides = case().signals({"logits": student, "map": features}), case().signals(teacher)
            share = term.draw(*sides, case().batch(), Draw(0, step, "skd"))
            torch.stack(list(term(*sides, case().batch(), share).values())).sum().backward()
            optimizer.step()
        judge = term.discriminator.judge(None, learns=False)  # type: ignore[operator, union-attr]
        apart.append((judge(teacher["logits"]) - judge(student.detach())).mean().item())
    assert apart[0] > 0.5
    assert apart[1] < apart[0]
    assert student.detach().mean() > 0.1


def test_the_discriminator_is_shown_the_image() -> None:
    shown = case(conditional=True)
    student, teacher = shown.tensors()
    values = []
    for level in (0.0, 1.0):
        batch = replace(case().batch(), inputs=torch.full((6, 3, 16, 16), level))
        values.append(shown.outcome(shown.built(), student, teacher, batch).parts)
    assert values[0]["holistic"] != values[1]["holistic"]
    assert torch.equal(values[0]["pixel"], values[1]["pixel"])
    with pytest.raises(
        UserError, match=r"^skd shows its discriminator images \[B, 3, H, W\], and the batch has \[6, 1\]"
    ):
        shown.outcome(shown.built(), student, teacher, case().batch())


def test_without_the_holistic_part_there_is_no_discriminator() -> None:
    bare = case(lambda_holistic=0)
    term = bare.built()
    assert not list(term.parameters())
    assert list(bare.outcome(term, *bare.tensors(), bare.batch()).parts) == ["pixel", "pair"]


@pytest.mark.parametrize("name", ["learns", "half_precision", "autocast"])
def test_without_it_the_contract_of_plain_terms_holds(name: str) -> None:
    from test_contract import CHECKS, Method

    here = case(lambda_holistic=0)
    CHECKS[name](Method("skd", CARD, here))


def test_the_discriminator_has_a_rate_of_its_own() -> None:
    (group,) = case().built().param_groups()
    assert group["lr"] == 4e-4
    (plain,) = case(discriminator_lr=None).built().param_groups()
    assert "lr" not in plain
    assert not case(lambda_holistic=0).built().param_groups()


def test_maps_too_small_for_the_discriminator() -> None:
    student, teacher = case().tensors()
    assert teacher is not None
    one, other = ({**side, "logits": side["logits"][..., :6]} for side in (student, teacher))
    said = "skd: the discriminator was made for score maps of at least 8 places a side, and meets 8x6"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        case().outcome(case().built(), one, other, case().batch())


def test_the_pixel_part_is_the_divergence_and_the_teachers_entropy() -> None:
    student, teacher, *maps = made(4)
    pixel = skd(student, teacher, maps[0], maps[1], **UNIT)["pixel"]
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1).mean()
    entropy = torch.distributions.Categorical(logits=teacher.movedim(1, -1)).entropy().mean()
    torch.testing.assert_close(pixel, kl + entropy)


def test_the_released_pixel_part_grows_with_the_number_of_images() -> None:
    tensors = made(5, images=3)
    mean, total_ = (skd(*tensors, form=form)["pixel"] for form in ("mean", "sum"))
    torch.testing.assert_close(total_, 3 * mean)


def test_turning_and_scaling_features_changes_no_pair() -> None:
    student, teacher, one, other = made(6)
    # max-pooling does not commute with turning: pool first, by taking one position a region
    turn = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    turned = torch.einsum("bchw,cd->bdhw", one, turn) * 5
    scale = 0.16  # regions of one position
    found, expected = (skd(student, teacher, s, other, pool_scale=scale)["pair"] for s in (turned, one))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_teacher_finds_itself_alike() -> None:
    student, teacher, _, other = made(7)
    assert skd(student, teacher, 3 * other, other)["pair"].item() == pytest.approx(0, abs=1e-14)


def test_regions_at_the_edge_may_be_smaller() -> None:
    grid = torch.arange(25.0).view(1, 1, 5, 5)
    size = [max(1, int(5 * 0.5))] * 2
    assert size == [2, 2]
    assert regions(grid, 0.5).shape == (1, 9, 1)


@pytest.mark.parametrize("size", [1, 40, 200])
def test_blocks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = made(8, size=(8, 8))
    whole = skd(*tensors, pool_scale=0.25)["pair"]
    slope = torch.autograd.grad(whole, tensors[2])[0]
    monkeypatch.setattr(block, "SIZE", size)
    parts = skd(*tensors, pool_scale=0.25)["pair"]
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, tensors[2])[0], slope)


def test_memory_of_the_pairs_grows_with_the_positions_and_not_with_their_square(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)
    scores = torch.zeros(1, 2, 1, 1)

    def held(side: int) -> int:
        student, teacher = torch.randn(1, 4, side, side, requires_grad=True), torch.randn(1, 4, side, side)
        return peak(lambda: skd(scores, scores, student, teacher, pool_scale=1 / side)["pair"].backward())

    assert held(32) < 4 * held(16)  # four times the positions, sixteen times the pairs


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    student = torch.zeros(0, 3, 4, 4, requires_grad=True)
    features = torch.zeros(0, 2, 4, 4, requires_grad=True)
    parts = skd(student, student.detach(), features, torch.zeros(0, 3, 4, 4))
    assert total(parts).item() == 0
    assert torch.autograd.grad(total(parts), [student, features])[0].shape == student.shape


def test_a_dead_region_has_no_gradient() -> None:
    student, teacher, one, other = made(9)
    with torch.no_grad():
        one.zero_()
    parts = skd(student, teacher, one, other)
    assert parts["pair"].isfinite()
    assert not torch.autograd.grad(parts["pair"], one)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    tensors = [(1e4 * tensor.detach().sign()).to(dtype) for tensor in made(10)]
    tensors[0].requires_grad_()
    tensors[2].requires_grad_()
    loss = total(skd(*tensors))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(slope.isfinite().all() for slope in torch.autograd.grad(loss, [tensors[0], tensors[2]]))


# errors


def test_maps_that_do_not_fit() -> None:
    scores, features = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 6, 6)
    said = "skd compares score maps of one shape: the student's is [2, 3, 4, 4], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        skd(scores, scores[:, :, :2, :2], features, features)
    said = (
        "skd compares regions: the student's map [2, 2, 6, 6] gives 4, the teacher's [2, 2, 5, 5] gives 9; "
        "tap layers of equal stride"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        skd(scores, scores, features, features[:, :, :5, :5])
    vectors = Signals(None, {"logits": torch.zeros(2, 3), "map": features})
    with pytest.raises(UserError, match=re.escape("skd compares maps [B, C, H, W], not [2, 3] and [2, 3]")):
        SKD().build(vectors, vectors, Facts())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: mean, sum"),
        ({"pool_scale": 0}, "pool_scale is a share in (0, 1], not 0"),
        ({"pool_scale": 2}, "pool_scale is a share in (0, 1], not 2"),
        ({"lambda_holistic": -1}, "lambda_holistic is at least 0, not -1"),
        ({"lambda_penalty": -1}, "lambda_penalty is at least 0, not -1"),
        ({"discriminator_width": 0}, "discriminator_width is at least 1, not 0"),
        ({"discriminator_lr": 0}, "discriminator_lr must be > 0, not 0"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        SKD(**options)


# what is ignored


def test_ignored_places_leave_what_a_cut_map_gives() -> None:
    parts = made(3, grid=(4, 6), size=(4, 6))
    keep = torch.ones(2, 4, 6, dtype=torch.bool)
    keep[:, :, 3:] = False
    found = skd(*parts, pool_scale=0.5, keep=(keep, keep, keep))
    cut = [one[..., :3] for one in parts]
    assert found["pixel"].item() == pytest.approx(skd(*cut)["pixel"].item(), rel=1e-12)
    regions_left = regions(parts[2], 0.5, keep)
    alone = torch.stack([regions(parts[2][:, :, row : row + 2, :3], 1.0)[:, 0] for row in (0, 2)], dim=1)
    torch.testing.assert_close(regions_left[:, [0, 2]], alone)
    assert not regions_left[:, [1, 3]].any()


def test_each_image_counts_alike_however_much_of_it_is_ignored() -> None:
    parts = made(4)
    keep = torch.ones(2, 4, 3, dtype=torch.bool)
    keep[0, 1:] = False
    found = skd(*parts, keep=(keep, None, None))["pixel"]
    one = skd(*(part[:1, :, :1] if number < 2 else part[:1] for number, part in enumerate(parts)))["pixel"]
    other = skd(*(part[1:] for part in parts))["pixel"]
    assert found.item() == pytest.approx((one + other).item() / 2, rel=1e-12)


def test_score_maps_of_two_sizes_meet_at_the_smaller() -> None:
    student, teacher = case().tensors(0)
    assert teacher is not None
    large = {**teacher, "logits": teacher["logits"].repeat_interleave(2, 2).repeat_interleave(2, 3)}
    term, batch = case().built(), case().batch()
    same, met = (case().outcome(term, student, side, batch).parts for side in (teacher, large))
    assert all(torch.allclose(same[name], met[name]) for name in same)
