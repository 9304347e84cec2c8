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
from method_case import MethodCase, gaussian
from oracles import ofa_kd as oracle
from tutelage.core import Batch, Distiller, Facts, Objective, Signals
from tutelage.core.error import UserError
from tutelage.methods.features.ofa_kd import OFAKD, MapExit, TokenExit, ofa_kd
from tutelage.methods.logits.kd import kd
from tutelage.models.load import load
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
TAPS = ("stages[0]", "stages[1]")


def case(rows: int = 6, **options: Any) -> MethodCase:
    student = {TAPS[0]: (rows, 2, 4, 4), TAPS[1]: (rows, 4, 2, 2), "logits": (rows, 5)}
    return MethodCase(
        term=lambda: OFAKD(student_taps=TAPS, **options),
        student=lambda seed: gaussian(seed, student),
        teacher=lambda seed: gaussian(seed + 1000, {"logits": (rows, 5), "pooled": (rows, 6)}, 3.0),
    )


def pair(seed: int, rows: int = 6, classes: int = 5, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    drawn = gaussian(seed, {"s": (rows, classes), "t": (rows, classes)}, scale)
    index = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return drawn["s"].double().requires_grad_(), drawn["t"].double(), index


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    held = {name: torch.tensor(array) for name, array in arrays.items()}
    held = {name: value.double() if value.is_floating_point() else value for name, value in held.items()}
    options = {"eps": meta["eps"], "temperature": meta["temperature"]}
    if meta.get("kind") != "projector":
        student = held["s_logits"].requires_grad_()
        loss = ofa_kd(student, held["t_logits"], held["target"], **options)
        return with_gradients({"loss": loss}, {"s_logits": student}, arrays)
    student = held["s_feat"].requires_grad_()
    theirs = {name.removeprefix("w_projector."): value for name, value in held.items() if name.startswith("w_")}
    blocks = len({name.split(".")[0] for name in theirs if ".op." in name})
    last = str(blocks + 2)  # pooling and flattening lie between
    classes, goal = theirs[f"{last}.weight"].shape
    exit_ = MapExit(student.shape[1], goal, blocks, classes).double()

    def ours(name: str) -> str:
        number, _, rest = name.partition(".")
        return f"fc.{rest}" if number == last else f"steps.{number}.{rest}"

    exit_.load_state_dict({ours(name): value for name, value in theirs.items()}, strict=False)
    logits = exit_(student)
    named = dict(exit_.named_parameters())
    free = {"s_feat": student, **{f"w_projector.{n}": named[ours(n)] for n in theirs if ours(n) in named}}
    loss = ofa_kd(logits, held["t_logits"], held["target"], **options)
    return with_gradients({"loss": loss}, free, arrays) | {"out_projected_logits": logits}


# the equation, worked out by loops


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 7),
    classes=st.integers(1, 12),
    eps=st.floats(0.2, 3),
    temperature=st.floats(0.25, 20),
    scale=st.floats(0, 30),
)
@pytest.mark.parametrize("form", ["code", "paper"])
def test_equals_the_loops(
    form: Any, seed: int, rows: int, classes: int, eps: float, temperature: float, scale: float
) -> None:
    student, teacher, index = pair(seed, rows, classes, scale)
    found = ofa_kd(student, teacher, index, eps=eps, temperature=temperature, form=form)
    arrays = student.detach().numpy(), teacher.numpy(), index.numpy()
    expected = oracle.ofa(*arrays, eps, temperature, form)
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), blocks=st.integers(0, 2), size=st.sampled_from([(4, 4), (5, 3), (2, 2)]))
def test_an_exit_equals_the_loops(seed: int, blocks: int, size: tuple[int, int]) -> None:
    torch.manual_seed(seed)
    exit_ = MapExit(2, 3, blocks, 4).double()
    for weight in exit_.parameters():
        nn.init.normal_(weight)
    feature_map = torch.randn(3, 2, *size, dtype=torch.float64)
    weights = {
        name.removeprefix("steps.") if blocks else name.replace("steps.0.", "conv."): weight.detach().numpy()
        for name, weight in exit_.named_parameters()
    }
    expected = oracle.project(feature_map.numpy(), weights)
    torch.testing.assert_close(exit_(feature_map), torch.tensor(expected))


@pytest.mark.parametrize("form", ["code", "paper"])
def test_gradcheck(form: Any) -> None:
    student, teacher, index = pair(0, 3, 4)
    assert torch.autograd.gradcheck(lambda s: ofa_kd(s, teacher, index, eps=1.5, form=form), student)


