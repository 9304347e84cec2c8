# SPDX-License-Identifier: Apache-2.0
"""Image classifiers of transformers: a folder, a name of the hub, or a type built from its configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tutelage.core import InputSpec
from tutelage.core.error import UserError, nearest
from tutelage.models.source import Built, Wanted, by_channels

#: Words of a configuration that say nothing of the network, or that the classes of the data decide.
UNTOLD = frozenset(
    (
        *("model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path"),
        *("id2label", "label2id", "num_labels", "problem_type"),
    )
)


def call(module: nn.Module, inputs: Any) -> Any:
    """Return the output for images: a record with `logits`, or the scores of a model that calls them otherwise."""
    output = module(pixel_values=inputs)
    return output if "logits" in output or "last_hidden_state" not in output else output["last_hidden_state"]


def build(wanted: Wanted) -> Built:
    """Return an image classifier of transformers.

    A folder that holds weights gives them; `hf:vit` with options of the configuration needs no file. Nothing
    is fetched unless `weights: pretrained` asks for it.

    Raises:
        UserError: if transformers is not installed, the name is unknown, or the files cannot be had.
    """
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS,
        )
    except ImportError as error:
        raise UserError("hf: models need transformers: pip install 'tutelage[hf]'") from error
    name, folder = wanted.place, Path(wanted.place)
    here = folder.is_dir()
    if not here and not wanted.pretrained and name not in KINDS:
        hint = "; `weights: pretrained` fetches it from the hub" if "/" in name else nearest(name, KINDS)
        raise UserError(f"'hf:{name}' is neither a folder nor a type of image classifier{hint}")
    options: dict[str, Any] = dict(wanted.options)
    if wanted.num_classes is not None:
        options |= _labels(wanted)
    whole = wanted.pretrained or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    if wanted.in_channels is not None and not whole:
        options["num_channels"] = wanted.in_channels
    try:
        if whole:
            with _quiet():
                module = AutoModelForImageClassification.from_pretrained(
                    name, ignore_mismatched_sizes=True, local_files_only=here, **options
                )
        else:
            known = AutoConfig.from_pretrained(name, local_files_only=True, **options) if here else None
            config = known or AutoConfig.for_model(name, **options)
            kinds = KINDS.get(config.model_type)
            if isinstance(kinds, tuple) and not config.architectures:
                config.architectures = [kinds[0]]  # of several classes of one type, the first is the plain one
            module = AutoModelForImageClassification.from_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"hf:{name}: {str(error).splitlines()[0]}") from error
    module.eval()
    built = describe(module, name if whole else None, here)
    return replace(built, again=again(module)) if whole or here else built


def again(module: nn.Module) -> dict[str, Any]:
    """Return how to build a model from its configuration alone: its type, and what differs from the default."""
    config: Any = module.config
    told = {word: value for word, value in config.to_diff_dict().items() if word not in UNTOLD}
    return {"model": f"hf:{config.model_type}", "num_classes": config.num_labels, **told}


def _labels(wanted: Wanted) -> dict[str, Any]:
    assert wanted.num_classes is not None
    names = wanted.class_names or [f"LABEL_{number}" for number in range(wanted.num_classes)]
    return {"id2label": dict(enumerate(names)), "label2id": {word: number for number, word in enumerate(names)}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what transformers says of a last layer that does not fit to itself: it is what is asked for."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def describe(module: nn.Module, place: str | None, here: bool) -> Built:
    """Return what the configuration and, where there is one, the image processor say of a model."""
    config: Any = module.config
    channels = getattr(config, "num_channels", 3)
    size = getattr(config, "image_size", None)
    mean = std = (0.5,) * 3
    if place is not None:
        from transformers import AutoImageProcessor

        try:
            seen = AutoImageProcessor.from_pretrained(place, local_files_only=here)
            mean, std = tuple(seen.image_mean), tuple(seen.image_std)
        except (OSError, ValueError, TypeError, AttributeError):
            pass  # a model saved without its processor: centred pixels
    height, width = (size, size) if isinstance(size, int) else tuple(size or (224, 224))
    words = getattr(config, "id2label", None) or {}
    names = [words.get(number, f"LABEL_{number}") for number in range(len(words))]
    generic = all(word == f"LABEL_{number}" for number, word in enumerate(names))
    return Built(
        module,
        InputSpec(
            (height, width) if size else None,
            by_channels(mean, channels),
            by_channels(std, channels),
            channels,
        ),
        size=(height, width),
        call=call,
        class_names=() if generic else tuple(names),
    )
