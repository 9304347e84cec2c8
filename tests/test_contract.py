# SPDX-License-Identifier: Apache-2.0
"""What every method must keep, one function a check, over every method found on disk.

A method brings `case() -> MethodCase` in its test file. The checks that need a whole step put the case's
tensors behind a network whose answers they are, so that a real Distiller taps, compares and averages them.
At the end, broken terms show that each check can fail.
"""

import ast
import copy
import functools
import inspect
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gloo_pool import GlooPool
from golden_cases import LAYOUTS
from method_case import ROWS, MethodCase, Tensors, gaussian
from test_golden import method_tests
from tutelage.core import Batch, Card, Distiller, Draw, Live, Model, Objective, Reads, Signals, Tap, Term
from tutelage.core import ranks as processes
from tutelage.core.card import Averages
from tutelage.core.tap import ROLES, expand, is_role
from tutelage.functional.precision import full_precision
from tutelage.methods import cards, catalogue, family, find, module

ROOT = Path(__file__).resolve().parent.parent
METHODS = ROOT / "src" / "tutelage" / "methods"
HEADINGS = (
    *("Equation", "When to use, when not", "How to run", "What each number means"),
    *("Implementation details", "Results", "Citation"),
)


@dataclass(frozen=True)
class Method:
    """One method under test."""

    stem: str
    card: Card
    case: MethodCase


@functools.cache
def method(stem: str) -> Method:
    """The method of a stem; the broken ones at the end of this file are found too."""
    if stem in BROKEN:
        return BROKEN[stem]()
    tests = method_tests(stem)
    if not callable(getattr(tests, "case", None)):
        pytest.fail(f"{tests.__file__} has no case()", pytrace=False)
    return Method(stem, cards()[stem], tests.case())


Check = Callable[..., None]
CHECKS: dict[str, Check] = {}
APPLIES: dict[str, Callable[[Card], bool]] = {}


def check(applies: Callable[[Card], bool] = lambda card: True) -> Callable[[Check], Check]:
    """Make a function one of the contract's checks, for the methods whose card it applies to."""

    def add(function: Check) -> Check:
        CHECKS[function.__name__] = function
        APPLIES[function.__name__] = applies
        return function

    return add


def has_batch_norm(term: Term) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in term.modules())


