# SPDX-License-Identifier: Apache-2.0
"""A model from a function in a user's own file: `python:FILE.py:FUNCTION`."""

import importlib.util
import inspect
import sys
from pathlib import Path

from torch import nn

from tutelage.core import Model
from tutelage.core.error import UserError, nearest
from tutelage.models.source import Built, Wanted


def build(wanted: Wanted) -> Built:
    """Return what the function gives: a module, or a Model.

    It is called with the options of the recipe, and with `num_classes` and `in_channels` if it takes them.

    Raises:
        UserError: if there is no such file or function, its options do not fit, or it gives something else.
    """
    path, _, name = wanted.place.rpartition(":")
    if not path or not name:
        raise UserError(f"model 'python:{wanted.place}': write python:FILE.py:FUNCTION")
    file = Path(path)
    if not file.is_file():
        raise UserError(f"model 'python:{wanted.place}': no file {file}")
    found = vars(_imported(file))
    make = found.get(name)
    if not callable(make):
        own = [word for word, value in found.items() if callable(value) and not word.startswith("_")]
        raise UserError(f"{file} has no function {name!r}{nearest(name, own)}")
    taken = inspect.signature(make).parameters
    every = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    for word in wanted.options:
        if word not in taken and not every:
            raise UserError(f"{file}:{name} takes no {word!r}{nearest(word, taken)}")
    facts = {"num_classes": wanted.num_classes, "in_channels": wanted.in_channels}
    known = {word: value for word, value in facts.items() if value is not None and word in taken}
    model = make(**{**known, **wanted.options})
    if isinstance(model, Model):
        return Built(model.module, model.input, call=model.call, class_names=model.class_names)
    if not isinstance(model, nn.Module):
        raise UserError(f"{file}:{name} gave {type(model).__name__}, not a torch.nn.Module")
    return Built(model)


def _imported(file: Path) -> object:
    """Import a file by its path, once."""
    name = f"tutelage_user_{file.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling finds classes of the file by it
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise UserError(f"{file} cannot be imported: {error}") from error
    return module
