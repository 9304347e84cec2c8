# SPDX-License-Identifier: Apache-2.0
import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from gloo_pool import GlooPool
from method_case import MethodCase, gaussian, gradient
from oracles import ps_kd as oracle
from tutelage.core import Batch, Distiller, Draw, Facts, Objective, Signals, ranks
from tutelage.core.error import UserError
from tutelage.core.term import Outcome
from tutelage.methods.online.ps_kd import PSKD, mixing, ps_kd, soft_targets
from tutelage.tasks.classification import Classification

Arrays = dict[str, NDArray[Any]]
FACTS = Facts(num_classes=5, num_samples=100, steps_per_epoch=3, total_steps=12)
EMPTY = Signals(None, {})


def case(**options: Any) -> MethodCase:
    return MethodCase(
        term=lambda: PSKD(**options),
        student=lambda seed: gaussian(seed, {"logits": (6, 5)}),
        teacher=None,
        facts=FACTS,
    )


def made(seed: int = 0, rows: int = 6, classes: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    drawn = gaussian(seed, {"student": (rows, classes), "past": (rows, classes)}, 2.0)
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    return drawn["student"].double().requires_grad_(), drawn["past"].double().softmax(1), target


# the authors' numbers


def golden(claim: str, arrays: Arrays, meta: dict[str, Any]) -> dict[str, Any]:
    """Through the term: its memory holds the answers of the epoch before, its clock says which epoch it is."""
    answer: dict[str, Any] = {}
    target = torch.tensor(arrays["target"])
    count, epoch, epochs = len(target), meta["epoch"], meta["end_epoch"]
    for suffix, dtype in (("", torch.float64), ("_f32", torch.float32)):
        student = torch.tensor(arrays["s_logits"], dtype=dtype, requires_grad=True)
        past = torch.tensor(arrays["prev_probs"], dtype=dtype)
        signals = Signals(student, {"logits": student})
        batch = Batch.of(torch.zeros(count, 1), target)
        term = PSKD(alpha=meta["alpha_T"])
        term.build(signals, None, Facts(num_samples=count, steps_per_epoch=2, total_steps=2 * epochs))
        term.to(dtype)
        if epoch:
            term.past.copy_(past)
            term.seen.fill_(True)
        share = term.draw(signals, None, batch, Draw(0, 2 * epoch + 1, "ps_kd"))
        loss = term(signals, None, batch, share).parts["ps_kd"]
        share = torch.tensor(mixing(epoch, epochs, meta["alpha_T"]), dtype=dtype)
        memory = past if epoch else F.one_hot(target, past.shape[1]).to(dtype)
        answer |= {
            f"loss{suffix}": loss,
            f"grad_s_logits{suffix}": gradient(loss, student),
            f"out_alpha_t{suffix}": share,
            f"out_soft_targets{suffix}": soft_targets(target, memory, share),
        }
    return {name: value for name, value in answer.items() if name in arrays}


# the equation, worked out by loops


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 6),
    classes=st.integers(2, 8),
    epochs=st.integers(1, 9),
    epoch=st.integers(0, 8),
    final=st.floats(0, 1),
)
def test_equals_the_loops(seed: int, rows: int, classes: int, epochs: int, epoch: int, final: float) -> None:
    student, past, target = made(seed, rows, classes)
    epoch %= epochs
    arrays = student.detach().numpy(), past.numpy(), target.numpy()
    expected = oracle.ps_kd(*arrays, epoch, epochs, final)
    share = torch.tensor(mixing(epoch, epochs, final) if epoch else 0.0, dtype=torch.float64)
    assert mixing(epoch, epochs, final) == oracle.mixing(epoch, epochs, final)
    mixed = soft_targets(target, past, share)
    torch.testing.assert_close(
        mixed, torch.tensor(oracle.soft_targets(past.numpy(), target.numpy(), epoch, epochs, final))
    )
    assert ps_kd(student, target, past, share).item() == pytest.approx(expected, rel=1e-10)


def test_gradcheck() -> None:
    student, past, target = made(2, rows=3, classes=4)
    assert torch.autograd.gradcheck(lambda s: ps_kd(s, target, past, torch.tensor(0.4)), student)


# limits and identities


def test_without_a_share_it_is_the_cross_entropy() -> None:
    student, past, target = made(3)
    torch.testing.assert_close(ps_kd(student, target, past, torch.tensor(0.0)), F.cross_entropy(student, target))


