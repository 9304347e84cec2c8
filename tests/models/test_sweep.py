# SPDX-License-Identifier: Apache-2.0
"""Every architecture of timm, and every vision network of transformers: roles, shapes and bridges.

What does not resolve is listed here with the reason. The suite takes a sample by a fixed key; `make verify` takes all,
and 60 random pairs of them take a real step.
"""

import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any, final
from zlib import crc32

import pytest
import torch
from torch import Tensor

from models.sweep import build, complaint, names
from tutelage.core import Batch, Distiller, Facts, Model, Objective, Reads, Signals, Tap, Term
from tutelage.core.bridge import across
from tutelage.methods.logits.kd import KD
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

pytest.importorskip("transformers")

SAMPLED = 60
PAIRS = 60
CHUNKS = 40
#: Share of all networks that must resolve.
RESOLVED = 0.995
#: Largest network of a pair that takes a real step, in parameters.
LARGEST = 45_000_000

#: What does not resolve: names, what is said of them, and why.
KNOWN: tuple[tuple[str, str, str], ...] = (
    (
        "hf:imagegpt",
        "ValueError: You have to specify either input_ids or inputs_embeds",
        "it reads colours as words, one a pixel, and takes no images",
    ),
    (
        "hf:perceiver",
        "no classifier; no pooled; neither map nor tokens",
        "its latents lie on no grid, and its classes are queries of a decoder",
    ),
    (
        "hf:shieldgemma2",
        "ValueError: You must specify exactly one of input_ids or inputs_embeds",
        "a language model that is asked about an image: it takes text beside it",
    ),
    (
        "hf:siglip2",
        "RuntimeError: a and b must have same reduction dim, but got [672, 224] X [768, 768].",
        "its processor cuts images of any proportions into patches; it takes those, their mask and their grid",
    ),
    (
        "backbone:rf_detr_dinov2",
        "neither map nor tokens",
        "its blocks work on windows, each a row of the batch",
    ),
)
if find_spec("natten") is None:
    MISSING = "a library of attention kernels, which is not installed here"
    KNOWN += tuple(
        (f"{kind}:dinat", f"ImportError: {name} requires the natten library but it was not found", MISSING)
        for kind, name in (("hf", "DinatForImageClassification"), ("backbone", "DinatBackbone"))
    )

NAMES = names()


def known(name: str) -> str | None:
    """Return what is said of a network that is known not to resolve."""
    return next((said for pattern, said, _ in KNOWN if fnmatchcase(name, pattern)), None)


def wrong(some: list[str]) -> dict[str, str]:
    """Return what is said of networks otherwise than the list of exceptions says."""
    said = {name: complaint(name) for name in some}
    return {name: found for name, found in said.items() if not _expected(found, known(name))}


def _expected(found: str, known: str | None) -> bool:
    return found == "" if known is None else bool(found) and found.strip().startswith(known.strip())


#: Recurrent layers take a minute on the meta device, step by step.
QUICK = [name for name in NAMES if "sequencer" not in name]


@pytest.mark.parametrize("name", QUICK[:SAMPLED])
def test_a_sample_resolves(name: str) -> None:
    assert not wrong([name])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_all_resolve(chunk: int) -> None:
    assert wrong(NAMES[chunk::CHUNKS]) == {}


def test_few_are_excepted_and_each_has_a_reason() -> None:
    excepted = [name for name in NAMES if known(name) is not None]
    assert len(NAMES) > 1000
    assert len(excepted) <= (1 - RESOLVED) * len(NAMES)
    for pattern, said, reason in KNOWN:
        assert said
        assert len(reason) > 20
        assert any(fnmatchcase(name, pattern) for name in NAMES), pattern


# --- pairs ---------------------------------------------------------------------------------------------------------


@final
class Across(Term):
    """The distance of the student's last map or tokens, on the teacher's grid, from the teacher's."""

    def __init__(self, student: Tap, teacher: Tap) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    @property
    def reads(self) -> Reads:
        return Reads((self.student,), (self.teacher,))

    def build(self, student: Signals, teacher: Signals | None, facts: Facts) -> None:
        assert teacher is not None
        self.bridge = across(student[self.student.name], teacher[self.teacher.name])

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Tensor:
        assert teacher is not None
        goal = teacher[self.teacher.name]
        given: Tensor = self.bridge(student[self.student.name])
        assert given.shape == goal.shape
        return (given - goal).square().mean()


def pairs() -> list[tuple[str, str]]:
    """Return pairs of architectures that a fixed key draws; what is too large is passed over when it is built."""
    drawn = sorted(NAMES, key=lambda name: crc32(f"pair {name}".encode()))
    usable = [name for name in drawn if name.startswith("timm:") and known(name) is None]
    return list(zip(usable[::2], usable[1::2], strict=False))


def small(name: str) -> bool:
    """Whether a network is small enough for a real step here."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(parameter.numel() for parameter in build(name).module.parameters()) <= LARGEST


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries, about their own defaults
@pytest.mark.parametrize("number", range(PAIRS))
def test_a_random_pair_takes_a_step(number: int) -> None:
    drawn = [*pairs()[number::PAIRS], *reversed(pairs())]  # the others, where all of its own are too large
    one, other = next((one, other) for one, other in drawn if small(one) and small(other))
    student, teacher = (at_its_size(load(name, num_classes=5, seed=seed)) for seed, name in enumerate((one, other)))
    places = [next(Tap(role) for role in ("map", "tokens") if role in model.roles) for model in (student, teacher)]
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(number))
    batch = Batch.of(images, torch.tensor([0, 3]))
    objective = Objective(task=1.0, kd=KD(), across=Across(*places))
    distiller = Distiller(student, objective, task=Classification(5), teacher=teacher, sample=batch)
    optimizer = torch.optim.SGD(distiller.param_groups(), lr=1e-3)
    before, taught = state(student), state(teacher)
    losses = distiller(batch, distiller.observe(batch))
    losses.total.backward()
    optimizer.step()
    distiller.after_step(losses)
    assert all(value.isfinite() for value in losses.parts.values())
    assert all(p.grad is not None for p in objective.terms["across"].parameters())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in state(student).items())
    assert all(torch.equal(tensor, taught[key]) for key, tensor in state(teacher).items())


def at_its_size(model: Model) -> Model:
    """Return a network that resizes its images to those it was made for."""
    assert model.input is not None
    model.input = replace(model.input, size=tuple(model.source["native_size"]))
    return model


def state(model: Model) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.module.state_dict().items()}
