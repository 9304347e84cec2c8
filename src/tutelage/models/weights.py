# SPDX-License-Identifier: Apache-2.0
"""Weights from a file, without running anything that is in it."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tutelage.core.error import UserError, nearest

#: Entries under which training programs keep a model's weights beside other things.
NESTS = ("state_dict", "model", "model_state_dict", "net", "student")
#: Prefixes that wrappers put before every key.
WRAPPERS = ("module.", "_orig_mod.", "model.")
SHOWN = 3


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
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"weights: {file} holds more than plain tensors, and opening it could run code: refused; "
            "save a state dict or a safetensors file from the program that wrote it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights: {file} cannot be read ({str(error).splitlines()[0]})") from error
    nested = found
    while isinstance(nested, Mapping) and not any(isinstance(value, Tensor) for value in nested.values()):
        inner = next((nested[name] for name in NESTS if isinstance(nested.get(name), Mapping)), None)
        if inner is None:
            break
        nested = inner
    tensors = (
        {str(k): v for k, v in nested.items() if isinstance(v, Tensor)} if isinstance(nested, Mapping) else {}
    )
    if not tensors:
        raise UserError(f"weights: {file} holds no state dict")
    return _unwrapped(tensors)


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def fit(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights into a module that they fit exactly.

    Args:
        module: takes the weights.
        state: by key.
        source: the file, for the error.

    Raises:
        UserError: naming keys that are missing, unknown or of another shape, with their counts.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    other = [key for key in own if key in state and own[key].shape != state[key].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} keys of the model are missing ({_few(missing)})")
    if unknown:
        hint = nearest(unknown[0], missing)
        hint = hint.removesuffix("?") if hint.startswith("; did") else ""
        problems.append(
            f"{len(unknown)} keys are unknown ({_few(unknown)}{hint.replace('; did you mean', '; nearest:')})"
        )
    if other:
        shapes = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in other]
        problems.append(f"{len(other)} have another shape ({_few(shapes)})")
    if problems:
        raise UserError(f"weights: {source} does not fit {type(module).__name__}: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def _few(words: list[str]) -> str:
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")
