# SPDX-License-Identifier: Apache-2.0
"""Every method against the golden cases of the groups that its card claims, and every other file that claims some.

A method whose card says `golden=("core/kd", "classic/kd")` has in its test file

    def golden(claim: str, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> dict[str, Value]: ...

which is called once for every case of these groups, whatever root the cases come from. `arrays` are numpy
arrays in their stored types (float32 inputs stay float32: convert them to float64 first), `meta` is described
at `golden_cases.Case`. The answer maps names of the case's arrays to what the method computes for them:
floats, numpy arrays or tensors, at float64 unless the name ends in `_f32`.

Every `loss*` and every gradient `grad_*` or `grad.*` must be in the answer, except the float32 runs
(`*_f32`), the readings of other sources (`alt_*` and their gradients `grad_*__alt_*`), and what the test
file's optional `GOLDEN_SKIPS: dict[str, str]` lists: a pattern for names, and the reason. Whatever is in the
answer is compared.

What is no method (a model, a task, an engine) claims groups in its own test file: a literal

    GOLDEN = ("core/rtmcc_head",)

beside `golden()` anywhere under `tests`; it is read without importing the file.
"""

import ast
import functools
import importlib.util
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from golden_cases import DEFAULT_ROOT, Arrays, Case, discover, golden_files, golden_root
from tutelage.methods import cards, family

Value = float | NDArray[Any] | torch.Tensor

TESTS = Path(__file__).resolve().parent
SHORTEST_REASON = 15

ROOT = golden_root()
CASES = discover(ROOT)


def own_claims(path: Path) -> tuple[str, ...]:
    """The literal `GOLDEN` of a test file, or nothing."""
    text = path.read_text(encoding="utf-8")
    if "\nGOLDEN = " not in text:
        return ()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    named = (node.value for node in nodes if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "GOLDEN")
    return tuple(ast.literal_eval(next(named)))


#: The test file that answers for each owner of claims: a method's stem, or the file's own place.
FILES = {stem: TESTS / "methods" / family(stem) / f"test_{stem}.py" for stem in cards()}
OTHERS = {path.relative_to(TESTS).with_suffix("").as_posix(): path for path in sorted(TESTS.rglob("test_*.py"))}
CLAIMS = [(stem, claim) for stem, card in cards().items() for claim in card.golden]
CLAIMS += [(place, claim) for place, path in OTHERS.items() for claim in own_claims(path)]


# tolerances, as the README of each folder states them


class Tolerance(NamedTuple):
    """How far an answer may lie from the stored number: |error| <= absolute + relative * |stored|."""

    relative: float
    absolute: float


TOLERANCES = {
    "core": Tolerance(1e-9, 1e-12),
    "classic": Tolerance(1e-9, 1e-12),
    "vision": Tolerance(1e-9, 1e-10),
    "beyond": Tolerance(1e-9, 1e-12),
}
WIDER_TOLERANCES = [  # claim, array; the last line that fits holds
    ("classic/*", "*grad[_.]*", Tolerance(1e-7, 1e-12)),
    ("core/fgd", "*", Tolerance(1e-7, 1e-12)),
    ("core/dkd", "*", Tolerance(1e-7, 1e-12)),
    ("core/mgd_seg_distiller", "*", Tolerance(1e-7, 1e-12)),
    ("core/simcc_kl", "*", Tolerance(1e-7, 1e-12)),
    ("core/dwpose_kd", "*", Tolerance(1e-7, 1e-12)),
    ("core/dwpose_stage*", "*", Tolerance(1e-7, 1e-12)),
    ("core/simcc_codec", "*", Tolerance(1e-9, 1e-6)),
    ("core/simcc_dark", "*", Tolerance(1e-4, 1e-4)),
    ("core/dwpose_inference", "warp_matrix", Tolerance(1e-9, 1e-3)),
    ("core/dwpose_inference", "network_input_hwc*", Tolerance(1e-9, 1 / 57.12)),  # one grey level / std
    ("vision/univitar*", "*", Tolerance(1e-6, 1e-6)),  # rotary table and RMS norm ran in float32
    ("vision/lpld*", "*", Tolerance(1e-6, 1e-6)),  # boxes were decoded in float32
    ("beyond/krr_st", "*grad[_.]*", Tolerance(1e-6, 1e-12)),
    ("beyond/infer", "perturbation_final", Tolerance(1e-5, 1e-5)),  # optimised in float32
    ("beyond/infer", "stored_images", Tolerance(1e-5, 1e-5)),
]
FLOAT32_RUN = Tolerance(1e-4, 1e-6)
FLOAT32_STORED = Tolerance(1e-6, 1e-6)