def test_with_the_whole_share_it_is_a_distillation_from_the_past() -> None:
    student, past, target = made(4)
    loss = ps_kd(student, target, past, torch.tensor(1.0))
    torch.testing.assert_close(loss, -(past * student.log_softmax(1)).sum(1).mean())
    torch.testing.assert_close(gradient(loss, student), ((student.softmax(1) - past) / 6).detach())


def test_it_is_linear_in_the_share() -> None:
    student, past, target = made(5)
    none, some, whole = (ps_kd(student, target, past, torch.tensor(a)) for a in (0.0, 0.3, 1.0))
    torch.testing.assert_close(some, 0.7 * none + 0.3 * whole)


def test_unlabelled_rows_are_skipped() -> None:
    student, past, target = made(6)
    labelled = torch.tensor([True, False, True, True, False, True])
    loss = ps_kd(student, target.where(labelled, -1), past, torch.tensor(0.5), labelled)
    torch.testing.assert_close(loss, ps_kd(student[labelled], target[labelled], past[labelled], torch.tensor(0.5)))
    assert not gradient(loss, student)[~labelled].any()


# the memory and the clock


def share(term: PSKD, step: int) -> float:
    batch = case().batch()
    return term.draw(EMPTY, None, batch, Draw(0, step, "ps_kd")).item()


def test_the_share_grows_by_the_epoch_and_is_nothing_in_the_first() -> None:
    term = case().built()
    assert isinstance(term, PSKD)
    found = [share(term, step) for step in range(12)]
    assert found == pytest.approx([0.0] * 3 + [0.4] * 3 + [0.6] * 3 + [0.8] * 3)
    assert share(term, 100) == pytest.approx(0.8)  # a run that goes on keeps the last share


def test_a_run_that_ends_within_an_epoch() -> None:
    term = PSKD(alpha=0.9)
    logits = torch.zeros(2, 5)
    term.build(Signals(logits, {"logits": logits}), None, Facts(num_samples=4, steps_per_epoch=4, total_steps=9))
    assert [share(term, step) for step in (0, 4, 8)] == pytest.approx([0.0, 0.6, 0.9])


def said(term: PSKD, logits: Tensor, index: Tensor, step: int) -> Outcome:
    signals = Signals(logits, {"logits": logits})
    batch = Batch.of(torch.zeros(len(index), 1), torch.zeros_like(index), index=index)
    outcome: Outcome = term(signals, None, batch, term.draw(signals, None, batch, Draw(0, step, "ps_kd")))
    return outcome


def test_the_past_answer_is_the_one_before_this_one() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, PSKD)
    index = torch.tensor([4, 9])
    first, second = (gaussian(seed, {"z": (2, 5)})["z"].double() for seed in (1, 2))
    term.commit(said(term, first, index, 0).kept)
    torch.testing.assert_close(term.past[index], first.softmax(1), rtol=1e-6, atol=0)
    loss = said(term, second, index, 3).parts["ps_kd"]
    expected = ps_kd(second, torch.zeros(2, dtype=torch.int64), term.past[index], torch.tensor(0.4))
    torch.testing.assert_close(loss, expected)
    assert not term.seen[[5, 8]].any()


def test_a_sample_not_met_before_has_its_label_alone() -> None:
    term = case().built(dtype=torch.float64)
    assert isinstance(term, PSKD)
    logits = gaussian(1, {"z": (2, 5)})["z"].double()
    index = torch.tensor([4, 9])
    term.commit(said(term, logits[:1], index[:1], 0).kept)
    found = said(term, logits, index, 9).parts["ps_kd"]
    target = torch.zeros(2, dtype=torch.int64)
    past = torch.stack([term.past[4], torch.full((5,), 0.2, dtype=torch.float64)])
    expected = ps_kd(logits, target, past, torch.tensor([0.8, 0.0]))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("storage", "bytes_"), [("float32", 4), ("float16", 2)])
