# SPDX-License-Identifier: Apache-2.0
import errno
import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tutelage.core.error import UserError
from tutelage.core.storage import write_text
from tutelage.train import checkpoint
from tutelage.train.checkpoint import Shelf, load, nonfinite, require_fit, save

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other and type(one) is type(other))


# --- the round trip ----------------------------------------------------------------------------------------


def test_a_nested_state_comes_back(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    state = {
        "step": 12,
        "none": None,
        "flags": [True, False],
        "text": 'a "quoted" word, ünïcode',
        "numbers": {"tiny": 1e-300, "infinite": math.inf, "negative": -3},
        "by number": {0: torch.arange(3), 1: {"deep": torch.zeros(())}},
        "half": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 5),
        "turned": weight.t(),
        "part": weight[1],
        "same": weight,
        "leaf": nn.Parameter(torch.ones(2)),
    }
    save(tmp_path / "a.safetensors", state)
    found = load(tmp_path / "a.safetensors")
    assert equal(found, {**state, "leaf": torch.ones(2)})


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adagrad"])
def test_an_optimizer_goes_on_with_the_same_bits(tmp_path: Path, name: str) -> None:
    def made() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        options = {"momentum": 0.9} if name == "SGD" else {}
        return layer, getattr(torch.optim, name)(layer.parameters(), lr=0.1, **options)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
        layer.zero_grad()
        layer(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    straight, its_optimizer = made()
    for seed in range(4):
        step(straight, its_optimizer, seed)

    first, its_first = made()
    for seed in range(2):
        step(first, its_first, seed)
    save(tmp_path / "a.safetensors", {"layer": first.state_dict(), "optimizer": its_first.state_dict()})

    second, its_second = made()
    found = load(tmp_path / "a.safetensors")
    second.load_state_dict(found["layer"])
    its_second.load_state_dict(found["optimizer"])
    for seed in range(2, 4):
        step(second, its_second, seed)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_what_is_no_plain_data_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a/0 holds a set"):
        save(tmp_path / "a.safetensors", {"a": [{1, 2}]})
    assert list(tmp_path.iterdir()) == []


# --- whole or not at all -----------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write more than so many bytes to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"a": torch.zeros(4)})
    with files_no_larger_than(4096), pytest.raises(UserError, match=r"could not write .*a\.safetensors"):
        save(path, {"a": torch.ones(4096)})
    assert equal(load(path), {"a": torch.zeros(4)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@needs_full_device
def test_a_full_disk_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    # a real device that has no room stands where the temporary file goes
    (tmp_path / ".note.txt.partial").symlink_to("/dev/full")
    with pytest.raises(UserError) as caught:
        write_text(tmp_path / "note.txt", "some words")
    assert str(caught.value) == (
        f"could not write {tmp_path}/note.txt: the disk is full; make room, then give the same command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    save(tmp_path / "a.safetensors", {"a": torch.zeros(4)})
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path / "a.safetensors", {"a": torch.ones(4)})
    assert equal(load(tmp_path / "a.safetensors"), {"a": torch.zeros(4)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"could not write .*/file/run/a.txt: Not a directory"):
        write_text(tmp_path / "file" / "run" / "a.txt", "words")


# --- what is read ------------------------------------------------------------------------------------------


def spoil_nothing(path: Path) -> None:
    path.write_bytes(b"")


def spoil_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def spoil_head(path: Path) -> None:
    path.write_bytes(b"\xff" * 16 + path.read_bytes()[16:])


def spoil_kind(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path)


def spoil_tree(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata={"tree": json.dumps([1, 2])[:-1]})


def spoil_shape(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata={"tree": "[1, 2]"})


def spoil_tensor(path: Path) -> None:
    save_file({"a": torch.zeros(2)}, path, metadata={"tree": json.dumps({checkpoint.SLOT: "b"})})


@pytest.mark.parametrize(
    "spoil", [spoil_nothing, spoil_tail, spoil_head, spoil_kind, spoil_tree, spoil_shape, spoil_tensor]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "a.safetensors"
    save(path, {"a": torch.zeros(200)})
    spoil(path)
    with pytest.raises(UserError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path} is damaged, or no checkpoint of this program (")
    assert "remove it" in str(caught.value)


def test_a_state_that_does_not_fit_names_its_keys() -> None:
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    given = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        require_fit(given, expected, "x.safetensors")
    assert str(caught.value) == (
        "x.safetensors does not fit: 1 missing (c); 1 unknown (d); 1 of another shape (b: [4], not [3])"
    )
    require_fit(expected, expected, "x.safetensors")


def test_many_keys_that_do_not_fit_are_counted_and_a_few_named() -> None:
    with pytest.raises(UserError, match=r"9 missing \(0, 1, 2, 3, \.\.\.\)$"):
        require_fit({}, {str(number): torch.zeros(1) for number in range(9)}, "x")


# --- the shelf ---------------------------------------------------------------------------------------------


def test_the_shelf_keeps_the_newest(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "checkpoints", keep=2)
    assert not shelf.paths()
    for step in (5, 10, 100, 1000):
        shelf.put(step, {"step": step})
    assert [load(path)["step"] for path in shelf.paths()] == [100, 1000]
    assert shelf.newest is not None
    assert load(shelf.newest) == {"step": 1000}


def test_half_a_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put(3, {"step": 3})
    (tmp_path / ".step_000000006.safetensors.partial").write_bytes(b"cut by a kill")
    assert [path.name for path in shelf.paths()] == ["step_000000003.safetensors"]


def test_what_is_not_finite_is_found_at_any_depth() -> None:
    nan = torch.tensor([1.0, math.nan])
    state = {"a": {"b": nan, "c": torch.arange(3)}, "d": [torch.ones(1), {0: torch.tensor(math.inf)}], "e": 1.0}
    assert list(nonfinite(state)) == ["a/b", "d/1/0"]
    assert list(nonfinite({"a": torch.ones(3), "b": None, "c": "nan"})) == []