def is_gradient(name: str) -> bool:
    return fnmatchcase(name, "*grad[_.]*")


def tolerance(claim: str, name: str, stored: NDArray[Any]) -> Tolerance:
    if name.endswith("_f32"):
        return FLOAT32_RUN
    found = TOLERANCES[claim.partition("/")[0]]
    for claims, names, wider in WIDER_TOLERANCES:
        if fnmatchcase(claim, claims) and fnmatchcase(name, names):
            found = wider
    if stored.dtype == np.float32:
        return Tolerance(max(found.relative, FLOAT32_STORED.relative), max(found.absolute, FLOAT32_STORED.absolute))
    return found


# one answer against one case


def must_be_answered(name: str) -> bool:
    if name.endswith("_f32") or "__alt_" in name:
        return False
    return name.startswith(("loss", "grad_", "grad."))


def as_array(value: Any) -> NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return np.asarray((value.double() if value.is_floating_point() else value).numpy())
    return np.asarray(value)


def deviation(claim: str, name: str, value: Any, stored: NDArray[Any]) -> str | None:
    """What is wrong with `value`, in words; `None` if it agrees with the stored array."""
    answer = as_array(value)
    if answer.dtype.kind == "O":
        return f"{name}: {type(value).__name__} is neither a number nor an array nor a tensor"
    if answer.shape != stored.shape:
        return f"{name}: shape {answer.shape}, the case holds {stored.shape}"
    if stored.dtype.kind != "f":  # indices, masks, words
        wrong = int(np.count_nonzero(answer != stored))
        return f"{name}: {wrong} of {stored.size} elements differ" if wrong else None
    if answer.dtype.kind not in "fiub":
        return f"{name}: {answer.dtype} where the case holds {stored.dtype}"
    answer, expected = answer.astype(np.float64), stored.astype(np.float64)
    finite = np.isfinite(expected)
    if not np.array_equal(answer[~finite], expected[~finite], equal_nan=True) or not np.isfinite(answer[finite]).all():
        return f"{name}: not finite in other places than the case"
    if not finite.any():
        return None
    allowed = tolerance(claim, name, stored)
    size = np.abs(expected[finite])
    if is_gradient(name) or name.endswith("_f32"):
        size = np.full_like(size, size.max())
    error = np.abs(answer[finite] - expected[finite])
    excess = error / (allowed.absolute + allowed.relative * size)
    worst = int(excess.argmax())
    if excess[worst] <= 1:
        return None
    places = f"{np.count_nonzero(excess > 1)} of {stored.size} elements"
    return (
        f"{name}: {float(answer[finite][worst])!r} where the case holds {float(expected[finite][worst])!r} "
        f"(error {error[worst]:.3g}, {excess[worst]:.3g} times what is allowed; "
        f"relative {allowed.relative:g}, absolute {allowed.absolute:g}; {places})"
    )


