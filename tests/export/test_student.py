# SPDX-License-Identifier: Apache-2.0
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tiny_run import network
from tutelage.core import InputSpec, Model
from tutelage.core.error import UserError
from tutelage.export.student import Exported, example, export, kinds, require_equal
from tutelage.models.adapt import adapt

SPEC = InputSpec(mean=(0.2, 0.4, 0.6), std=(0.5, 0.3, 0.7), channels=3, bgr=True)


def colour() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def student(spec: InputSpec | None = SPEC) -> Model:
    return adapt(colour().eval(), input=spec)


class Fickle(nn.Module):
    """Answers otherwise when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        shift = 1.0 if torch.compiler.is_compiling() else 0.0
        found: Tensor = self.layer(pixels.flatten(1)) + shift
        return found


class Untraceable(nn.Module):
    """Branches on what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.sum() > 0:
            pixels = -pixels
        found: Tensor = self.layer(pixels.flatten(1))
        return found


def test_the_copy_prepares_pixels_as_the_model_does() -> None:
    model, pixels = student(), torch.rand(3, 3, 9, 9)
    made = Exported(model).eval()
    with torch.no_grad():
        assert torch.allclose(made(pixels), model(pixels), atol=1e-6)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (SPEC.mean, SPEC.std))
        by_hand = (pixels.flip(1) - mean) / std
        assert torch.allclose(Exported(model, normalised=True).eval()(by_hand), model(pixels), atol=1e-6)
    assert set(made.state_dict()) == {f"module.{name}" for name in model.module.state_dict()}


def test_the_formats_are_the_files_of_the_folder() -> None:
    assert kinds() == ["onnx", "safetensors", "torch_export"]
    with pytest.raises(UserError, match=r"^unknown format 'onx'; did you mean onnx\?$"):
        export(student(), Path("x"), "onx")


@pytest.mark.parametrize(
    ("spec", "size", "shape"),
    [
        (None, (6, 7), (2, 3, 6, 7)),
        (InputSpec(channels=1), (8, 8), (2, 1, 8, 8)),
        (InputSpec((5, 4), channels=1), (8, 8), (2, 1, 5, 4)),  # the only size it takes
    ],
)
def test_the_example_has_the_students_size(
    spec: InputSpec | None, size: tuple[int, int], shape: tuple[int, ...]
) -> None:
    made = example(student(spec), size)
    assert made.shape == shape
    assert 0 <= float(made.min()) < float(made.max()) <= 1
    assert torch.equal(made, example(student(spec), size))


def test_a_student_of_any_size_needs_one() -> None:
    with pytest.raises(UserError, match=r"^the student takes any size; say one: --size 224$"):
        example(student(), None)


def test_weights_lie_under_the_keys_of_the_users_own_module(tmp_path: Path) -> None:
    model = student()
    written = export(model, tmp_path / "deep" / "w.safetensors", "safetensors", size=(8, 8))
    found = load_file(written.path)
    assert set(found) == set(model.module.state_dict())
    fresh = colour()
    fresh.load_state_dict(found)
    assert written.difference is None
    assert written.size == written.path.stat().st_size
    assert [path.name for path in written.path.parent.iterdir()] == ["w.safetensors"]


def test_a_program_of_torch_export_answers_the_same_for_any_number_of_images(tmp_path: Path) -> None:
    model = student()
    written = export(model, tmp_path / "s.pt2", "torch_export", size=(8, 8))
    assert written.difference is not None
    assert written.difference < 1e-5
    program: Any = torch.export.load(written.path).module()
    for rows in (1, 5):
        pixels = torch.rand(rows, 3, 8, 8)
        with torch.no_grad():
            assert torch.allclose(program(pixels), model(pixels), atol=1e-5)


def test_an_onnx_file_answers_the_same_for_any_number_of_images(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = student()
    written = export(model, tmp_path / "s.onnx", "onnx", size=(8, 8))
    assert written.difference is not None
    assert written.difference < 1e-5
    session = runtime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    assert [one.name for one in (*session.get_inputs(), *session.get_outputs())] == ["pixels", "logits"]
    for rows in (1, 5):
        pixels = torch.rand(rows, 3, 8, 8)
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        with torch.no_grad():
            assert torch.allclose(torch.from_numpy(found), model(pixels), atol=1e-5)


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_a_copy_that_answers_otherwise_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=r"^f answers otherwise than the student: 1 apart at a scale of"):
        export(adapt(Fickle(), input=InputSpec(channels=1)), tmp_path / "f", kind, size=(2, 2))
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_a_network_that_cannot_be_traced(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    with pytest.raises(UserError, match=r"^the student cannot be exported") as error:
        export(adapt(Untraceable(), input=InputSpec(channels=1)), tmp_path / "u", kind, size=(2, 2))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["onnxruntime", "onnxscript"])
def test_onnx_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in ("onnxruntime", "onnxscript"):
        if other != name:
            pytest.importorskip(other)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"^ONNX needs {name}: pip install 'tutelage\[onnx\]'$"):
        export(student(), tmp_path / "s.onnx", "onnx", size=(8, 8))


def test_what_rounding_explains_is_no_difference() -> None:
    expected = torch.tensor([1000.0, -3.0])
    assert require_equal([expected + 0.05], [expected], Path("x")) == pytest.approx(0.05, rel=1e-2)
    with pytest.raises(
        UserError, match=r"^x answers otherwise than the student: 0.2 apart at a scale of 1e\+03; it was removed$"
    ):
        require_equal([expected + 0.2], [expected], Path("x"))
    with pytest.raises(UserError):
        require_equal([expected, torch.tensor([float("nan"), 0.0])], [expected, expected], Path("x"))
    with pytest.raises(UserError):
        require_equal([expected[:1]], [expected], Path("x"))
    assert require_equal([expected[:0]], [expected[:0]], Path("x")) == 0


def test_the_student_is_in_eval_mode_when_it_is_written(tmp_path: Path) -> None:
    model = adapt(network(4, seed=0, dropout=0.9), input=InputSpec(channels=1))
    model.module.train()
    assert export(model, tmp_path / "s.pt2", "torch_export", size=(8, 8)).difference == pytest.approx(0, abs=1e-5)
