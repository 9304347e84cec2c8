# SPDX-License-Identifier: Apache-2.0
"""Golden cases: numbers which the authors' own code produced, read from the four layouts of `tests/golden`.

`discover` looks at names and at the manifests only; the arrays of a case are read when they are asked for.
Nothing about single cases or groups is known here: any folder in the same layouts can take the place of
`tests/golden` (environment variable `TUTELAGE_GOLDEN`).
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
Meta = dict[str, Any]

DEFAULT_ROOT = Path(__file__).resolve().parent / "golden"


class GoldenError(ValueError):
    """A golden folder or file that cannot be read; the message names it."""


class Contents(NamedTuple):
    """What one case holds."""

    arrays: Arrays
    meta: Meta


@dataclass(frozen=True)
class Case:
    """One golden case. Each access to `arrays` or `meta` reads the file anew: no in-place change spreads.

    `meta` always has `group` and `case`; beyond that it has what the layout carries:

    - core: the file's JSON object (hyper-parameters and `source`);
    - classic: the hyper-parameters, and under `manifest` the case's entry (title, sources, notes, ...);
    - vision: nothing more, settings are 0-d arrays;
    - beyond: `kind`, the case kind (`queue` for the case `queue_0`); settings are 0-d arrays or strings.

    `arrays` has everything else under the layout's own names, in the stored types.
    """

    folder: str
    group: str
    name: str
    path: Path

    @property
    def id(self) -> str:
        return f"{self.folder}/{self.group}/{self.name}"

    @property
    def claim(self) -> str:
        """What a card writes in `golden` to answer for every case of this group."""
        return f"{self.folder}/{self.group}"

    def load(self) -> Contents:
        return LAYOUTS[self.folder].read(self)

    @property
    def arrays(self) -> Arrays:
        return self.load().arrays

    @property
    def meta(self) -> Meta:
        return self.load().meta


class Layout(NamedTuple):
    """How one folder stores its cases: which cases a file has, and what is in one of them."""

    find: Callable[[Path], list[Case]]
    read: Callable[[Case], Contents]


@contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    """The file as a mapping from name to array; whatever goes wrong in reading is a `GoldenError`."""
    try:
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, NpzFile):
                raise GoldenError(f"{path}: holds a single array, an .npz archive is expected")
            with stored:
                yield stored
    except GoldenError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise GoldenError(f"{path}: cannot be read as .npz without pickles ({error})") from error


def _json(path: Path, name: str, array: NDArray[Any]) -> Any:
    """The JSON text in a string array that has one element."""
    if array.size != 1 or array.dtype.kind != "U":
        raise GoldenError(f"{path}: {name} is {array.dtype} {array.shape}, one string with JSON is expected")
    try:
        return json.loads(str(array.item()))
    except json.JSONDecodeError as error:
        raise GoldenError(f"{path}: {name} is not JSON ({error})") from error


def _json_object(path: Path, name: str, array: NDArray[Any]) -> Meta:
    value = _json(path, name, array)
    if not isinstance(value, dict):
        raise GoldenError(f"{path}: {name} is not a JSON object")
    return value


def _group_and_name(path: Path, form: str) -> tuple[str, str]:
    group, _, name = path.stem.partition("__")
    if not group or not name:
        raise GoldenError(f"{path}: unknown file, {form} is expected")
    return group, name


# core: one case a file, `meta` holds JSON


def _find_core(path: Path) -> list[Case]:
    return [Case("core", *_group_and_name(path, "<group>__<case>.npz"), path)]


def _read_core(case: Case) -> Contents:
    with _opened(case.path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    if "meta" not in arrays:
        raise GoldenError(f"{case.path}: has no meta")
    meta = _json_object(case.path, "meta", arrays.pop("meta"))
    return Contents(arrays, {"group": case.group, "case": case.name, **meta})


# classic: one group a file, `manifest` lists the cases, arrays are `<case>/<array>`


def _manifest(path: Path, stored: NpzFile) -> dict[str, Meta]:
    """The manifest's entries by case, after a check that they and the arrays speak of the same cases."""
    if "manifest" not in stored.files:
        raise GoldenError(f"{path}: has no manifest")
    listed = _json(path, "manifest", stored["manifest"])
    if not isinstance(listed, list) or not all(isinstance(e, dict) and isinstance(e.get("case"), str) for e in listed):
        raise GoldenError(f"{path}: manifest is not a JSON list of objects that have a case")
    entries: dict[str, Meta] = {entry["case"]: entry for entry in listed}
    if len(entries) != len(listed):
        raise GoldenError(f"{path}: manifest lists a case twice")
    stored_cases = {name.partition("/")[0] for name in stored.files if name != "manifest"}
    if unlisted := sorted(stored_cases - set(entries)):
        raise GoldenError(f"{path}: not in the manifest: {', '.join(unlisted)}")
    if absent := sorted(set(entries) - stored_cases):
        raise GoldenError(f"{path}: in the manifest but without arrays: {', '.join(absent)}")
    return entries