def test_gradcheck_through_the_exits() -> None:
    here = case()
    term, batch = here.built(dtype=torch.float64), here.batch()
    student, teacher = here.tensors(dtype=torch.float64)
    names = [name for name, _ in term.named_parameters()]
    places = (*TAPS, "logits")

    def loss(one: Tensor, two: Tensor, three: Tensor, *weights: Tensor) -> Tensor:
        given = (here.signals(dict(zip(places, (one, two, three), strict=True))), here.teach(teacher), batch)
        parts = torch.func.functional_call(term, dict(zip(names, weights, strict=True)), given)
        return torch.stack(list(parts.values())).sum()

    assert torch.autograd.gradcheck(loss, (*(student[tap] for tap in places), *term.parameters()), fast_mode=True)


# limits and identities


def test_at_eps_1_the_released_form_is_the_soft_cross_entropy() -> None:
    student, teacher, index = pair(1)
    found = ofa_kd(student, teacher, index, temperature=2.0)
    expected = kd(student, teacher, temperature=2.0, form="cross_entropy") / 4
    torch.testing.assert_close(found, expected)


def test_at_eps_1_the_papers_form_adds_the_task() -> None:
    student, teacher, index = pair(2)
    added = ofa_kd(student, teacher, index, form="paper") - ofa_kd(student, teacher, index)
    torch.testing.assert_close(added, F.cross_entropy(student, index))


def test_a_larger_eps_puts_more_on_the_target() -> None:
    student, teacher, index = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
    found = [ofa_kd(student, teacher, index, eps=eps, form="paper") for eps in (0.5, 1.0, 2.0)]
    assert found[0] < found[1] < found[2]
    shares = torch.stack(
        [
            torch.autograd.grad(ofa_kd(s, teacher, index, eps=e), s)[0]
            for e, s in ((eps, student.clone().requires_grad_()) for eps in (1.0, 3.0))
        ]
    )
    assert shares[1, 0, 0] < shares[0, 0, 0] < 0  # the target is pulled up harder


def test_what_stands_for_a_missing_or_soft_label() -> None:
    here = case()
    term = here.built()
    student, teacher = here.tensors()
    assert teacher is not None
    hard = torch.tensor([0, 3, 2, 4, 1, 1])
    taught = teacher["logits"].argmax(1)

    def value(target: Tensor) -> Tensor:
        return here.loss(term, student, teacher, Batch.of(torch.zeros(6, 1), target))

    soft = 0.6 * F.one_hot(hard, 5) + 0.4 / 5
    torch.testing.assert_close(value(soft), value(hard))
    torch.testing.assert_close(value(torch.full((6,), -1)), value(taught))


def test_exits_have_a_block_for_each_stage_that_is_left() -> None:
    term = case().built()
    assert isinstance(term, OFAKD)
    blocks = [head.blocks for head in term.heads if isinstance(head, MapExit)]
    assert blocks == [1, 0]
    assert [head.fc.in_features for head in term.heads if isinstance(head, MapExit)] == [6, 6]
    wide = MapExit(4, 50, 3, 2)
    assert [len(wide.get_parameter(f"steps.{n}.op.5.weight")) for n in range(3)] == [8, 16, 50]


def test_the_number_and_the_width_of_exits() -> None:
    parts = case(exits=1, width=9).outcome(case(exits=1, width=9).built(), *case().tensors(), case().batch()).parts
    assert list(parts) == ["exit1", "final"]
    term = case(exits=1, width=9).built()
    assert isinstance(term, OFAKD)
    assert term.names == ("stages[1]",)
    assert [tap.where for tap in term.reads.teacher] == ["logits"]
    assert term.heads[0].get_parameter("fc.weight").shape == (5, 9)


def test_an_exponent_for_each_exit() -> None:
    here = case(eps=(1.0, 1.5, 2.0))
    student, teacher = here.tensors()
    parts = here.outcome(here.built(), student, teacher, here.batch()).parts
    for number, eps in enumerate((1.0, 1.5, 2.0)):
        other = case(eps=eps)
        same = list(other.outcome(other.built(), student, teacher, other.batch()).parts.values())[number]
        torch.testing.assert_close(list(parts.values())[number], same)


def test_a_teacher_of_another_kind_in_a_run() -> None:
    student = load({"model": "tutelage:resnet8", "width": 0.25}, num_classes=5, in_channels=1, seed=0)
    spec = {"model": "timm:vit_tiny_patch16_224", "img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 2}
    teacher = load({**spec, "num_heads": 2}, num_classes=5, in_channels=1, seed=1)
    batch = Batch.of(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, -1, 3]))
    term = OFAKD()
    machine = Distiller(student, Objective(ofa_kd=term), task=Classification(5), teacher=teacher, sample=batch)
    losses = machine(batch, machine.observe(batch))
    losses.total.backward()
    assert [name for name in losses.parts if "ofa" in name] == [
        *("ofa_kd.exit1", "ofa_kd.exit2", "ofa_kd.exit3", "ofa_kd.final")
    ]
    assert all(p.grad is not None for p in term.parameters())
    assert term.heads[0].get_parameter("fc.weight").shape == (5, 24)
    machine.close()


