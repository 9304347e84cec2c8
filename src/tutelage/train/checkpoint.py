# SPDX-License-Identifier: Apache-2.0
"""Training state on disk: one safetensors file, written whole or not at all. No pickle is written or read."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutelage.core.error import UserError
from tutelage.core.storage import write_whole

SLOT = "\u0000tensor"


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {SLOT: path}
    if isinstance(value, Mapping):
        return {"\u0000map": [[key, _pack(part, f"{path}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_pack(part, f"{path}/{n}", tensors) for n, part in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path or 'state'} holds a {type(value).__name__}: only tensors, numbers and texts are saved")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if SLOT in value:
            return tensors[value[SLOT]]
        return {key: _unpack(part, tensors) for key, part in value["\u0000map"]}
    if isinstance(value, list):
        return [_unpack(part, tensors) for part in value]
    return value


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a nested state of tensors, numbers and texts.

    Raises:
        UserError: if it cannot be written; the file that was there before is untouched.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors))
    write_whole(path, lambda partial: save_file(tensors, partial, metadata={"tree": tree}))


def load(path: Path) -> dict[str, Any]:
    """Return the state a file holds.

    Raises:
        UserError: if the file is no checkpoint, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = (file.metadata() or {})["tree"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
            return dict(_unpack(json.loads(tree), tensors))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged, or no checkpoint of this program ({error}); remove it: the run goes on from "
            "the one before, or from the start"
        ) from error


class Shelf:
    """The checkpoints of a run: newest last, the oldest dropped.

    Args:
        folder: where they lie.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def paths(self) -> list[Path]:
        """Return the checkpoints by step, newest last."""
        return sorted(self.folder.glob("step_*.safetensors"))

    def put(self, step: int, state: Mapping[str, Any]) -> None:
        """Save a state, then drop the oldest ones."""
        save(self.folder / f"step_{step:09d}.safetensors", state)
        for path in self.paths()[: -self.keep]:
            path.unlink()

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return next(reversed(self.paths()), None)


def require_fit(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Refuse a state dict that does not fit.

    Raises:
        UserError: naming the missing, unknown and misshapen keys.
    """
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    misshapen = [
        f"{key}: {list(given[key].shape)}, not {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    found = (("missing", missing), ("unknown", unexpected), ("of another shape", misshapen))
    said = [
        f"{len(keys)} {kind} ({', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''})" for kind, keys in found if keys
    ]
    if said:
        raise UserError(f"{what} does not fit: {'; '.join(said)}")


def nonfinite(state: Any, path: str = "") -> Iterator[str]:
    """Yield the place of every floating tensor of a nested state that is not finite."""
    if isinstance(state, Mapping):
        for key, part in state.items():
            yield from nonfinite(part, f"{path}/{key}" if path else str(key))
    elif isinstance(state, (list, tuple)):
        for number, part in enumerate(state):
            yield from nonfinite(part, f"{path}/{number}")
    elif isinstance(state, Tensor) and state.is_floating_point() and not bool(state.isfinite().all()):
        yield path