def _find_classic(path: Path) -> list[Case]:
    with _opened(path) as stored:
        return [Case("classic", path.stem, name, path) for name in _manifest(path, stored)]


def _read_classic(case: Case) -> Contents:
    prefix = f"{case.name}/"
    with _opened(case.path) as stored:
        entry = _manifest(case.path, stored)[case.name]
        arrays = {name.removeprefix(prefix): stored[name] for name in stored.files if name.startswith(prefix)}
    if "hparams" not in arrays:
        raise GoldenError(f"{case.path}: has no {prefix}hparams")
    hyper_parameters = _json_object(case.path, f"{prefix}hparams", arrays.pop("hparams"))
    return Contents(arrays, {"group": case.group, "case": case.name, "manifest": entry, **hyper_parameters})


# vision: one group a file, with one case that has no name of its own


def _find_vision(path: Path) -> list[Case]:
    return [Case("vision", path.stem, "case", path)]


def _read_vision(case: Case) -> Contents:
    with _opened(case.path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Contents(arrays, {"group": case.group, "case": case.name})


# beyond: one case a file, `<system>__<case kind>_<number>.npz`


def _find_beyond(path: Path) -> list[Case]:
    form = "<system>__<case>_<number>.npz"
    system, name = _group_and_name(path, form)
    kind, _, number = name.rpartition("_")
    if not kind or not number.isdecimal():
        raise GoldenError(f"{path}: unknown file, {form} is expected")
    return [Case("beyond", system, name, path)]


def _read_beyond(case: Case) -> Contents:
    with _opened(case.path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return Contents(arrays, {"group": case.group, "case": case.name, "kind": case.name.rpartition("_")[0]})


LAYOUTS = {
    "core": Layout(_find_core, _read_core),
    "classic": Layout(_find_classic, _read_classic),
    "vision": Layout(_find_vision, _read_vision),
    "beyond": Layout(_find_beyond, _read_beyond),
}


def golden_root() -> Path:
    """The folder of the golden cases: `TUTELAGE_GOLDEN` where it is set, else `tests/golden`."""
    return Path(os.environ.get("TUTELAGE_GOLDEN") or DEFAULT_ROOT)


def golden_files(root: Path) -> list[Path]:
    """Every .npz below `root`, wherever it lies."""
    return sorted(root.rglob("*.npz"))


def discover(root: Path) -> list[Case]:
    """Every case below `root`, ordered by folder and file. Subfolders may be missing, not all of them."""
    by_folder: dict[str, list[Path]] = {folder: [] for folder in LAYOUTS}
    for path in golden_files(root):
        if path.parent.parent != root or path.parent.name not in LAYOUTS:
            raise GoldenError(f"{path}: unknown file, it lies in none of {', '.join(LAYOUTS)} directly below {root}")
        by_folder[path.parent.name].append(path)
    cases = [case for folder, paths in by_folder.items() for path in paths for case in LAYOUTS[folder].find(path)]
    if not cases:
        raise GoldenError(f"{root}: no golden cases, an .npz file in one of {', '.join(LAYOUTS)} is expected")
    return cases
