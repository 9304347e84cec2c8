# SPDX-License-Identifier: Apache-2.0
"""Weights from a file, without running anything that is in it."""

import pickle
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from tutelage.core.error import UserError

#: Entries under which training programs keep a model's weights beside other things.
NESTS = ("state_dict", "model", "model_state_dict", "net", "student")
#: Prefixes that wrappers put before every key.
WRAPPERS = ("module.", "_orig_mod.", "model.")
SHOWN = 3


class OtherClassesError(UserError):
    """Weights fit a model but for the number of classes it tells apart."""


def read(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or a state dict.

    Entries `state_dict`, `model` and the like are opened, and prefixes such as `module.` that every key has
    are taken off.

    Raises:
        UserError: if there is no such file, it is damaged, it holds no tensors, or it holds more than plain
            tensors (a pickle that could run code).
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"weights: no file {file}")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return _unwrapped(load_file(file))
        except SafetensorError as error:
            raise UserError(f"weights: {file} is no safetensors file ({error})") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it says only that reading may fail
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights: {file} holds more than plain tensors, and opening it could run code: refused; "
            "save a state dict or a safetensors file from the program that wrote it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights: {file} cannot be read ({_line(error)})") from error
    nested = found
    while isinstance(nested, Mapping) and not any(isinstance(value, Tensor) for value in nested.values()):
        inner = next((nested[name] for name in NESTS if isinstance(nested.get(name), Mapping)), None)
        if inner is None:
            break
        nested = inner
    tensors = {str(k): v for k, v in nested.items() if isinstance(v, Tensor)} if isinstance(nested, Mapping) else {}
    if not tensors:
        raise UserError(f"weights: {file} holds no state dict")
    return _unwrapped(tensors)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def heads(own: Mapping[str, Tensor], state: Mapping[str, Tensor], num_classes: int) -> list[str]:
    """Return the keys of layers that answer for another number of classes in a state than in a model.

    Args:
        own: the model's state, by key.
        state: of the file, by key.
        num_classes: of the model.
    """
    return [
        key
        for key, tensor in own.items()
        if key in state
        and tensor.ndim
        and len(tensor) == num_classes != len(state[key])
        and tensor.shape[1:] == state[key].shape[1:]
    ]


def fit(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    *,
    num_classes: int | None = None,
    fresh_head: bool = False,
) -> None:
    """Load weights into a module that they fit exactly.

    Args:
        module: takes the weights.
        state: by key.
        source: the file, for the error.
        num_classes: of the module, if known.
        fresh_head: layers that answer for another number of classes in the file keep their initial weights.

    Raises:
        UserError: naming keys that are missing, unknown or of another shape, with their counts.
    """
    own = module.state_dict()
    last = heads(own, state, num_classes) if num_classes is not None else []
    if fresh_head:
        state = {**state, **{key: own[key] for key in last}}
    given = {own[key].data_ptr() for key in own if key in state}  # a tied weight stands in a file once
    missing = [
        key
        for key, tensor in own.items()
        if key not in state and not key.endswith("num_batches_tracked") and tensor.data_ptr() not in given
    ]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys of the model are missing ({_few(missing)})")
    if unknown:
        close = get_close_matches(unknown[0], missing, n=1)
        problems.append(f"{len(unknown)} keys are unknown ({_few(unknown)}{f'; nearest: {close[0]}' if close else ''})")
    if other:
        shapes = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in other]
        problems.append(f"{len(other)} have another shape ({_few(shapes)})")
    if problems and len(problems) == bool(other) and set(other) == set(last):
        raise OtherClassesError(
            f"weights: {source} are for {len(state[last[0]])} classes, and {num_classes} are wanted; "
            "`head: fresh` keeps the rest and starts the last layer anew"
        )
    if problems:
        raise UserError(f"weights: {source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _few(words: list[str]) -> str:
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")
