# SPDX-License-Identifier: Apache-2.0
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tutelage.core.error import UserError
from tutelage.models.weights import fit, read


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("nest", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_are_read_as_programs_write_them(tmp_path: Path, nest: str | None, prefix: str) -> None:
    trained, fresh = network(), network()
    state: Any = {f"{prefix}{key}": tensor for key, tensor in trained.state_dict().items()}
    torch.save({nest: state, "epoch": 3, "best": 0.9} if nest else state, tmp_path / "x.pth")
    fit(fresh, read(tmp_path / "x.pth"), "x.pth")
    assert same(trained, fresh)


def test_safetensors(tmp_path: Path) -> None:
    trained, fresh = network(), network()
    save_file({f"module.{key}": tensor for key, tensor in trained.state_dict().items()}, tmp_path / "x.safetensors")
    fit(fresh, read(tmp_path / "x.safetensors"), "x")
    assert same(trained, fresh)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    torch.save({"module.weight": torch.zeros(1), "bias": torch.zeros(1)}, tmp_path / "x.pth")
    assert set(read(tmp_path / "x.pth")) == {"module.weight", "bias"}


class Trap:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Trap(str(made))}, tmp_path / "x.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Trap(str(made))))
    for name in ("x.pth", "old.pth"):
        expected = (
            f"weights: {tmp_path / name} holds more than plain tensors, and opening it could run code: refused; "
            "save a state dict or a safetensors file from the program that wrote it"
        )
        with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
            read(tmp_path / name)
        assert not made.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds more than plain tensors"):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 broken"])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"weights: {tmp_path / name} ")) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(f'weights: no file {tmp_path}/x.pth')}$"):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [{"epoch": 3}, [1, 2], {"state_dict": {"a": 1}}])
def test_a_file_without_weights_is_named(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"^{re.escape(f'weights: {tmp_path}/x.pth holds no state dict')}$"):
        read(tmp_path / "x.pth")


def test_what_does_not_fit_is_named_with_counts() -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    state = module.state_dict()
    for key in ("0.weight", "0.bias", "1.weight", "1.bias"):
        del state[key]
    state |= {"0.wieght": torch.zeros(2, 2), "2.bias": torch.zeros(5)}
    expected = (
        "weights: x.pth does not fit Sequential: 4 keys of the model are missing (0.weight, 0.bias, 1.weight, ...); "
        "1 keys are unknown (0.wieght; nearest: 0.weight); 1 have another shape (2.bias is [5], not [2])"
    )
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        fit(module, state, "x.pth")


def test_nothing_is_loaded_from_what_does_not_fit() -> None:
    module = network()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    state = {key: torch.zeros_like(tensor) for key, tensor in before.items()} | {"more": torch.zeros(1)}
    with pytest.raises(UserError, match=r"1 keys are unknown \(more\)$"):
        fit(module, state, "x")
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_counters_of_old_files_may_be_missing_and_tied_weights_stand_once() -> None:
    module = network()
    state = {key: tensor for key, tensor in module.state_dict().items() if not key.endswith("num_batches_tracked")}
    fit(network(), state, "x")
    tied = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tied[1].weight = tied[0].weight
    fit(tied, {"0.weight": torch.ones(2, 2)}, "x")
    assert torch.equal(tied.state_dict()["1.weight"], torch.ones(2, 2))
    apart = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match=r"1 keys of the model are missing \(1.weight\)"):
        fit(apart, {"0.weight": torch.ones(2, 2)}, "x")