def free(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def gradients(loss: Tensor, term: Term, student: Tensors) -> dict[str, Tensor]:
    """Gradients of the student's tensors and the term's parameters, by name; zeros where there is none."""
    sought = {**free(student), **{name: p for name, p in term.named_parameters() if p.requires_grad}}
    found = torch.autograd.grad(loss, list(sought.values()), allow_unused=True)
    return {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(sought.items(), found, strict=True)
    }


def assert_close(given: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float, what: str) -> None:
    assert given.keys() == expected.keys(), what
    for name, value in expected.items():
        here = f"{what}, {name}: "
        torch.testing.assert_close(given[name], value, rtol=tolerance, atol=tolerance, msg=here.__add__)


# the value


@check()
def scalar(method: Method) -> None:
    for dtype in (torch.float32, torch.float64):
        student, teacher = method.case.tensors(dtype=dtype)
        outcome = method.case.outcome(method.case.built(dtype=dtype), student, teacher, method.case.batch())
        for name, part in outcome.parts.items():
            assert part.shape == (), f"part {name} has shape {list(part.shape)}"
            assert part.dtype == dtype, f"part {name} is {part.dtype} from {dtype} signals"
            assert part.isfinite(), f"part {name} is {part.item()}"


@check()
def half_precision(method: Method) -> None:
    """Half signals are compared in float32: a term without layers says what it says of them widened."""
    case, batch = method.case, method.case.batch()
    for dtype in (torch.bfloat16, torch.float16):
        term = case.built(dtype=dtype)
        student, teacher = case.tensors(dtype=dtype)
        draws = case.draws(term, student, teacher, batch)
        loss = case.loss(term, student, teacher, batch, draws)
        assert loss.dtype == torch.float32, f"{loss.dtype} from {dtype} signals"
        assert loss.isfinite(), f"{loss.item()} from {dtype} signals"
        if not list(term.parameters()) and not case.borrowed():
            wide = [side and {name: tensor.float() for name, tensor in side.items()} for side in (student, teacher)]
            assert wide[0] is not None
            torch.testing.assert_close(loss, case.loss(term, wide[0], wide[1], batch, draws))


@check()
def autocast(method: Method) -> None:
    case, batch, term = method.case, method.case.batch(), method.case.built()
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = case.tensors(dtype=dtype)
        draws = case.draws(term, student, teacher, batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss(term, student, teacher, batch, draws)
        assert loss.dtype == torch.float32, f"{loss.dtype} under autocast from {dtype} signals"
        assert loss.isfinite(), f"{loss.item()} under autocast from {dtype} signals"
        if not list(term.parameters()) and not case.borrowed():
            torch.testing.assert_close(loss, case.loss(term, student, teacher, batch, draws))
        loss.backward()


@check()
def single_row(method: Method) -> None:
    term = method.case.built()
    if has_batch_norm(term):
        pytest.skip("batch norm cannot train on one row")
    for row in (1, 2):  # labelled, unlabelled
        student, teacher = method.case.tensors()
        batch, (one, other) = method.case.rows(torch.tensor([row]), student, teacher)
        assert one is not None
        loss = method.case.loss(term, one, other, batch)
        assert loss.isfinite(), f"{loss.item()} for a batch of one row"
        for name, grad in gradients(loss, term, student).items():
            assert grad.isfinite().all(), f"gradient of {name} for a batch of one row"


@check()
def no_labelled_rows(method: Method) -> None:
    """Without a labelled row the term is finite and connected, and zero if it averages over labelled rows."""
    case, term = method.case, method.case.built()
    student, teacher = case.tensors()
    some = case.batch()
    target = torch.full_like(some.target, -1) if some.target.ndim == 1 else torch.zeros_like(some.target)
    batch = replace(some, target=target, labelled=torch.zeros_like(some.labelled))
    outcome = case.outcome(term, student, teacher, batch)
    loss = torch.stack(list(outcome.parts.values())).sum()
    assert loss.isfinite()
    assert loss.requires_grad, "a zero that is not connected leaves DDP waiting"
    for name, grad in gradients(loss, term, student).items():
        assert grad.isfinite().all(), f"gradient of {name}"
    if method.card.averages == "labelled":
        assert loss == 0
    usual = case.outcome(term, student, teacher, some).kept
    assert outcome.kept.keys() == usual.keys(), "ranks gather what is kept together: the same names each time"
    assert not any(tensor.requires_grad for tensor in usual.values()), "what is kept is detached"


# gradients


@check()
def connected(method: Method) -> None:
    case, term = method.case, method.case.built()
    student, teacher = case.tensors()
    case.loss(term, student, teacher, case.batch()).backward()
    for name, parameter in term.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"parameter {name} is not connected"
            assert parameter.grad.isfinite().all(), f"gradient of parameter {name}"
    for name, tensor in free(student).items():
        assert tensor.grad is not None, f"the student's {name} is read but not connected"
        assert tensor.grad.isfinite().all(), f"gradient of the student's {name}"
    assert any(tensor.grad.any() for tensor in free(student).values() if tensor.grad is not None)


@check(lambda card: card.needs_teacher)
def no_teacher_gradient(method: Method) -> None:
    """Not the teacher's weights, even unfrozen; not what it lends, which is no part of the term."""
    distiller = stand_in(method)
    live = distiller.teachers["teacher"]
    assert isinstance(live, Live)
    live.model.module.requires_grad_(True)
    batch = rows_of(method, range(ROWS))
    distiller(batch, distiller.observe(batch)).total.backward()
    outside = [*live.model.module.parameters(), *(p for m in live.borrowed.values() for p in m.parameters())]
    assert outside
    assert all(parameter.grad is None for parameter in outside)
    inside = {id(parameter) for parameter in distiller.parameters()}
    assert not any(id(parameter) in inside for parameter in outside), "a lent module was registered"


@check(lambda card: not card.adversarial)
def learns(method: Method) -> None:
    """Twenty steps lower the term, also with its own layers held still, and bring the student to its teacher.

    Where student and teacher are of one shape and nothing lies between them, the teacher's own tensors must
    score better than the student's, and some measure of nearness must grow. Otherwise what was learnt must
    suit this teacher more than a stranger.
    """
    case, batch = method.case, method.case.batch()
    for layers in (True, False) if list(case.built().parameters()) else (False,):
        term = case.built()
        student, teacher = case.tensors()
        stranger = case.tensors(seed=1)[1]
        draws = case.draws(term, student, teacher, batch, step=1000)
        for _ in range(10):  # a memory is filled first: what it starts with is chance
            if kept := case.outcome(term, student, teacher, batch, draws).kept:
                term.commit(kept)

        def value(side: Tensors | None, term: Term = term, draws: Any = draws) -> float:
            with torch.no_grad():
                return case.loss(term, student, side, batch, draws).item()  # noqa: B023, called in this turn

        first, other, near = value(teacher), value(stranger), nearness(student, teacher)
        groups: list[dict[str, Any]] = [{"params": list(free(student).values())}]
        optimizer = torch.optim.Adam(groups + (term.param_groups() if layers else []), lr=0.02)
        for step in range(20):
            optimizer.zero_grad()
            now = case.draws(term, student, teacher, batch, step)
            outcome = case.outcome(term, student, teacher, batch, now)
            torch.stack(list(outcome.parts.values())).sum().backward()
            optimizer.step()
            if outcome.kept:
                term.commit(outcome.kept)
        last = value(teacher)
        assert last < first, f"the term rose from {first} to {last}"
        if alike(student, teacher) and not list(term.parameters()):
            best = case.loss(term, case.matched()[0], teacher, batch, draws).item()
            assert best < first, f"the teacher itself scores {best}, a random student {first}"
            nearer = nearness(student, teacher)
            assert any(nearer[name] > near[name] for name in near), f"farther: {near} became {nearer}"
        elif teacher:
            assert last - first < value(stranger) - other, "what was learnt suits a stranger as well"


def alike(student: Tensors, teacher: Tensors | None) -> bool:
    shared = [name for name in student if name in (teacher or {})]
    return bool(shared) and all(teacher is not None and student[n].shape == teacher[n].shape for n in shared)


def nearness(student: Tensors, teacher: Tensors | None) -> dict[str, float]:
    """Measures that grow as student and teacher agree; each forgives what some method does not look at."""
    found: dict[str, float] = {}
    for name, tensor in free(teacher or {}).items():
        if name not in student or student[name].shape != tensor.shape or tensor.ndim < 2:
            continue
        s, t = student[name].detach(), tensor
        found[f"distance {name}"] = -(s - t).square().sum().item()
        found[f"correlation {name}"] = F.cosine_similarity(centred(s), centred(t)).mean().item()
        probabilities = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)
        found[f"probabilities {name}"] = -probabilities.item()
        energies = [centred(side.square().sum(1)[:, None]) for side in (s, t)]
        found[f"energy {name}"] = F.cosine_similarity(energies[0], energies[1]).mean().item()
        grams = [(side - side.mean(0)).flatten(1) @ (side - side.mean(0)).flatten(1).T for side in (s, t)]
        found[f"kernel {name}"] = F.cosine_similarity(grams[0].flatten(), grams[1].flatten(), dim=0).item()
    return found


def centred(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    return flat - flat.mean(1, keepdim=True)


@check(lambda card: card.zero_at_teacher)
def zero_at_teacher(method: Method) -> None:
    """Up to what keeps a quotient or a root finite: such constants of published codes reach 1e-7."""
    term = method.case.built(dtype=torch.float64, matched=True)
    student, teacher = method.case.matched(dtype=torch.float64)
    loss = method.case.loss(term, student, teacher, method.case.batch())
    assert abs(loss.item()) < 1e-6, f"{loss.item()} where the student is the teacher"
    for name, grad in gradients(loss, term, student).items():
        assert grad.abs().max() < 1e-6, f"gradient of {name} where the student is the teacher"


# the batch


@check()
def batch_order(method: Method) -> None:
    case, term = method.case, method.case.built(dtype=torch.float64)
    student, teacher = case.tensors(dtype=torch.float64)
    loss = case.loss(term, student, teacher, case.batch())
    batch, (shuffled, taught) = case.rows(torch.tensor([4, 0, 3, 5, 1, 2]), student, teacher)
    assert shuffled is not None
    again = case.loss(term, shuffled, taught, batch)
    torch.testing.assert_close(again, loss, rtol=1e-9, atol=1e-9)
    assert_close(gradients(again, term, student), gradients(loss, term, student), 1e-9, "shuffled")


@check(lambda card: card.batch == "independent")
def half_batches(method: Method) -> None:
    case, term = method.case, method.case.built(dtype=torch.float64)
    if has_batch_norm(term):
        pytest.skip("batch norm couples the rows")
    student, teacher = case.tensors(dtype=torch.float64)
    whole = case.loss(term, student, teacher, case.batch())
    parts, counts = [], []
    for chosen in ([0, 1, 2, 3], [4, 5]):
        batch, (some, taught) = case.rows(torch.tensor(chosen), student, teacher)
        assert some is not None
        parts.append(case.loss(term, some, taught, batch))
        counts.append(batch.count(method.card.averages))
    weights = torch.stack(counts).double() / torch.stack(counts).sum()
    joined = (weights * torch.stack(parts)).sum()
    torch.testing.assert_close(joined, whole, rtol=1e-9, atol=1e-9)
    assert_close(gradients(joined, term, student), gradients(whole, term, student), 1e-9, "in halves")


# compiled, copied, saved


@check()
def compiled(method: Method) -> None:
    case, batch, term = method.case, method.case.batch(), method.case.built()
    student, teacher = case.tensors()
    draws = case.draws(term, student, teacher, batch)
    loss = case.loss(copy.deepcopy(term), student, teacher, batch, draws)
    torch._dynamo.reset()
    fast: Any = torch.compile(term, fullgraph=True, backend="aot_eager")
    again = case.loss(fast, student, teacher, batch, draws)
    torch.testing.assert_close(again, loss)
    eager = copy.deepcopy(term)
    slow = case.loss(eager, student, teacher, batch, draws)
    assert_close(gradients(again, term, student), gradients(slow, eager, student), 1e-5, "compiled")


@check()
def state_dict(method: Method) -> None:
    case, batch = method.case, method.case.batch()
    student, teacher = case.tensors()
    term, other = case.built(), case.built(seed=1)
    outcome = case.outcome(term, student, teacher, batch)
    if outcome.kept:
        term.commit(outcome.kept)
    other.load_state_dict(copy.deepcopy(term.state_dict()))
    draws = case.draws(term, student, teacher, batch)
    torch.testing.assert_close(
        case.loss(other, student, teacher, batch, draws), case.loss(term, student, teacher, batch, draws)
    )


@check()
def deepcopy(method: Method) -> None:
    case, batch, term = method.case, method.case.batch(), method.case.built()
    student, teacher = case.tensors()
    draws = case.draws(term, student, teacher, batch)
    copied, pickled = copy.deepcopy(term), pickle.loads(pickle.dumps(term))
    value = case.loss(term, student, teacher, batch, draws)
    with torch.no_grad():
        for tensor in (*term.parameters(), *term.buffers()):
            tensor.zero_()
    torch.testing.assert_close(case.loss(copied, student, teacher, batch, draws), value)
    torch.testing.assert_close(case.loss(pickled, student, teacher, batch, draws), value)


@check()
def forward_changes_nothing(method: Method) -> None:
    """Not a buffer (but statistics of its own batch norms), an attribute, an input, or a lent module."""
    case, batch, term = method.case, method.case.batch(), method.case.built()
    student, teacher = case.tensors()
    one, other = case.signals(student), case.teach(teacher)
    draws = term.draw(one, other, batch, Draw(case.facts.seed, 0, "case"))

    def state() -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, part in term.named_modules():
            found |= {f"{path}.{name}": value for name, value in vars(part).items() if not name.startswith("_")}
            if not isinstance(part, nn.modules.batchnorm._BatchNorm):
                found |= {f"{path}.{name}": buffer for name, buffer in part.named_buffers(recurse=False)}
            found |= {f"{path}.{name}": p for name, p in part.named_parameters(recurse=False)}
        for role, lent in (other.borrowed if other else {}).items():
            found |= {f"lent {role}.{name}": tensor for name, tensor in lent.state_dict().items()}
        found |= {f"student {name}": tensor for name, tensor in student.items()}
        return found | {f"teacher {name}": tensor for name, tensor in (teacher or {}).items()}

    before = state()
    values = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
    term(one, other, batch, *(() if draws is None else (draws,)))
    after = state()
    assert after.keys() == before.keys(), f"forward made {sorted(after.keys() ^ before.keys())}"
    for name, value in before.items():
        if name in values:
            assert torch.equal(after[name], values[name]), f"forward changed {name}"
        else:
            assert after[name] is value or after[name] == value, f"forward changed {name}"


# a real step: micro-batches and ranks


class Answers(nn.Module):
    """A network whose answers are free tensors, one row a sample; what it lends are its children."""

    def __init__(self, tensors: Tensors, lent: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = list(tensors)
        self.tables = nn.ParameterList(
            nn.Parameter(tensor.detach().clone(), tensor.is_floating_point()) for tensor in tensors.values()
        )
        self.places = nn.ModuleList(nn.Identity() for _ in tensors)
        self.lent = nn.ModuleList(lent.values())

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, table, place in zip(self.names, self.tables, self.places, strict=True):
            found[name] = place(table[rows] if table.ndim and len(table) == ROWS else table)
        return found


class Placed(Model):
    """A model that finds each tap by the name signals call it."""

    def resolve(self, tap: Tap) -> Tap:
        assert isinstance(self.module, Answers)
        return Tap(f"places.{self.module.names.index(tap.name)}")

    def expand(self, tap: Tap) -> tuple[Tap, ...]:
        assert isinstance(self.module, Answers)
        return tuple(replace(tap, where=where) for where in expand(tap.where, self.module.names))


class Squares:
    """A task for answers: keep them small. It averages over samples and reaches every tensor."""

    name = "squares"
    averages: Averages = "samples"
    headline = "size"
    provides: tuple[str, ...] = ROLES

    def call(self, model: Model, batch: Batch) -> Any:
        return model(batch.inputs)

    def logits(self, output: Any) -> Tensor | None:
        found: Tensor | None = output.get("logits")
        return found

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return torch.stack([tensor.square().mean() for tensor in free(output).values()]).sum()

    def score(self, answers: Any) -> dict[str, float]:
        raise NotImplementedError


def stand_in(method: Method) -> Distiller:
    """A Distiller in float64 whose models answer with the case's tensors; equal wherever it is built."""
    case = method.case
    student, teacher = case.tensors()
    torch.manual_seed(0)
    lent = case.borrowed()
    live = None
    if teacher is not None:
        network = Answers(teacher, lent)
        live = Live(Placed(network, modules={role: f"lent.{i}" for i, role in enumerate(lent)}))
    distiller = Distiller(
        Placed(Answers(student, {})),
        Objective(task=0.5, method=case.term()),
        task=Squares(),
        teacher=live,
        sample=rows_of(method, range(ROWS)),
        facts=case.facts,
    )
    if live is not None:
        for part in (live.model.module, *live.borrowed.values()):
            part.double()
    return distiller.double().train()


def rows_of(method: Method, rows: Sequence[int]) -> Batch:
    chosen = torch.tensor(list(rows))
    batch, _ = method.case.rows(chosen)
    return replace(batch, inputs=chosen)


@dataclass(frozen=True)
class Step:
    """What one optimizer step did: gradients by parameter, and the term's state once it committed."""

    gradients: dict[str, Tensor]
    state: dict[str, Tensor]
    batch_norm: bool


def step(stem: str, micro_batches: Sequence[Sequence[int]]) -> Step:
    """One step over micro-batches of these rows, on this rank."""
    distiller = stand_in(method(stem))
    parallel = DistributedDataParallel(distiller) if processes.world_size() > 1 else None
    batches = distiller.share([rows_of(method(stem), rows) for rows in micro_batches])
    kept = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last or parallel is None else parallel.no_sync():
            losses = (parallel or distiller)(batch, distiller.observe(batch))
            (losses.total / len(batches)).backward()
        kept.append(losses)
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in distiller.named_parameters()
        if p.requires_grad
    }
    distiller.after_step(*kept)
    term = distiller.objective.entries["method"].term
    return Step(found, term.state_dict(), has_batch_norm(term))


def step_of_rank(stem: str, by_rank: Sequence[Sequence[Sequence[int]]]) -> Step:
    return step(stem, by_rank[processes.rank()])


@check(lambda card: card.batch == "independent")
def accumulation(method: Method) -> None:
    """One batch, equal micro-batches and uneven ones give the same gradients and the same memory."""
    whole = step(method.stem, [range(ROWS)])
    if whole.batch_norm:
        pytest.skip("batch norm couples the rows")
    for cut in ([[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3], [4, 5]], [[0, 1], [2], [3], [4], [5]]):
        parts = step(method.stem, cut)
        assert_close(parts.gradients, whole.gradients, 1e-9, f"in micro-batches {cut}")
        assert_close(parts.state, whole.state, 1e-9, f"in micro-batches {cut}")


@check()
def ranks(method: Method, gloo: GlooPool) -> None:
    """Two ranks agree, and equal one process where rows are independent: also with uneven labelled counts."""
    for by_rank in ([[[0, 1], [2]], [[3], [4, 5]]], [[[0, 1, 3, 5]], [[2, 4]]]):
        one, two = gloo.run(step_of_rank, method.stem, by_rank)
        assert_close(two.gradients, one.gradients, 1e-12, f"ranks with rows {by_rank}")
        if method.card.batch == "independent" and not one.batch_norm:
            alone = step(method.stem, [[row for rank in by_rank for rows in rank for row in rows]])
            assert_close(one.gradients, alone.gradients, 1e-9, f"ranks with rows {by_rank}")
            assert_close(one.state, alone.state, 1e-9, f"memory of ranks with rows {by_rank}")
            assert_close(two.state, alone.state, 1e-9, f"memory of ranks with rows {by_rank}")


# the file


@check()
def defaults_agree(method: Method) -> None:
    """The function is called as the file, and says the same as the class where both have a default."""
    function, kind = getattr(module(method.stem), method.stem, None), find(method.stem)
    assert callable(function), f"no function {method.stem}"
    one, other = inspect.signature(function).parameters, inspect.signature(kind).parameters
    for name in one.keys() & other.keys():
        assert one[name].default == other[name].default, f"{name} differs in function and class"
    for name, parameter in other.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{name} of the class must be a keyword"


@check()
def card_well_formed(method: Method) -> None:
    card = method.card
    hints = get_type_hints(Card)
    for name in ("averages", "batch", "provenance"):
        assert getattr(card, name) in get_args(hints[name]), f"{name}: {getattr(card, name)!r}"
    labels = get_args(get_args(hints["labels"])[0])
    assert card.labels, "labels: say none if it reads no target"
    assert set(card.labels) <= set(labels), f"labels: {card.labels}"
    assert card.reads, "reads: what of the student and the teacher?"
    for side, roles in card.reads.items():
        assert side in ("student", "teacher", "borrows", "rebuild"), f"reads {side!r}"
        assert roles, f"reads no role of {side!r}"
        assert all(is_role(role) for role in roles), f"reads an unknown role: {roles}"
    assert (method.case.teacher is None) == (not card.needs_teacher), "case() and card differ on a teacher"
    for claim in card.golden:
        folder, slash, group = claim.partition("/")
        assert folder in LAYOUTS, f"golden claim {claim!r}"
        assert slash, f"golden claim {claim!r}"
        assert group, f"golden claim {claim!r}"
    assert re.fullmatch(r"(arxiv:|doi:|https://)\S+", card.paper), card.paper
    assert card.code is None or re.fullmatch(r"github:[\w.-]+/[\w.-]+@[0-9a-f]{7,40}", card.code), card.code
    for text in (card.name, card.title, card.authors, card.venue, card.claims):
        assert text.strip(), "an empty word"
    assert 1990 < card.year < 2100


@check()
def objective_well_formed(method: Method) -> None:
    objective = catalogue()[method.stem].objective
    assert method.stem in [block.get("method", label) for label, block in blocks(objective)], "not in OBJECTIVE"
    for label, block in blocks(objective):
        options = {name: value for name, value in block.items() if name not in ("method", "weight")}
        unknown = options.keys() - inspect.signature(find(block.get("method", label))).parameters.keys()
        assert not unknown - {"student", "teacher", "live"}, f"OBJECTIVE {label}: {sorted(unknown)}"


def blocks(objective: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [
        (label, given if isinstance(given, Mapping) else {"weight": given})
        for label, given in objective.items()
        if label != "task"
    ]


@check()
def documented(method: Method) -> None:
    page = ROOT / "docs" / "methods" / f"{method.stem}.md"
    assert page.is_file(), f"no page {page.name}"
    found = re.findall(r"^#+ (.+?)\s*$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert [heading for heading in found if heading in HEADINGS] == list(HEADINGS), f"headings: {found}"


# every check, every method


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        pytest.param(name, stem, id=f"{stem}-{name}")
        for stem, card in cards().items()
        for name in CHECKS
        if APPLIES[name](card)
    ],
)
def test_contract(name: str, stem: str, request: pytest.FixtureRequest) -> None:
    keep(name, method(stem), request)


def keep(name: str, method: Method, request: pytest.FixtureRequest) -> None:
    wants_pool = "gloo" in inspect.signature(CHECKS[name]).parameters
    CHECKS[name](method, *([request.getfixturevalue("gloo")] if wants_pool else []))


def holds_card(path: Path) -> bool:
    return any(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and "CARD" in [t.id for t in getattr(node, "targets", None) or [node.target] if isinstance(t, ast.Name)]  # type: ignore[union-attr]
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


def test_every_file_with_a_card_is_found() -> None:
    files = sorted(path for path in METHODS.rglob("*.py") if holds_card(path))
    assert len(files) >= 2
    assert [path.stem for path in files] == sorted(cards(), key=lambda stem: (family(stem), stem))


def test_every_method_has_tests_of_its_own_and_every_test_a_method() -> None:
    folder = Path(__file__).parent / "methods"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py"))
    assert found == sorted(f"{family(stem)}/test_{stem}.py" for stem in cards())


# each check can fail


@full_precision
def distances(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(1)


class Difference(Term):
    """A sound term; the broken ones differ from it in one thing."""

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        assert teacher is not None
        return self.rows(student, teacher).mean()

    def rows(self, student: Signals, teacher: Signals) -> Tensor:
        return distances(student.logits, teacher.logits)


class Rows(Difference):
    def forward(self, *given: Any) -> Any:
        return self.rows(given[0], given[1])


class Narrow(Difference):
    def forward(self, student: Signals, teacher: Signals | None, batch: Batch, *draws: Any) -> Any:
        assert teacher is not None
        return (student.logits - teacher.logits).square().mean()


class NoRow(Difference):
    def forward(self, *given: Any) -> Any:
        rows = self.rows(given[0], given[1])
        return rows.sum() / (len(rows) - 1)


class Unlabelled(Difference):
    def forward(self, *given: Any) -> Any:
        return self.rows(given[0], given[1])[given[2].labelled].mean()


class Loose(Difference):
    def build(self, *given: Any) -> None:
        self.layer = nn.Linear(5, 5)


class Keeper(Difference):
    @property
    def reads(self) -> Reads:
        return replace(super().reads, borrows=("classifier",))

    def build(self, student: Signals, teacher: Signals | None, facts: Any) -> None:
        assert teacher is not None
        self.classifier = teacher.borrowed["classifier"]


class Away(Difference):
    def forward(self, *given: Any) -> Any:
        return -super().forward(*given)


class Offset(Difference):
    def forward(self, *given: Any) -> Any:
        return super().forward(*given) + 1


class Ordered(Difference):
    def forward(self, *given: Any) -> Any:
        rows = self.rows(given[0], given[1])
        return (rows * torch.arange(len(rows))).mean()


class Summed(Difference):
    def forward(self, *given: Any) -> Any:
        return self.rows(given[0], given[1]).sum()


class Synchronous(Difference):
    def forward(self, *given: Any) -> Any:
        value = super().forward(*given)
        return value if value.item() > 0 else value * 2


class Forgetful(Difference):
    def build(self, *given: Any) -> None:
        self.scale = torch.rand(())

    def forward(self, *given: Any) -> Any:
        return self.scale * super().forward(*given)


class Closure(Difference):
    def build(self, *given: Any) -> None:
        layer = nn.Linear(5, 5)
        self.layer = layer
        self.through = lambda tensor: layer(tensor)

    def forward(self, *given: Any) -> Any:
        return self.through(given[0].logits.float()).square().mean()


class Counting(Difference):
    calls: Tensor

    def build(self, *given: Any) -> None:
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *given: Any) -> Any:
        self.calls += 1
        return super().forward(*given)


class Noting(Difference):
    def forward(self, *given: Any) -> Any:
        self.seen = given[0].logits
        return super().forward(*given)


class Writing(Difference):
    def forward(self, *given: Any) -> Any:
        value = super().forward(*given)
        given[1].logits.mul_(2)
        return value


CARD = Card(
    name="Difference",
    title="None",
    authors="None",
    year=2020,
    venue="None",
    paper="https://example.org",
    claims="None",
    reads={"student": ("logits",), "teacher": ("logits",)},
    zero_at_teacher=True,
)


def broken(kind: type[Term], **changed: Any) -> Callable[[], Method]:
    def make() -> Method:
        case = MethodCase(
            term=kind,
            student=lambda seed: gaussian(seed, {"logits": (ROWS, 5)}),
            teacher=lambda seed: gaussian(seed + 1000, {"logits": (ROWS, 5)}, 2.0),
            borrowed=lambda: {"classifier": nn.Linear(5, 5)} if kind is Keeper else {},
        )
        return Method(kind.__name__, replace(CARD, **changed), case)

    return make


BROKEN: dict[str, Callable[[], Method]] = {
    kind.__name__: broken(kind)
    for kind in (
        *(Difference, Rows, Narrow, NoRow, Loose, Keeper, Away, Offset, Ordered, Summed, Synchronous),
        *(Forgetful, Closure, Counting, Noting, Writing),
    )
}
BROKEN["Unlabelled"] = broken(Unlabelled, averages="labelled")
BROKEN["Unknown role"] = broken(Difference, reads={"student": ("logit",), "teacher": ("logits",)})
BROKEN["Unknown group"] = broken(Difference, golden=("elsewhere/kd",))
BROKEN["Movable code"] = broken(Difference, code="github:owner/name@main")

CAUGHT = {
    "scalar": ("Rows",),
    "half_precision": ("Narrow",),
    "single_row": ("NoRow",),
    "no_labelled_rows": ("Unlabelled",),
    "connected": ("Loose",),
    "no_teacher_gradient": ("Keeper",),
    "learns": ("Away",),
    "zero_at_teacher": ("Offset",),
    "batch_order": ("Ordered",),
    "half_batches": ("Summed",),
    "compiled": ("Synchronous",),
    "state_dict": ("Forgetful",),
    "deepcopy": ("Closure",),
    "forward_changes_nothing": ("Counting", "Noting", "Writing"),
    "accumulation": ("Summed",),
    "ranks": ("Summed",),
    "card_well_formed": ("Unknown role", "Unknown group", "Movable code"),
}


@pytest.mark.parametrize(
    ("name", "stem"),
    [pytest.param(n, stem, id=f"{stem}-{n}") for n, stems in CAUGHT.items() for stem in stems],
)
def test_a_check_catches_what_it_is_for(name: str, stem: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises((AssertionError, RuntimeError, AttributeError, pickle.PicklingError)):
        keep(name, method(stem), request)


@pytest.mark.parametrize("name", CAUGHT)
def test_a_check_lets_a_sound_term_pass(name: str, request: pytest.FixtureRequest) -> None:
    keep(name, method("Difference"), request)