def complaints(claim: str, answer: Any, given: Arrays, stored: Arrays, skips: dict[str, str]) -> list[str]:
    """Everything that is wrong with what `golden` returned for one case, in words.

    `given` are the very arrays that `golden` was handed, `stored` a second reading of the file.
    """
    if not isinstance(answer, dict) or not answer:
        return [f"golden() returned {answer!r}, a mapping from the case's names to values is expected"]
    found = [
        f"GOLDEN_SKIPS[{pattern!r}]: {reason!r} is no reason (at least {SHORTEST_REASON} characters)"
        for pattern, reason in skips.items()
        if len(reason.strip()) < SHORTEST_REASON
    ]
    for name, value in answer.items():
        if name not in stored:
            found.append(f"{name}: the case holds no such array")
        elif value is None:
            found.append(f"{name}: None")
        elif np.may_share_memory(as_array(value), given[name]):
            found.append(f"{name}: the answer is the case's own array")
        elif problem := deviation(claim, name, value, stored[name]):
            found.append(problem)
    skipped = [name for name in stored if any(fnmatchcase(name, pattern) for pattern in skips)]
    found += [
        f"{name}: not answered (and not in GOLDEN_SKIPS)"
        for name in stored
        if must_be_answered(name) and name not in answer and name not in skipped
    ]
    return found


# every claim of every card


@functools.cache
def method_tests(stem: str) -> ModuleType:
    """The owner's test file, as pytest has imported it or imported here."""
    path = FILES.get(stem) or OTHERS[stem]
    if not path.is_file():
        pytest.fail(f"{path} is missing, and the card of {stem} claims golden cases", pytrace=False)
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("__file__") == str(path):
            return module
    spec = importlib.util.spec_from_file_location(f"golden_{stem.replace('/', '_')}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def claimed_cases() -> list[Any]:
    by_claim: dict[str, list[Case]] = {}
    for case in CASES:
        by_claim.setdefault(case.claim, []).append(case)
    return [
        pytest.param(stem, case, id=f"{stem}-{case.id}") for stem, claim in CLAIMS for case in by_claim.get(claim, [])
    ]


@pytest.mark.parametrize(("stem", "case"), claimed_cases())
def test_golden(stem: str, case: Case) -> None:
    module = method_tests(stem)
    if not callable(getattr(module, "golden", None)):
        pytest.fail(f"the card of {stem} claims {case.claim}, but {module.__file__} has no golden()", pytrace=False)
    given, meta = case.load()
    answer = module.golden(case.claim, dict(given), meta)
    problems = complaints(case.claim, answer, given, case.arrays, getattr(module, "GOLDEN_SKIPS", {}))
    if problems:
        pytest.fail("\n".join([f"{stem} disagrees with {case.id} ({case.path.name})", *problems]), pytrace=False)


def test_a_claim_is_made_once_and_names_a_group_that_exists() -> None:
    repeated = [f"{stem}: {claim}" for (stem, claim), times in Counter(CLAIMS).items() if times > 1]
    assert "core/simcc_codec" in {claim for place, claim in CLAIMS if place in OTHERS}
    assert not repeated
    if ROOT.resolve() == DEFAULT_ROOT:
        groups = {case.claim for case in CASES}
        unknown = [f"{stem}: {claim}" for stem, claim in CLAIMS if claim not in groups]
        assert not unknown


def test_groups_not_covered(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    claimed = {claim for _, claim in CLAIMS}
    left = Counter(case.claim for case in CASES if case.claim not in claimed)
    record_property("golden_cases", len(CASES))
    record_property("golden_groups_not_covered", " ".join(left))
    with capsys.disabled():
        groups = len({case.claim for case in CASES})
        print(
            f"\ngolden: {len(left)} of {groups} groups not covered ({left.total()} of {len(CASES)} cases)",
            end="",
        )
        print(":" if left else "", " ".join(left))


def test_every_file_has_a_case() -> None:
    assert {case.path for case in CASES} == set(golden_files(ROOT))
    assert len({case.id for case in CASES}) == len(CASES)


# the comparison itself

STORED = {
    "s_logits": np.ones((2, 3), np.float32),
    "loss": np.array(2.0),
    "loss_f32": np.array(2.0, np.float32),
    "loss_part": np.array([1.0, 0.0]),
    "alt_other": np.array(7.0),
    "grad_s_logits": np.array([[1e-12, 1.0, 2.0]] * 2),
    "grad_s_logits__alt_other": np.ones((2, 3)),
    "out_order": np.array([2, 0, 1]),
}
RIGHT: dict[str, Any] = {
    "loss": 2.0,
    "loss_part": np.array([1.0, 0.0]),
    "grad_s_logits": torch.tensor([[0.0, 1.0, 2.0]] * 2, dtype=torch.float64, requires_grad=True),
}


def complaints_about(change: dict[str, Any], skips: dict[str, str] | None = None, claim: str = "core/any") -> str:
    answer = {name: value for name, value in {**RIGHT, **change}.items() if value is not ...}
    return "\n".join(complaints(claim, answer, STORED, {n: a.copy() for n, a in STORED.items()}, skips or {}))


def test_the_right_answer_is_accepted() -> None:
    more = {"alt_other": 7, "out_order": torch.tensor([2, 0, 1]), "loss_f32": np.float32(2.0001)}
    assert complaints_about(more) == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"loss": ...}, "loss: not answered", id="missing loss"),
        pytest.param({"grad_s_logits": ...}, "grad_s_logits: not answered", id="missing gradient"),
        pytest.param({"loss_other": 1.0}, "loss_other: the case holds no such array", id="unknown name"),
        pytest.param({"loss": 2.0 + 1e-8}, "times what is allowed", id="wrong loss"),
        pytest.param({"loss": None}, "loss: None", id="none"),
        pytest.param({"loss": [2.0]}, "loss: shape (1,), the case holds ()", id="shape"),
        pytest.param({"loss": float("nan")}, "loss: not finite", id="nan"),
        pytest.param({"loss": float("inf")}, "loss: not finite", id="infinite"),
        pytest.param({"loss": "2.0"}, "loss: <U3 where the case holds float64", id="word"),
        pytest.param({"loss": object()}, "loss: object is neither", id="object"),
        pytest.param({"loss_part": np.array([1.0, 1e-11])}, "1 of 2 elements", id="elementwise"),
        pytest.param({"grad_s_logits": np.array([[0, 1, 2.0 + 1e-8]] * 2)}, "2 of 6 elements", id="gradient"),
        pytest.param({"out_order": np.array([2, 1, 0])}, "out_order: 2 of 3 elements differ", id="indices"),
        pytest.param({"loss_f32": 2.001}, "loss_f32:", id="float32 run"),
        pytest.param({"loss": STORED["loss"]}, "loss: the answer is the case's own array", id="echo"),
        pytest.param({"loss_part": torch.from_numpy(STORED["loss_part"])}, "own array", id="echoed tensor"),
    ],
)
def test_a_wrong_answer_is_named(change: dict[str, Any], said: str) -> None:
    assert said in complaints_about(change)


