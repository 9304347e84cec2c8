# SPDX-License-Identifier: Apache-2.0
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tutelage.functional.simcc import bins, decode, decode_dark, encode, simcc_kl, unflip

GOLDEN = ("core/simcc_codec", "core/simcc_decode", "core/simcc_dark", "core/simcc_kl")


def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Any]:
    given = {name: torch.from_numpy(array) for name, array in arrays.items() if array.dtype.kind == "f"}
    if claim == "core/simcc_codec":
        width, height = meta["input_size"]
        sigma = meta["sigma"]
        wide = tuple(sigma) if isinstance(sigma, list) else (sigma, sigma)
        x, y, weight = encode(
            given["keypoints"],
            given["keypoints_visible"],
            (height, width),
            sigma=None if meta["smoothing_type"] == "standard" else wide,
            split=meta["simcc_split_ratio"],
            normalize=meta["normalize"],
            smoothing=meta["label_smooth_weight"],
        )
        points, scores = decode(x, y, split=meta["simcc_split_ratio"])
        return {
            **{"labels_x": x, "labels_y": y, "keypoint_weights": weight},
            **{"decoded_keypoints": points, "decoded_scores": scores},
        }
    if claim == "core/simcc_kl":
        double = {name: tensor.double() for name, tensor in given.items()}
        free = {name: double[name].requires_grad_() for name in ("pred_x", "pred_y")}
        loss = simcc_kl(
            free["pred_x"],
            free["pred_y"],
            double["target_x"],
            double["target_y"],
            double["target_weight"] if meta["use_target_weight"] else torch.ones_like(double["target_weight"]),
            beta=meta["beta"],
            label_softmax=meta["label_softmax"],
        ).sum()
        grads = torch.autograd.grad(loss, list(free.values()))
        return {"loss": loss, **{f"grad_{name}": grad for name, grad in zip(free, grads, strict=True)}}
    split = meta["simcc_split_ratio"]
    x, y = given["simcc_x"], given["simcc_y"]
    if claim == "core/simcc_dark":
        points, scores = decode_dark(x.double(), y.double(), sigma=tuple(meta["sigma"]), split=split)
        return {"keypoints": points, "scores": scores}
    points, scores = decode(x, y, split=split)
    mean_x, mean_y = (x + given["flipped_simcc_x"]) / 2, (y + given["flipped_simcc_y"]) / 2
    mean_points, mean_scores = decode(mean_x, mean_y, split=split)
    return {
        **{"keypoints": points, "scores": scores},
        **{"keypoints_flip_average": mean_points, "scores_flip_average": mean_scores},
    }


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loop_decode(logits_x: Tensor, logits_y: Tensor, split: float = 2.0) -> tuple[Tensor, Tensor]:
    """One point after the other, from the definition."""
    points, scores = torch.zeros(*logits_x.shape[:2], 2), torch.zeros(logits_x.shape[:2])
    for n in range(logits_x.shape[0]):
        for k in range(logits_x.shape[1]):
            x, y = logits_x[n, k], logits_y[n, k]
            score = min(float(x.max()), float(y.max()))
            place = (int(x.argmax()), int(y.argmax())) if score > 0 else (-1, -1)
            points[n, k] = torch.tensor(place) / split
            scores[n, k] = score
    return points, scores


def test_decode_equals_the_loop_and_is_twenty_times_as_fast() -> None:
    x, y = logits(64, 133, 96), logits(64, 133, 128, seed=1) - 2.0
    points, scores = decode(x, y)
    few = loop_decode(x[:2], y[:2])
    assert torch.equal(points[:2], few[0])
    assert torch.equal(scores[:2], few[1])
    assert (scores <= 0).any()

    def fastest(call: Any, tries: int = 3) -> float:
        spent = []
        for _ in range(tries):
            begun = time.perf_counter()
            call()
            spent.append(time.perf_counter() - begun)
        return min(spent)

    assert fastest(lambda: loop_decode(x, y), 1) > 20 * fastest(lambda: decode(x, y))


def test_a_point_is_found_again_within_a_bin() -> None:
    points = torch.tensor([[3.2, 4.9], [0.0, 63.4], [46.7, 12.3]])
    x, y, weight = encode(points, torch.ones(3), (64, 48), sigma=(2.0, 2.5))
    assert bins((64, 48)) == (96, 128) == (x.shape[1], y.shape[1])
    found, scores = decode(x, y)
    assert (found - points).abs().max() <= 0.25 + 1e-6
    assert weight.tolist() == scores.tolist() == [1, 1, 1]


