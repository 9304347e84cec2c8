# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tutelage.functional.precision import full_precision

seen: list[Any] = []


@full_precision
def compare(*tensors: Any, scale: float = 1.0, **named: Any) -> Tensor:
    """Sum of matrix products, so that autocast would show."""
    seen.append((tensors, named))
    flat = [
        part
        for given in (*tensors, *named.values())
        for part in (given if isinstance(given, (list, tuple)) else [given])
    ]
    found: Tensor = sum((scale * (one @ one.T).sum() for one in flat), torch.zeros(()))
    return found


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    seen.clear()


@pytest.mark.parametrize(
    ("given", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_is_widened_and_the_rest_kept(given: torch.dtype, wide: torch.dtype) -> None:
    tensor = torch.rand(3, 3).to(given)
    value = compare(tensor, [tensor, tensor], (tensor,), named=tensor)
    (one, several, alone), named = seen[0][0], seen[0][1]
    assert {part.dtype for part in (one, *several, *alone, named["named"])} == {wide}
    assert (type(several), type(alone)) == (list, tuple)
    assert value.dtype == wide
    torch.testing.assert_close(value, 5 * (tensor.to(wide) @ tensor.to(wide).T).sum())


@pytest.mark.parametrize("how", ["positional", "keyword", "list"])
def test_autocast_is_off_inside_however_tensors_are_given(how: str) -> None:
    tensor = torch.rand(3, 3) + 1e-3
    expected = compare(tensor)
    with torch.autocast("cpu", torch.bfloat16):
        assert (tensor @ tensor).dtype == torch.bfloat16
        value = {
            "positional": lambda: compare(tensor),
            "keyword": lambda: compare(named=tensor),
            "list": lambda: compare([tensor]),
        }[how]()
        assert (tensor @ tensor).dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("how", ["positional", "keyword", "list"])
def test_autocast_is_turned_off_on_the_device_of_the_tensors(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[str] = []

    @contextmanager
    def autocast(device: str, enabled: bool) -> Iterator[None]:
        assert not enabled
        devices.append(device)
        yield

    monkeypatch.setattr(torch, "autocast", autocast)
    with FakeTensorMode(allow_non_fake_inputs=True):
        far = torch.empty(3, 3, device="cuda")
        places: dict[str, list[Any]] = {"positional": [far], "keyword": [2], "list": [None, [far]]}
        named = {"named": far} if how == "keyword" else {}
        full_precision(lambda *given, **named: None)(*places[how], **named)
    assert devices == ["cuda"]


def test_other_arguments_are_left_alone() -> None:
    counts = torch.arange(3)

    @full_precision
    def keep(*given: Any) -> Any:
        return given

    assert keep(counts, None, "word", 2.0, torch.tensor([True]))[0] is counts
    assert keep(None, "word") == (None, "word")


def test_gradients_return_in_the_type_that_was_given() -> None:
    tensor = torch.rand(3, 3).bfloat16().requires_grad_()
    compare(tensor).backward()
    assert tensor.grad is not None
    assert tensor.grad.dtype == torch.bfloat16


def test_it_runs_on_the_meta_device_and_compiled() -> None:
    assert compare(torch.rand(3, 3, device="meta")).device.type == "meta"
    tensor = torch.rand(3, 3)

    @full_precision
    def product(one: Tensor) -> Tensor:
        return one @ one

    with torch.autocast("cpu", torch.bfloat16):
        fast = torch.compile(product, fullgraph=True, backend="aot_eager")(tensor)
    torch.testing.assert_close(fast, tensor @ tensor)


def test_the_function_keeps_its_name_and_words() -> None:
    assert compare.__name__ == "compare"
    assert "autocast would show" in (compare.__doc__ or "")