@pytest.mark.parametrize("answer", [None, {}, 2.0])
def test_no_answer_is_a_complaint(answer: Any) -> None:
    assert complaints("core/any", answer, STORED, STORED, {})[0].startswith("golden() returned")


def test_a_name_is_skipped_with_a_reason_only() -> None:
    assert complaints_about({"loss": ...}, {"los?": "not defined for a single row"}) == ""
    assert "is no reason" in complaints_about({"loss": ...}, {"loss": "later"})


def test_equal_infinities_agree() -> None:
    stored = {"loss": np.array([np.inf, np.nan, 1.0])}
    assert complaints("core/any", {"loss": stored["loss"].copy()}, stored, stored, {}) == []


def test_tolerances_follow_folder_group_and_type() -> None:
    double = np.zeros(2)
    assert tolerance("core/kd", "loss", double) == (1e-9, 1e-12)
    assert tolerance("core/kd", "loss_f32", np.zeros(2, np.float32)) == FLOAT32_RUN
    assert tolerance("core/fgd", "loss_fg", double).relative == 1e-7
    assert tolerance("classic/kd", "loss", double).relative == 1e-9
    assert tolerance("classic/kd", "grad_s_logits", double).relative == 1e-7
    assert tolerance("vision/pela", "x", double) == (1e-9, 1e-10)
    assert tolerance("vision/pela", "x", np.zeros(2, np.float32)) == FLOAT32_STORED
    assert tolerance("beyond/krr_st", "outer_loss", double).relative == 1e-9
    assert tolerance("beyond/krr_st", "grad_x_syn", double).relative == 1e-6