def test_dark_refines_a_point_between_bins() -> None:
    true = 17.3
    gap = torch.arange(96) - 2 * true
    x = torch.exp(-gap.square() / (2 * 2.0**2))[None, None]
    rough, fine = decode(x, x)[0], decode_dark(x, x, sigma=(2.0, 2.0))[0]
    assert (fine - true).abs().max() < 0.02 < (rough - true).abs().max()


@pytest.mark.parametrize("rows", [torch.zeros(1, 2, 16), torch.full((1, 2, 16), -3.0)])
@pytest.mark.parametrize("sigma", [0.4, 0.6, 0.9, 1.2, 3.0])
def test_rows_without_a_positive_logit_stay_finite(rows: Tensor, sigma: float) -> None:
    points, scores = decode_dark(rows, rows, sigma=(sigma, sigma))
    assert points.isfinite().all()
    assert (scores <= 0).all()


def test_a_mirrored_prediction_comes_back() -> None:
    swap = torch.tensor([1, 0, 2])
    x, y = logits(2, 3, 8), logits(2, 3, 6, seed=1)
    assert torch.equal(unflip(*unflip(x, y, swap), swap)[0], x)
    assert torch.equal(unflip(x, y, swap)[0][0, 0], x[0, 1].flip(0))
    assert torch.equal(unflip(x, y, swap)[1][0, 2], y[0, 2])


def test_the_loss_equals_the_loop() -> None:
    x, y = logits(2, 3, 8).double(), logits(2, 3, 6, seed=1).double()
    label_x, label_y = logits(2, 3, 8, seed=2).double().abs(), logits(2, 3, 6, seed=3).double().abs()
    weight = torch.tensor([[1.0, 0.0, 0.3], [1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = [0.0, 0.0]
    for n in range(2):
        for k in range(3):
            for pred, label in ((x, label_x), (y, label_y)):
                q, p = np.exp(10 * label[n, k].numpy()), np.exp(10 * pred[n, k].numpy())
                q, p = q / q.sum(), p / p.sum()
                expected[n] += float(weight[n, k]) * sum(q * (np.log(q) - np.log(p))) / len(q) / 3
    assert simcc_kl(x, y, label_x, label_y, weight).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_zero_at_its_labels_and_has_right_gradients() -> None:
    x, y = logits(2, 3, 8).double().requires_grad_(), logits(2, 3, 6, seed=1).double().requires_grad_()
    label_x, label_y = torch.rand(2, 3, 8).double(), torch.rand(2, 3, 6).double()
    weight = torch.ones(2, 3).double()
    assert simcc_kl(label_x, label_y, label_x, label_y, weight).abs().max() < 1e-15
    assert torch.autograd.gradcheck(lambda a, b: simcc_kl(a, b, label_x, label_y, weight), (x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_and_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([1e4, -1e4, 0.0, 3.0], dtype=dtype)[None, None].expand(2, 3, 4).clone().requires_grad_()
    label = torch.zeros(2, 3, 4)
    loss = simcc_kl(x, x, label, label, torch.ones(2, 3)).sum()
    loss.backward()
    assert loss.dtype == torch.float32
    assert math.isfinite(loss.item())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_labels_outside_the_image() -> None:
    points = torch.tensor([[-20.0, 5.0], [-1.0, 5.0], [5.0, 5.0]])
    x, _, weight = encode(points, torch.tensor([1.0, 1.0, 0.3]), (16, 16), sigma=(2.0, 2.0))
    assert weight.tolist() == pytest.approx([0.0, 1.0, 0.3])
    assert not x[0].any()
    assert x[1].any()
    assert not x[2].any()


def test_labels_and_loss_compile_as_one_graph() -> None:
    def step(x: Tensor, y: Tensor, points: Tensor, visible: Tensor) -> Tensor:
        return simcc_kl(x, y, *encode(points, visible, (16, 12), sigma=(1.5, 2.0))).sum()

    given = (logits(2, 3, 24), logits(2, 3, 32, seed=1), 12 * torch.rand(2, 3, 2), torch.ones(2, 3))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(*given).item() == pytest.approx(step(*given).item(), rel=1e-6)
