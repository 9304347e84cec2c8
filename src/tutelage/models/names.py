# SPDX-License-Identifier: Apache-2.0
"""What models there are to name."""

from collections.abc import Iterator
from fnmatch import fnmatchcase

from tutelage.models.own import ARCHITECTURES

WILD = frozenset("*?[")


def names(pattern: str = "") -> Iterator[str]:
    """Yield `kind:name` of every model that matches, this library's own first; nothing is built.

    Of transformers the types of image classifiers are named (`hf:vit`); a folder or a name of the hub may stand
    there too. A library that is not installed offers nothing.

    Args:
        pattern: part of a name, or with `*`, `?` or `[` the whole of it; `timm:` and the like ask one source.

    Example:
        >>> list(names("tutelage:resnet?"))
        ['tutelage:resnet8']
    """
    wanted = pattern.lower()
    kind, colon, _ = wanted.partition(":")
    whole = bool(WILD & set(wanted))
    for source, read in SOURCES.items():
        if colon and kind != source:
            continue
        for name in read():
            full = f"{source}:{name}"
            seen = (full if colon else name).lower()
            if fnmatchcase(seen, wanted) if whole else wanted in seen:
                yield full


def _timm() -> list[str]:
    import timm

    return list(timm.list_models())


def _torchvision() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def _transformers() -> list[str]:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS
    except ImportError:
        return []
    return sorted(KINDS)


#: Names by kind of source; each loads a library of its own.
SOURCES = {
    "tutelage": lambda: list(ARCHITECTURES),
    "timm": _timm,
    "torchvision": _torchvision,
    "hf": _transformers,
}
