# SPDX-License-Identifier: Apache-2.0
"""Whole classification steps: the task's own loss and several methods, weighted and added by the Objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tutelage.core import Batch, Facts, Signals
from tutelage.core.error import UserError
from tutelage.run.objective import build
from tutelage.tasks.classification import Classification

Arrays = Mapping[str, NDArray[Any]]

#: Groups of golden cases that no single method owns.
GOLDEN = ("core/cls_distiller",)


@dataclass(frozen=True)
class Loss:
    """How a recipe says one loss of a case: its method, and its block from the case's options."""

    stem: str
    block: Callable[[Mapping[str, Any]], dict[str, Any]]
    names: Mapping[str, str] | None = None  # of its layers, where ours are called otherwise


LOSSES = {
    "KDLoss": Loss("kd", lambda o: {"weight": o["alpha"], "temperature": o["temp"], "form": "cross_entropy"}),
    "WSLDLoss": Loss("wsld", lambda o: {"weight": o["alpha"], "temperature": o["temp"]}),
    "DKDLoss": Loss("dkd", lambda o: {"alpha": o["alpha"], "beta": o["beta"], "temperature": o["temp"]}),
    "NKDLoss": Loss("nkd", lambda o: {"gamma": o["gamma"], "temperature": o["temp"]}),
    "USKDLoss": Loss(
        "uskd",
        lambda o: {"form": "log_probability", **{name: o[name] for name in ("alpha", "beta", "mu")}},
        {"weak_fc": "weak_head"},
    ),
    "ViTKDLoss": Loss(
        "vitkd",
        lambda o: {"alpha": o["alpha_vitkd"], "beta": o["beta_vitkd"], "mask_ratio": o["lambda_vitkd"]},
    ),
    "MGDLoss": Loss("mgd", lambda o: {"weight": o["alpha_mgd"], "mask": "channel", "mask_ratio": o["lambda_mgd"]}),
    "SRRLLoss": Loss("srrl", lambda o: {"alpha": o["alpha"], "beta": o["beta"]}),
}


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        answer |= {f"{name}{suffix}": value for name, value in step(arrays, meta, dtype).items()}
    return answer


def step(arrays: Arrays, meta: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return every loss of a case, weighted, their sum, and its gradients."""
    held = {name: torch.tensor(array, dtype=dtype) for name, array in arrays.items() if array.dtype == "f4"}
    free = {name: held[name].requires_grad_() for name in held if f"grad_{name}" in arrays}
    student, teacher = sides(held)
    used = [(LOSSES[one["type"]], one) for one in meta["methods"]]
    task = 1 - sum(one["alpha"] for loss, one in used if loss.stem == "kd")
    objective = build({"task": task, **{loss.stem: loss.block(one) for loss, one in used}})
    with pytest.MonkeyPatch.context() as patch:
        for loss, _ in used:
            term = objective.entries[loss.stem].term
            term.build(student.detach(), teacher, Facts(num_classes=student.logits.shape[1]))
            term.to(dtype).load_state_dict(trained(term.state_dict(), held, loss), strict=True)
            if "mask_noise" in held and loss.stem in ("mgd", "vitkd"):
                patch.setattr(term, "draw", lambda *given: held["mask_noise"])
        target = torch.tensor(arrays["labels"])
        batch = Batch.of(torch.zeros(len(target), 1), target)
        sources = {"student": student, "teacher": teacher}
        losses = objective(sources, ["student"], batch, Classification(student.logits.shape[1]), 0)
    losses.total.backward()
    found = {"loss": losses.total, "loss_task": objective.weight("task", 0) * losses.parts["task"]}
    for loss, one in used:
        parts = [value for name, value in losses.parts.items() if name.partition(".")[0] == loss.stem]
        found[one["name"]] = objective.weight(loss.stem, 0) * torch.stack(parts).sum()
    gradients = {f"grad_{name}": tensor.grad for name, tensor in free.items()}
    return found | {name: torch.zeros_like(free[name[5:]]) if g is None else g for name, g in gradients.items()}


def sides(held: Mapping[str, Tensor]) -> tuple[Signals, Signals]:
    """Return the student's and the teacher's signals, by the roles that the methods read."""
    found = []
    for side in ("student", "teacher"):
        part = {name.removeprefix(f"{side}_"): tensor for name, tensor in held.items() if name.startswith(f"{side}_")}
        weight, bias = part["fc.weight"], part["fc.bias"]
        taps: dict[str, Tensor] = {}
        if "cls_token" in part:
            pooled = part["cls_token"]
            taps |= {"blocks[0]": part["low"][:, 0], "blocks[1]": part["low"][:, 1], "tokens": part["high"]}
            if "mid_token" in part:
                taps["stages[-2]"] = part["mid_token"]
        else:
            pooled = part["stage4"].mean((2, 3))
            taps["map"] = part["stage4"]
            if "stage3" in part:
                taps["stages[-2]"] = part["stage3"]
        logits = F.linear(pooled, weight, bias)
        head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        head.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
        lent = {"classifier": head.requires_grad_(False)} if side == "teacher" else {}
        found.append(Signals(logits, {"logits": logits, "pooled": pooled, **taps}, lent))
    return found[0], found[1].detach()


def trained(state: Mapping[str, Tensor], held: Mapping[str, Tensor], loss: Loss) -> dict[str, Tensor]:
    """Return the state of a term's own layers: those of the case, and what it has beside them."""
    given = {name.removeprefix(f"{loss.stem}."): t for name, t in held.items() if name.startswith(f"{loss.stem}.")}
    for theirs, ours in (loss.names or {}).items():
        given = {name.replace(theirs, ours): tensor for name, tensor in given.items()}
    return {**state, **given}


# the task's own loss


def scores() -> Tensor:
    return torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]], dtype=torch.float64)


def test_the_loss_is_that_of_the_labelled_rows() -> None:
    batch = Batch.of(torch.zeros(3, 1), torch.tensor([0, 1, -1]))
    found = Classification(3).loss(scores(), batch)
    assert isinstance(found, Tensor)
    assert found.item() == pytest.approx(F.cross_entropy(scores()[:2], torch.tensor([0, 1])).item(), rel=1e-12)


def test_without_a_labelled_row_it_is_zero_and_connected() -> None:
    logits = scores().requires_grad_()
    found = Classification(3).loss(logits, Batch.of(torch.zeros(3, 1), torch.full((3,), -1)))
    assert isinstance(found, Tensor)
    found.backward()
    assert found.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_model_of_other_classes_is_named() -> None:
    with pytest.raises(UserError, match="4"):
        Classification(4).loss(scores(), Batch.of(torch.zeros(3, 1), torch.tensor([0, 1, 2])))
