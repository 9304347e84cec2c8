# SPDX-License-Identifier: Apache-2.0
"""What the weights of a model are known to hold, before it is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tutelage.models import run, weights

#: Kinds that come with random weights unless some are asked for.
BLANK = ("tutelage", "timm", "torchvision")
#: Tasks whose models are not held against the number of classes: detectors pick theirs by name, poses have none.
UNCOUNTED = ("detection", "pose")


def untrained(spec: Mapping[str, Any]) -> bool:
    """Return whether a model would start from random weights; a function of one's own is taken at its word.

    Args:
        spec: a mapping as `tutelage.models.load.load` takes it.
    """
    kind, _, place = str(spec["model"]).partition(":")
    if spec.get("weights") is not None:
        return False
    return kind in BLANK or (kind == "hf" and not _whole(Path(place)))


def offered(spec: Mapping[str, Any]) -> bool:
    """Return whether the library of a model has weights for it, which `weights: pretrained` would fetch.

    Args:
        spec: a mapping as `tutelage.models.load.load` takes it.
    """
    kind, _, place = str(spec["model"]).partition(":")
    if kind == "timm":
        import timm

        return bool(timm.is_model_pretrained(place.partition(".")[0]))
    if kind == "torchvision":
        import torchvision

        return place in torchvision.models.list_models() and len(torchvision.models.get_model_weights(place)) > 0
    return False


def trained_classes(spec: Mapping[str, Any], num_classes: int, task: str | None = None) -> int | None:
    """Return how many classes a model's weights tell apart, or None where nothing is known of them.

    Args:
        spec: a mapping as `tutelage.models.load.load` takes it.
        num_classes: of the data: a file of weights is held against a model with so many outputs.
        task: what a dense model is for.

    Raises:
        UserError: if a file of weights cannot be read, or the model is unknown.
    """
    kind, _, place = str(spec["model"]).partition(":")
    given = spec.get("weights")
    if kind == "run":
        found = run.read(place)[0].get("num_classes")
        return None if found is None else int(found)
    if given == "pretrained" or (kind == "hf" and given is None):
        return _of_library(kind, place)
    if given is None:
        return None
    return _of_file(spec, str(given), num_classes, task)


def _of_library(kind: str, place: str) -> int | None:
    """Return the number of classes of a library's own weights, as its description says."""
    if kind == "timm":
        import timm

        known = timm.get_pretrained_cfg(place)
        return None if known is None else int(known.num_classes)
    if kind == "torchvision":
        import torchvision

        return len(torchvision.models.get_model_weights(place).DEFAULT.meta["categories"])
    if kind == "hf":
        from transformers import AutoConfig

        try:
            return int(AutoConfig.from_pretrained(place, local_files_only=Path(place).is_dir()).num_labels)
        except (OSError, ValueError):
            return None  # what is wrong shows when the model is loaded
    return None


def _of_file(spec: Mapping[str, Any], file: str, num_classes: int, task: str | None) -> int | None:
    """Return the number of classes of a file of weights: its size where the model's own has the data's classes."""
    from tutelage.models.load import load

    state = weights.read(file)
    own = load({**spec, "weights": None}, num_classes=num_classes, task=task).module.state_dict()
    for key in weights.heads(own, state, num_classes):
        return len(state[key])
    return num_classes


def _whole(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
