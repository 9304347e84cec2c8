# SPDX-License-Identifier: Apache-2.0
import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, distributed

from gloo_pool import GlooPool
from golden_answer import with_gradients
from method_case import MethodCase, gaussian, labelled_batch
from oracles import cirkd as oracle
from peak import peak
from tutelage.core import Batch, Draw, Facts, Signals
from tutelage.core.error import UserError
from tutelage.core.term import Outcome
from tutelage.functional import block
from tutelage.methods.segmentation.cirkd import CIRKD, Form, Sorted, cirkd, laps, picks, vectors

Arrays = dict[str, NDArray[Any]]
FORMS: dict[Form, str] = {"class": "paper", "image": "code"}  # ours, the oracle's
SMALL: dict[str, Any] = {
    "pixel_memory": 12,
    "region_memory": 5,
    "pixels_per_image": 4,
    "pixel_keys": 12,
    "region_keys": 6,
}
LABELS = torch.randint(-1, 3, (6, 8, 8), generator=torch.Generator().manual_seed(5))


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: CIRKD(**{**SMALL, **options}),
        student=lambda seed: gaussian(seed, {"logits": (6, 3, 4, 4), "map": (6, 5, 4, 4)}),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (6, 3, 4, 4), "map": (6, 4, 4, 4)}, 2.0),
        batch=lambda: labelled_batch(LABELS),
    )


def total(parts: Any) -> Tensor:
    return torch.stack(list(parts.values())).sum()


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    read = within_batch if meta["kind"] == "minibatch" else memory
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        found = read(arrays, meta, dtype)
        answer |= {f"{name}{suffix}": value for name, value in found.items() if f"{name}{suffix}" in arrays}
    return answer


def within_batch(arrays: Arrays, meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], dtype=dtype).requires_grad_()
    teacher = torch.tensor(arrays["t_feat"], dtype=dtype)
    parts = cirkd(student, teacher, student, teacher, temperature=meta["temperature"])
    losses = {"loss": parts["batch"], "loss_pixel_kd": parts["kd"]}
    return with_gradients(losses, {"s_feat": student}, arrays)