def test_the_memory_has_the_type_asked_for(storage: Any, bytes_: int) -> None:
    term = PSKD(storage=storage)
    term.build(Signals(None, {"logits": torch.zeros(6, 5)}), None, FACTS)
    assert term.past.shape == (100, 5)
    assert term.past.element_size() == bytes_
    logits = gaussian(1, {"z": (2, 5)})["z"]
    term.commit(said(term, logits, torch.tensor([4, 9]), 0).kept)
    torch.testing.assert_close(term.past[[4, 9]].float(), logits.softmax(1), rtol=1e-3, atol=1e-3)
    assert said(term, logits, torch.tensor([4, 9]), 5).parts["ps_kd"].dtype == torch.float32


IMAGES = gaussian(3, {"x": (9, 4)})["x"]


def distiller() -> Distiller:
    torch.manual_seed(0)
    facts = Facts(num_classes=3, num_samples=9, steps_per_epoch=3, total_steps=9)
    objective = Objective(task=0.0, ps_kd=PSKD())
    return Distiller(nn.Linear(4, 3), objective, task=Classification(3), sample=batch_of(0), facts=facts)


def batch_of(number: int) -> Batch:
    index = (torch.arange(3) + 3 * number) % 9
    return Batch.of(IMAGES[index], index % 3, index=index)


def train(machine: Distiller, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(machine.param_groups(), lr=0.5)
    values = []
    for number in steps:
        losses = machine(batch_of(number))
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        machine.after_step(losses)
        values.append(losses.total.item())
    return values


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    whole, stopped, resumed = distiller(), distiller(), distiller()
    expected = train(whole, range(9))
    assert train(stopped, range(4)) == expected[:4]
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    assert train(resumed, range(4, 9)) == expected[4:]
    forgetful = distiller()
    forgetful.students.load_state_dict(copy.deepcopy(stopped.students.state_dict()))
    forgetful.step = 4
    assert train(forgetful, range(4, 9)) != expected[4:]  # the memory is what makes the difference


def on_a_rank() -> dict[str, Tensor]:
    """Two epochs, one row of three on the first rank and two on the other; the kept rows are gathered."""
    term = case().built(dtype=torch.float64)
    assert isinstance(term, PSKD)
    for step in range(2):
        outcome = said(term, gaussian(step, {"z": (3, 5)})["z"].double(), torch.tensor([4, 9, 1]), step)
        start, stop = ((0, 1), (1, 3))[distributed.get_rank()]
        term.commit({name: ranks.gather(rows[start:stop]) for name, rows in outcome.kept.items()})
    return dict(term.state_dict())


def test_memories_of_ranks_are_those_of_one_process(gloo: GlooPool) -> None:
    alone = case().built(dtype=torch.float64)
    assert isinstance(alone, PSKD)
    for step in range(2):
        alone.commit(said(alone, gaussian(step, {"z": (3, 5)})["z"].double(), torch.tensor([4, 9, 1]), step).kept)
    for state in gloo.run(on_a_rank):
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value)


# odd cases


def test_no_rows_give_a_connected_zero() -> None:
    student = torch.zeros(0, 5, requires_grad=True)
    loss = ps_kd(student, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5), torch.tensor(0.5))
    assert loss.item() == 0
    assert gradient(loss, student).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    past = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    loss = ps_kd(student, torch.tensor([2, 0]), past, torch.tensor(0.5))
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient(loss, student).isfinite().all()


# errors


def test_shapes_that_do_not_fit() -> None:
    said = "ps_kd takes one class and one past answer a row: logits are [2, 3], past answers [2, 4], targets [2]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        ps_kd(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2, 4), torch.tensor(0.5))


def test_what_it_is_built_with() -> None:
    logits = torch.zeros(2, 3)
    said = "ps_kd remembers every training sample, and needs a data set of known size"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        PSKD().build(Signals(logits, {"logits": logits}), None, Facts())
    maps = torch.zeros(2, 3, 4, 4)
    said = "ps_kd remembers answers [B, K], and the logits are [2, 3, 4, 4]"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        PSKD().build(Signals(maps, {"logits": maps}), None, FACTS)


def test_data_without_class_labels() -> None:
    term = case().built()
    batch = Batch.of(torch.zeros(2, 1), {"boxes": []})
    said = "ps_kd needs class labels, and this data has dict for a target"
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        term(Signals(None, {"logits": torch.zeros(2, 5)}), None, batch, torch.tensor(0.0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"alpha": 1.2}, "alpha is a share in [0, 1], not 1.2"),
        ({"storage": "int8"}, "storage 'int8' is not known; valid: float16, float32"),
    ],
)
def test_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        PSKD(**options)