# exits of transformers


def test_a_transformers_exits() -> None:
    here = MethodCase(
        term=lambda: OFAKD(student_taps=("blocks[0]", "blocks[1]"), width=8),
        student=lambda seed: gaussian(seed, {"blocks[0]": (6, 16, 6), "blocks[1]": (6, 16, 6), "logits": (6, 5)}),
        teacher=lambda seed: gaussian(seed, {"logits": (6, 5)}),
    )
    student, teacher = here.tensors()
    term = here.built()
    here.loss(term, student, teacher, here.batch()).backward()
    assert all(p.grad is not None for p in term.parameters())
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in student.values())


@pytest.mark.parametrize(("side", "merges"), [(4, 0), (7, 0), (14, 1), (16, 2), (28, 2)])
def test_patches_are_merged_to_a_small_grid(side: int, merges: int) -> None:
    exit_ = TokenExit(6, 8, side, 3)
    assert len(exit_.merges) == merges
    assert exit_(torch.randn(2, side**2, 6)).shape == (2, 3)


def test_neighbouring_patches_are_merged() -> None:
    exit_ = TokenExit(1, 1, 14, 2)
    seen: list[Tensor] = []
    exit_.merges[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    place = torch.arange(196.0).view(1, 196, 1)
    exit_(place)
    torch.testing.assert_close(seen[0][0, 0], torch.tensor([0.0, 1.0, 14.0, 15.0]))
    torch.testing.assert_close(seen[0][0, 8], torch.tensor([30.0, 31.0, 44.0, 45.0]))


# odd cases


def test_no_rows_give_connected_zeros() -> None:
    here = case(rows=0)
    term = case().built()
    student, teacher = here.tensors()
    batch = Batch.of(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))
    loss = here.loss(term, student, teacher, batch)
    assert loss.item() == 0
    loss.backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in term.parameters())


def test_one_value_a_channel_cannot_train() -> None:
    exit_ = MapExit(2, 3, 2, 4)
    with pytest.raises(UserError, match=r"^ofa_kd: batch norm cannot train on one value a channel"):
        exit_(torch.zeros(1, 2, 4, 4))
    assert exit_.eval()(torch.zeros(1, 2, 4, 4)).isfinite().all()
    assert MapExit(2, 3, 0, 4)(torch.zeros(1, 2, 1, 1)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("eps", [0.5, 1.0, 1.5])
def test_half_precision_extremes(eps: float, form: Any, dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, -1e4]], dtype=dtype)
    index = torch.tensor([1, 0])
    loss = ofa_kd(student, teacher, index, eps=eps, form=form)
    arrays = student.detach().double().numpy(), teacher.double().numpy(), index.numpy()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(oracle.ofa(*arrays, eps, 1.0, form), rel=1e-5)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


# errors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"eps": 0}, "eps must be > 0, not 0"),
        ({"eps": (1.0, -1.0)}, "eps must be > 0, not (1.0, -1.0)"),
        ({"temperature": 0}, "temperature must be > 0, not 0"),
        ({"form": "released"}, "form 'released' is not known; valid: code, paper"),
        ({"exits": 0}, "exits is a number of stages of at least 1, not 0"),
        ({"student_taps": "map"}, "student_taps: expected a list of roles or module paths, not 'map'"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        OFAKD(**options)


def build(shape: tuple[int, ...], **options: Any) -> None:
    student = {"a": torch.zeros(shape), "logits": torch.zeros(2, 5)}
    term = OFAKD(student_taps=["a"], width=4, **options)
    term.build(Signals(None, student), Signals(None, {"logits": torch.zeros(2, 5)}), Facts())


@pytest.mark.parametrize("shape", [(2, 4), (2, 12, 4)])
def test_what_can_have_no_exit(shape: tuple[int, ...]) -> None:
    said = f"ofa_kd puts exits at maps [B, C, H, W] or a square of patch tokens [B, L, D]; 'a' is {list(shape)}"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        build(shape)


def test_exponents_for_another_number_of_exits() -> None:
    said = "ofa_kd: eps has 3 numbers; 1 exits and the student's own answer need 2"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        build((2, 4, 2, 2), eps=[1.0, 1.0, 1.0])


def test_logits_of_two_shapes() -> None:
    said = "ofa_kd compares logits of one shape: the student's are [2, 3], the teacher's [2, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ofa_kd(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