def memory(arrays: Arrays, meta: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    student = torch.tensor(arrays["s_feat"], dtype=dtype).requires_grad_()
    teacher = torch.tensor(arrays["t_feat"], dtype=dtype)
    classes, frequency = meta["num_classes"], meta["pixel_update_freq"]
    scores = torch.zeros(len(student), classes, *student.shape[2:], dtype=dtype)
    sides = Signals(None, {"logits": scores, "map": student}), Signals(None, {"logits": scores, "map": teacher})
    term = CIRKD(
        beta=1.0,
        gamma=1.0,
        memory_temperature=meta["contrast_temperature"],
        pixel_memory=max(meta["pixel_memory_size"], frequency),
        region_memory=meta["region_memory_size"],
        pixels_per_image=frequency,
        form="image",
        ignore_label=meta["ignore_label"],
    )
    term.pixel_memory = meta["pixel_memory_size"]  # the case's queue is shorter than an image may fill
    term.build(sides[0].detach(), sides[1], Facts())
    weights = {
        name.replace("w_project_head.", "projection."): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("w_project_head.")
    }
    weights |= {
        "pixel_queue": torch.tensor(arrays["w_teacher_pixel_queue"]),
        "pixel_pointer": torch.tensor(arrays["w_pixel_queue_ptr"]),
        "region_queue": torch.tensor(arrays["w_teacher_segment_queue"]),
        "region_pointer": torch.tensor(arrays["w_segment_queue_ptr"]),
    }
    term.to(dtype).load_state_dict(weights, strict=False)
    labels = torch.tensor(arrays["labels"])
    batch = Batch.of(torch.zeros(len(labels), 1), labels)
    outcome = term(*sides, batch, draws(arrays, meta, term.labels(batch, *student.shape[2:])))
    free = {"s_feat": student} | {
        f"w_{name.replace('projection.', 'project_head.')}": weight for name, weight in term.named_parameters()
    }
    losses = {"loss": outcome.parts["pixel"], "loss_region": outcome.parts["region"]}
    answer: dict[str, Any] = with_gradients(losses, free, arrays)
    term.commit(outcome.kept)
    return answer | {
        "out_pixel_queue_after": term.pixel_queue,
        "out_segment_queue_after": term.region_queue,
        "out_pixel_ptr_after": term.pixel_pointer,
        "out_segment_ptr_after": term.region_pointer,
    }


def draws(arrays: Arrays, meta: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The permutations that the case drew: one for each image and class there, then one for each queue."""
    names = sorted(name for name in arrays if name.startswith("out_randperm_call"))
    drawn = [torch.tensor(arrays[name]) for name in names]
    chosen = torch.zeros(len(labels), meta["num_classes"], meta["pixel_update_freq"], dtype=torch.int64)
    turn = iter(drawn)
    for image in range(len(labels)):
        for kind in range(meta["num_classes"]):
            if bool((labels[image] == kind).any()):
                taken = next(turn)[: meta["pixel_update_freq"]]
                chosen[image, kind, : len(taken)] = taken
    pixels, regions = next(turn), next(turn)
    return chosen, pixels[: meta["pixel_contrast_size"]], regions[: meta["region_contrast_size"]]


# the equations, worked out by loops


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    classes=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    widths=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    temperature=st.floats(0.05, 2),
    size=st.sampled_from([1, 13, 2**22]),
)
def test_the_batch_equals_the_loops(
    seed: int,
    images: int,
    classes: int,
    grid: tuple[int, int],
    widths: tuple[int, int],
    temperature: float,
    size: int,
) -> None:
    shapes = {"s": (images, classes, *grid), "t": (images, classes, *grid)}
    shapes |= {"sf": (images, widths[0], *grid), "tf": (images, widths[1], *grid)}
    given_ = {name: value.double() for name, value in gaussian(seed, shapes).items()}
    arrays = {name: value.numpy() for name, value in given_.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "SIZE", size)
        parts = cirkd(given_["s"], given_["t"], given_["sf"], given_["tf"], temperature=temperature)
    assert parts["kd"].item() == pytest.approx(oracle.pixel(arrays["s"], arrays["t"]), rel=1e-9, abs=1e-13)
    expected = oracle.minibatch(arrays["sf"], arrays["tf"], temperature)
    assert parts["batch"].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 3),
    classes=st.integers(1, 3),
    pixel_memory=st.integers(4, 9),
    region_memory=st.integers(1, 4),
    steps=st.integers(1, 3),
)
@pytest.mark.parametrize("form", FORMS)
def test_the_memory_equals_the_loops(
    form: Form, seed: int, images: int, classes: int, pixel_memory: int, region_memory: int, steps: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    options = {"pixel_memory": pixel_memory, "region_memory": region_memory, "pixels_per_image": 4}
    term = CIRKD(beta=1.0, gamma=1.0, pixel_keys=2 * classes, region_keys=classes, form=form, **options)  # type: ignore[arg-type]
    shapes = {"logits": (images, classes, 3, 3), "map": (images, 2, 3, 3)}
    goal = {"logits": (images, classes, 3, 3), "map": (images, 3, 3, 3)}
    one, other = (Signals(None, {n: v.double() for n, v in gaussian(seed, s).items()}) for s in (shapes, goal))
    term.build(one, other, Facts())
    term.double()
    queues = oracle.Queues(
        *(getattr(term, name).numpy().copy() for name in ("pixel_queue", "region_queue")),
        *(getattr(term, name).numpy().copy() for name in ("pixel_pointer", "region_pointer")),
    )
    weights = {name.removeprefix("projection."): w.detach().numpy() for name, w in term.named_parameters()}
    for step in range(steps):
        labels = torch.randint(-1, classes, (images, 6, 6), generator=generator)
        index = torch.arange(images) + 10 * step
        batch = Batch.of(torch.zeros(images, 1), labels, index=index)
        drawn = term.draw(one, other, batch, Draw(seed, step, "cirkd"))
        chosen, pixel_slots, region_slots = drawn
        small = oracle.resize_labels(labels.numpy(), 3, 3)
        counts = [[int((small[n] == c).sum()) for c in range(classes)] for n in range(images)]
        permutations = [
            chosen[n, c, : min(counts[n][c], 4)].numpy() for n in range(images) for c in range(classes) if counts[n][c]
        ]
        queues = oracle.update(queues, other["map"].numpy(), small, permutations, 4, form=FORMS[form])
        outcome = term(one, other, batch, drawn)
        term.commit(outcome.kept)
        np.testing.assert_allclose(term.pixel_queue.numpy(), queues.pixel, rtol=1e-9)
        np.testing.assert_allclose(term.region_queue.numpy(), queues.region, rtol=1e-9)
        assert term.pixel_pointer.tolist() == queues.pixel_pointer.tolist()
        assert term.region_pointer.tolist() == queues.region_pointer.tolist()
        if (small < 0).all():
            assert outcome.parts["pixel"] == outcome.parts["region"] == 0
            continue
        keep = (small >= 0) | (small < 0).all((1, 2), keepdims=True)  # an image without labels is seen whole
        projected = oracle.project(one["map"].numpy(), weights, keep if form == "class" else None)
        for name, queue, slots in (("pixel", queues.pixel, pixel_slots), ("region", queues.region, region_slots)):
            expected = oracle.contrast(projected, other["map"].numpy(), small, queue, slots.tolist())
            assert outcome.parts[name].item() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_gradcheck() -> None:
    drawn = gaussian(2, {"s": (2, 3, 2, 2), "t": (2, 3, 2, 2), "sf": (2, 2, 2, 2), "tf": (2, 3, 2, 2)})
    s, t, sf, tf = (value.double() for value in drawn.values())

    def loss(scores: Tensor, features: Tensor) -> Tensor:
        return total(cirkd(scores, t, features, tf, temperature=0.5))

    assert torch.autograd.gradcheck(loss, (s.requires_grad_(), sf.requires_grad_()))


# limits and identities


def test_equal_features_relate_alike_and_a_turn_changes_nothing() -> None:
    scores = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    student, teacher = (gaussian(n, {"f": (2, 3, 4, 4)})["f"].double() for n in (0, 1))
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    turned = 5 * torch.einsum("bchw,cd->bdhw", student, turn)
    found, expected = (cirkd(scores, scores, s, teacher)["batch"] for s in (turned, student))
    torch.testing.assert_close(found, expected)
    assert cirkd(scores, scores, 3 * teacher, teacher)["batch"].item() == pytest.approx(0, abs=1e-14)


def test_coefficients_and_what_they_leave_out() -> None:
    student, teacher = case().tensors()
    batch = case().batch()
    unit = case(lambda_kd=1.0, alpha=1.0, beta=1.0, gamma=1.0)
    parts = unit.outcome(unit.built(), student, teacher, batch).parts
    other = case(lambda_kd=2.0, alpha=3.0, beta=0.5, gamma=0.25)
    scaled = other.outcome(other.built(), student, teacher, batch).parts
    for name, factor in (("kd", 2.0), ("batch", 3.0), ("pixel", 0.5), ("region", 0.25)):
        torch.testing.assert_close(scaled[name], factor * parts[name])
    bare = case(beta=0, gamma=0)
    outcome = bare.outcome(bare.built(), student, teacher, batch)
    assert set(outcome.parts) == {"kd", "batch"}
    assert not outcome.kept
    assert not list(bare.built().parameters())
    assert not list(bare.built().buffers())


def test_without_the_memory_no_labels_are_needed() -> None:
    here = case(beta=0, gamma=0)
    student, teacher = here.tensors()
    batch = Batch.of(torch.zeros(6, 1))
    assert here.loss(here.built(), student, teacher, batch).isfinite()


@pytest.mark.parametrize("size", [1, 100, 3000])
def test_blocks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    term = case().built(dtype=torch.float64)
    student, teacher = case().tensors(dtype=torch.float64)
    batch = case().batch()
    drawn = case().draws(term, student, teacher, batch)
    found = []
    for limit in (2**22, size):
        monkeypatch.setattr(block, "SIZE", limit)
        loss = case().loss(copy.deepcopy(term), student, teacher, batch, drawn)
        found.append((loss, torch.autograd.grad(loss, student["map"])[0]))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])


def test_memory_grows_with_the_pixels_and_not_with_their_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "SIZE", 2**14)
    scores = torch.zeros(1, 2, 1, 1)

    def held(side: int) -> int:
        student, teacher = torch.randn(1, 4, side, side, requires_grad=True), torch.randn(1, 4, side, side)
        return peak(lambda: cirkd(scores, scores, student, teacher)["batch"].backward())

    assert held(32) < 4 * held(16)  # four times the pixels, sixteen times their pairs


# what is remembered


def test_labels_may_be_known_pixel_by_pixel() -> None:
    term = case().built()
    assert isinstance(term, CIRKD)
    batch = case().batch()
    by_pixel = replace(batch, labelled=batch.labelled[:, None, None].expand_as(batch.target))
    assert torch.equal(term.labels(by_pixel, 4, 4), term.labels(batch, 4, 4))


def test_pixels_lie_class_by_class() -> None:
    labels = torch.tensor([[2, 0, -1, 2, 7, 0]])
    found = Sorted.of(labels, 3)
    assert found.place.tolist() == [[1, 5, 0, 3, 2, 4]]
    assert found.first.tolist() == [[0, 2, 2]]
    assert found.count.tolist() == [[2, 0, 2]]


def test_pixels_are_chosen_among_their_class_and_at_random() -> None:
    labels = torch.tensor([[2, 0, -1, 2, 0, 0, 2, 2]]).expand(2000, -1)
    noise = torch.rand(2000, 8, generator=torch.Generator().manual_seed(0))
    found = picks(labels, noise, 3, 3)
    assert found.shape == (2000, 3, 3)
    for kind, count in ((0, 3), (2, 4)):
        chosen = found[:, kind, : min(count, 3)]
        assert bool(((chosen >= 0) & (chosen < count)).all())
        assert all(len(row.unique()) == len(row) for row in chosen[:50])
        share = chosen[:, 0].bincount(minlength=count) / 2000
        assert (share - 1 / count).abs().max() < 0.06
    assert not found[:, 1].any()  # no pixel of class 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    length=st.integers(3, 12),
    pointer=st.integers(0, 11),
    counts=st.lists(st.integers(0, 3), min_size=0, max_size=12),
)
def test_places_are_those_of_one_image_after_the_other(length: int, pointer: int, counts: list[int]) -> None:
    now, expected = pointer % length, []
    start = now
    for count in counts:
        if count and now + count >= length:
            expected.append(length - count)
            now = 0
        else:
            expected.append(now)
            now += count
    first, after = laps(torch.tensor([start]), torch.tensor(counts, dtype=torch.int64)[:, None], length, 3)
    kept = [place for place, count in zip(first.flatten().tolist(), counts, strict=True) if count]
    assert kept == [place for place, count in zip(expected, counts, strict=True) if count]
    assert after.tolist() == [now]


def test_a_batch_is_added_before_it_is_compared() -> None:
    here = case(beta=1.0, gamma=1.0, pixel_keys=200, region_keys=200)
    term = here.built(dtype=torch.float64)
    assert isinstance(term, CIRKD)
    student, teacher = here.tensors(dtype=torch.float64)
    batch = here.batch()
    drawn = here.draws(term, student, teacher, batch)
    before = here.outcome(term, student, teacher, batch, drawn)
    queue = term.pixel_queue.clone()
    term.commit(before.kept)
    assert not torch.equal(term.pixel_queue, queue)
    assert bool((term.pixel_pointer != 0).any())
    pixels = vectors((teacher or {})["map"]).flatten(0, 1)
    fresh = (term.pixel_queue != queue).any(dim=2)
    for row in term.pixel_queue[fresh]:
        assert (pixels - row).abs().sum(dim=1).min() < 1e-12


def step(term: CIRKD, rows: Tensor, seed: int) -> Outcome:
    here = case()
    student, teacher = here.tensors(seed, torch.float64)
    batch, (one, other) = here.rows(rows, student, teacher)
    assert one is not None
    return here.outcome(term, one, other, batch)


def on_a_rank() -> dict[str, Tensor]:
    from tutelage.core import ranks

    term = case().built(dtype=torch.float64).eval()
    assert isinstance(term, CIRKD)
    for seed in range(3):
        rows = torch.arange(6)[slice(*((0, 2), (2, 6))[distributed.get_rank()])]
        kept = step(term, rows, seed).kept
        term.commit({name: ranks.gather(value) for name, value in kept.items()})
    return dict(term.state_dict())


def test_memories_of_ranks_are_those_of_one_process(gloo: GlooPool) -> None:
    alone = case().built(dtype=torch.float64).eval()
    assert isinstance(alone, CIRKD)
    for seed in range(3):
        alone.commit(step(alone, torch.arange(6), seed).kept)
    for state in gloo.run(on_a_rank):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value)


def test_a_resumed_memory_goes_on() -> None:
    whole, stopped, resumed = (case().built(dtype=torch.float64).eval() for _ in range(3))
    assert isinstance(whole, CIRKD)
    assert isinstance(stopped, CIRKD)
    assert isinstance(resumed, CIRKD)
    for seed in range(4):
        if seed == 2:
            resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
            stopped = resumed
        for term in (whole, stopped):
            term.commit(step(term, torch.arange(6), seed).kept)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_relations_gathered_are_those_of_one_process(gloo: GlooPool) -> None:
    whole = relations(slice(0, 3), gather=False)
    values, slopes = zip(*gloo.run(relations_on_a_rank), strict=True)
    torch.testing.assert_close(torch.stack(values).mean(), whole[0])
    torch.testing.assert_close(torch.cat(slopes) / 2, whole[1])


def relations(rows: slice, gather: bool) -> tuple[Tensor, Tensor]:
    student, teacher = (gaussian(n, {"f": (3, 3, 2, 2)})["f"].double()[rows] for n in (0, 1))
    student.requires_grad_()
    scores = torch.zeros(len(student), 2, 1, 1, dtype=torch.float64)
    share = len(student) * 2 / 3 if gather else 1.0
    loss = share * cirkd(scores, scores, student, teacher, gather=gather)["batch"]
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def relations_on_a_rank() -> tuple[Tensor, Tensor]:
    return relations(slice(*((0, 1), (1, 3))[distributed.get_rank()]), gather=True)


# odd cases


def test_ignored_pixels_and_unlabelled_images_leave_the_memory_as_it_was() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, CIRKD)
    student, teacher = case().tensors(dtype=torch.float64)
    before = copy.deepcopy({name: value for name, value in term.state_dict().items() if "projection" not in name})
    for target, labelled in ((torch.full_like(LABELS, 255), True), (LABELS, False)):
        batch = Batch.of(torch.zeros(6, 1), target, labelled=torch.full((6,), labelled))
        outcome = case().outcome(term, student, teacher, batch)
        assert outcome.parts["pixel"] == outcome.parts["region"] == 0
        term.commit(outcome.kept)
        for name, value in before.items():
            assert torch.equal(term.state_dict()[name], value), name


def test_one_value_a_channel_cannot_train() -> None:
    here = case()
    term = here.built()
    one = {"logits": torch.zeros(1, 3, 1, 1), "map": torch.zeros(1, 5, 1, 1)}
    other = {"logits": torch.zeros(1, 3, 1, 1), "map": torch.zeros(1, 4, 1, 1)}
    batch = Batch.of(torch.zeros(1, 1), torch.zeros(1, 8, 8, dtype=torch.int64))
    said = "cirkd: batch norm cannot train on one value a channel (one image with a 1x1 map)"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        here.loss(term, one, other, batch)
    term.eval()
    assert here.loss(term, one, other, batch).isfinite()


def test_no_rows_give_connected_zeros() -> None:
    scores = torch.zeros(0, 3, 4, 4, requires_grad=True)
    features = torch.zeros(0, 2, 4, 4, requires_grad=True)
    loss = total(cirkd(scores, scores.detach(), features, torch.zeros(0, 3, 4, 4)))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, [scores, features])[0].shape == scores.shape


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_dead_and_constant_features(value: float) -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    with torch.no_grad():
        student["map"].fill_(value)
    loss = here.loss(term, student, teacher, here.batch())
    loss.backward()
    assert loss.isfinite()
    assert student["map"].grad is not None
    assert student["map"].grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in term.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    drawn = gaussian(0, {"s": (2, 3, 4, 4), "t": (2, 3, 4, 4)})
    student = (1e4 * drawn["s"].sign()).to(dtype).requires_grad_()
    teacher = (-1e4 * drawn["t"].sign()).to(dtype)
    loss = total(cirkd(student, teacher, student, teacher))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


def test_maps_that_do_not_fit() -> None:
    scores, features = torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 6, 6)
    said = "cirkd compares score maps of one shape: the student's is [2, 3, 4, 4], the teacher's [2, 3, 2, 2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        cirkd(scores, scores[:, :, :2, :2], features, features)
    said = "cirkd compares maps of one grid: the student's is (6, 6), the teacher's (5, 5)"
    with pytest.raises(UserError, match=f"^{re.escape(said)}"):
        cirkd(scores, scores, features, features[:, :, :5, :5])


@pytest.mark.parametrize(
    ("target", "said"), [(torch.zeros(6), "[6]"), ({"boxes": []}, "dict"), (torch.zeros(6, 4, 4), "[6, 4, 4]")]
)
def test_data_without_class_maps(target: Any, said: str) -> None:
    here = case()
    student, teacher = here.tensors()
    batch = Batch.of(torch.zeros(6, 1), target)
    said = f"cirkd remembers pixels by class, and needs class maps [B, H, W], not {said}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        here.loss(here.built(), student, teacher, batch)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "code"}, "form 'code' is not known; valid: class, image"),
        ({"temperature": 0}, "temperatures must be > 0, not 0 and 0.1"),
        ({"pixel_keys": 0}, "sizes of memories and numbers of keys must be at least 1"),
        ({"pixel_memory": 8}, "pixel_memory 8 is too short for pixels_per_image 16: one image fills it"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        CIRKD(**options)


# what is ignored


def test_ignored_places_leave_what_cut_maps_give() -> None:
    drawn = gaussian(5, {"s": (2, 3, 4, 6), "t": (2, 3, 4, 6), "sf": (2, 5, 4, 6), "tf": (2, 4, 4, 6)})
    whole = [one.double() for one in drawn.values()]
    keep = torch.ones(2, 4, 6, dtype=torch.bool)
    keep[:, :, 4:] = False
    found = cirkd(*whole, keep=(keep, keep))
    cut = cirkd(*(one[..., :4] for one in whole))
    for part, value in cut.items():
        assert found[part].item() == pytest.approx(value.item(), rel=1e-12)


def test_with_all_places_kept_nothing_changes() -> None:
    drawn = gaussian(6, {"s": (2, 3, 2, 2), "t": (2, 3, 2, 2), "sf": (2, 5, 2, 2), "tf": (2, 4, 2, 2)})
    whole = [one.double() for one in drawn.values()]
    keep = torch.ones(2, 2, 2, dtype=torch.bool)
    assert cirkd(*whole, keep=(keep, keep)) == cirkd(*whole)
