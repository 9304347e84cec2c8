# SPDX-License-Identifier: Apache-2.0
"""Everything one run needs, as data: read from YAML, validated against the code, saved resolved."""

import re
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tutelage.core.error import UserError, nearest
from tutelage.core.schedule import Span

SHIPPED = Path(__file__).parent.parent / "recipes"
STORE = "stored:"  # a teacher whose answers lie in a folder
#: Sections that may be written as one word, and what the word is.
WORDS = {"task": "name", "teacher": "model", "student": "model", "data": "source", "fit": "when"}


def _length(text: str) -> str:
    Span.parse(text)
    return text


#: A length of training, such as "5 epochs" or "500 steps".
Length = Annotated[str, BeforeValidator(str), AfterValidator(_length)]


class Section(BaseModel):
    """A part of a recipe: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Open(BaseModel):
    """A part of a recipe whose further keys are options of what it names, checked by its constructor."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The further keys."""
        return dict(self.__pydantic_extra__ or {})


class Paper(Section):
    """What the recipe reproduces."""

    reference: str = ""
    table: str = ""
    notes: tuple[str, ...] = ()


class TaskSection(Open):
    """The problem: `task: classification`, or with options of its constructor."""

    name: str = "classification"


class StudentSection(Open):
    """The model that learns; further keys are options of its constructor."""

    model: str
    weights: str | None = None


class FitSection(Section):
    """How the teacher is fitted to the data first: what differs from the recipe itself.

    `when` is `always`, `auto` (if the teacher has no weights, or knows other classes) or `never` (such a teacher
    is refused); `fit: auto` is short for it.
    """

    when: Literal["always", "auto", "never"] = "always"
    data: dict[str, Any] = Field(default_factory=dict)
    optimizer: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"when": given} if isinstance(given, str) else given


class TeacherSection(StudentSection):
    """The model that knows; without `fit` it is taken as it is.

    `stored: FOLDER` stands in the place of a model, and of all that is said of it: answers that `tutelage store` has
    written. It is short for `model: "stored:FOLDER"`.
    """

    mode: Literal["eval", "batch_statistics", "train"] = "eval"
    fit: FitSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_store(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("stored") is not None:
            return {"model": f"{STORE}{given['stored']}"}
        return given

    @property
    def stored(self) -> Path | None:
        """The folder of the answers, if they come from disk."""
        return Path(self.model.removeprefix(STORE)) if self.model.startswith(STORE) else None


class LateSection(Section):
    """What is done to training images in the last `epochs` of the run, in the place of `data.augment`."""

    epochs: int = Field(ge=1)
    augment: str | list[Any] | dict[str, Any]


class DataSection(Section):
    """The samples: the words of `tutelage.data.load.Spec`, which says what they mean."""

    source: str
    labels: int | float | None = None
    label_seed: int = 0
    unlabelled: str | None = None
    validation_share: float = 0.1
    batch_size: int = Field(64, ge=1)
    labelled_per_batch: int | None = Field(None, ge=1)
    workers: int = Field(0, ge=0)
    augment: str | list[Any] | dict[str, Any] | None = None
    augment_late: LateSection | None = None
    views: dict[str, Any] = Field(default_factory=dict)
    image_size: int | tuple[int, int] | None = None
    mixup: float = Field(0.0, ge=0)
    cutmix: float = Field(0.0, ge=0)
    repeats: int = Field(1, ge=1)
    on_error: Literal["raise", "skip"] = "raise"
    channels: Literal[1, 3] = 3
    allow_duplicates: bool = False
    download: bool = False
    image_column: str | None = None
    label_column: str | None = None
    text: dict[str, Any] | None = None
    detection: dict[str, Any] | None = None
    segmentation: dict[str, Any] | None = None
    pose: dict[str, Any] | None = None


class OptimizerSection(Open):
    """The optimizer; further keys are options of its constructor."""

    name: str = "sgd"
    lr: float = Field(0.1, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    decay_norms: bool = False


class EmaSection(Section):
    """The average of the weights: `ema: 0.999` is short for its decay.

    With `ramp` the average follows the weights closely at first, and has its full length after a few ramps.
    """

    decay: float = Field(ge=0, lt=1)
    ramp: Length | None = None

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        return {"decay": given} if isinstance(given, (int, float)) else given


class TrainSection(Section):
    """The loop."""

    epochs: float | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    decay: Literal["constant", "cosine", "flat_cosine", "linear", "poly", "multistep", "exponential"] = "cosine"
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1
    power: float = Field(0.9, gt=0)
    end: float = 0.0
    warmup: Length | None = None
    accumulate: int = Field(1, ge=1)
    clip: float | None = Field(None, gt=0)
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    ema: EmaSection | None = None
    compile: bool = False
    device: str | None = None
    seed: int = 0
    log_every: int = Field(50, ge=1)
    evaluate_every: Length | None = None
    save_every: Length | None = "1 epochs"

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length once: epochs or steps")
        return self


class StageSection(Section):
    """One stage of a training: what differs from the recipe, section by section.

    A stage goes on with the student as the stage before left it. With `inherit` it starts from a new student
    that takes over only the parts named there. `previous` names the student of the stage before: as a teacher,
    and as a source of `inherit`.
    """

    name: str = ""
    task: dict[str, Any] | str | None = None
    teacher: dict[str, Any] | str | None = None
    data: dict[str, Any] = Field(default_factory=dict)
    objective: dict[str, Any] | None = None
    optimizer: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    inherit: dict[str, str] = Field(default_factory=dict)
    freeze: tuple[str, ...] = ()


class CompareSection(Section):
    """Arms compared over paired seeds: an objective each, or `stages`."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    arms: dict[str, dict[str, Any]]


class Recipe(Section):
    """One run.

    `peers` are further students by name, which learn with the first one and are kept beside it. `inherit` copies
    parts of the teacher into the student before the training, `{neck: teacher.neck}`, and `freeze` names modules of
    the student that are not trained. `stages` are run one after the other.
    """

    paper: Paper | None = None
    task: TaskSection = TaskSection()
    teacher: TeacherSection | None = None
    student: StudentSection
    peers: dict[str, StudentSection] = Field(default_factory=dict)
    data: DataSection
    inherit: dict[str, str] = Field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    objective: dict[str, Any] = Field(default_factory=lambda: {"task": 1.0})
    optimizer: OptimizerSection = Field(default_factory=lambda: OptimizerSection.model_validate({}))
    train: TrainSection
    stages: tuple[StageSection, ...] = ()
    compare: CompareSection | None = None
    expected: dict[str, dict[str, float | int | str | None]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given: Any) -> Any:
        """Accept `task: NAME`, `teacher: MODEL` and `student: MODEL`."""
        if isinstance(given, Mapping):
            given = _long(given)
        return given

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain data, every default written out."""
        return {key: value for key, value in self.model_dump(mode="json").items() if value not in (None, {}, [])}

    def text(self) -> str:
        """Return the recipe as YAML."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True, width=100)


# --- reading ---------------------------------------------------------------------------------------------

MERGE = "tag:yaml.org,2002:merge"  # of `<<`


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is written twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*([eE][-+]?\d+)|\.\d+([eE][-+]?\d+)?|\d[\d_]*\.[\d_]*)$"),
    list("-+0123456789."),
)


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Return a mapping from YAML text.

    Raises:
        UserError: naming the file, line and column of the fault.
    """
    try:
        found = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: {getattr(error, 'problem', None) or 'not YAML'}") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: a recipe is a mapping of sections")
    return found


def shipped() -> dict[str, Path]:
    """Return the recipes that come with the package, by `folder/name` or `name`."""
    return {p.relative_to(SHIPPED).with_suffix("").as_posix(): p for p in sorted(SHIPPED.rglob("*.yaml"))}


def locate(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of a shipped one.

    Raises:
        UserError: naming the nearest recipe.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    names = shipped()
    matches = [p for key, p in names.items() if name in (key, p.stem)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(f"recipe {name!r} is ambiguous: {', '.join(k for k, p in names.items() if p in matches)}")
    raise UserError(f"no recipe {name!r}{nearest(name, names)}")


def load(name: str, sets: Sequence[str] = ()) -> Recipe:
    """Return a recipe by path or name, with values changed by `section.key=value`.

    Raises:
        UserError: naming the place in the recipe and the nearest valid word.
    """
    path = locate(name)
    return parse(_based(path), sets, where=path.name)


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        UserError: if it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text" if isinstance(error, ValueError) else error.strerror
        raise UserError(f"{path} cannot be read: {reason}") from error


def _based(path: Path) -> dict[str, Any]:
    """Return a recipe's mapping laid over that of its `base`, section by section.

    A section that both have is joined key by key, one level deep. An objective replaces the base's, and so does
    a section that names another model, optimizer or task: options of one are not those of another.
    """
    found = read_yaml(read_text(path), path.name)
    if "base" not in found:
        return found
    name = str(found.pop("base"))
    beside = path.parent / (name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    try:
        base_path = beside if beside.exists() else locate(name)
    except UserError as error:
        raise UserError(f"{path.name}: base: {error}") from error
    base = read_yaml(read_text(base_path), base_path.name)
    if "base" in base:
        raise UserError(f"{path.name}: base: {name!r} has a base itself; one level only")
    return laid_over(base, found)


def laid_over(base: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping laid over another, section by section; see `_based`."""
    found, base = _long(found), _long(base)
    both = [key for key in found if isinstance(found[key], dict) and isinstance(base.get(key), dict)]
    joined = {key: {**base[key], **found[key]} for key in both if not _another(key, found[key], base[key])}
    return {**base, **found, **joined}


def _long(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's mapping with sections that were written as one word written out."""
    found = {
        key: {WORDS[key]: value} if key in WORDS and isinstance(value, str) else value for key, value in given.items()
    }
    if isinstance(peers := found.get("peers"), Mapping):
        found["peers"] = {name: {"model": peer} if isinstance(peer, str) else peer for name, peer in peers.items()}
    return found


def _another(section: str, above: Mapping[str, Any], below: Mapping[str, Any]) -> bool:
    """Whether a section of a recipe is about something else than the same section of its base."""
    if section == "objective":
        return True
    word = {"optimizer": "name", "task": "name", "teacher": "model", "student": "model"}.get(section, "")
    return word in above and word in below and above[word] != below[word]


def parse(given: Mapping[str, Any], sets: Sequence[str] = (), *, where: str = "recipe") -> Recipe:
    """Return a validated recipe from a mapping.

    Raises:
        UserError: naming the place and the nearest valid word.
    """
    changed = dict(given)
    for change in sets:
        _set(changed, change)
    try:
        recipe = Recipe.model_validate(changed)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(error, Recipe)}") from error
    return recipe


def _set(recipe: dict[str, Any], change: str) -> None:
    """Carry out one `--set a.b=value`."""
    path, equals, value = change.partition("=")
    if not equals or not path:
        raise UserError(f"--set takes section.key=value, not {change!r}")
    *parents, last = path.split(".")
    place = recipe
    for word in parents:
        below = place.get(word)
        if isinstance(below, (str, int, float)):  # the short form of a section, or a bare weight
            below = {WORDS.get(word, "weight"): below}
        if not isinstance(below, (dict, type(None))):
            raise UserError(f"--set {change}: {word} holds a list, which has no keys; set it as a whole")
        place[word] = dict(below or {})
        place = place[word]
    try:
        place[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {change}: the value is not YAML ({getattr(error, 'problem', error)})") from error


def explain(error: ValidationError, model: type[BaseModel], also: Collection[str] = ()) -> str:
    """Return the faults of a validation as one line, each with its place and the nearest valid word.

    Args:
        error: of pydantic.
        model: that refused.
        also: further words that are valid at its top.
    """
    faults: dict[str, str] = {}
    for fault in error.errors():
        words, kinds, home = _walk(model, fault["loc"])
        place = ".".join(map(str, words))
        if place not in faults:  # the branches of a union are faults of one place
            faults[place] = _said(fault, kinds, home, also if home is model else ())
    return "; ".join(f"{place}: {said}" if place else said for place, said in faults.items())


def _said(fault: Any, kinds: Sequence[Any], home: type[BaseModel] | None, also: Collection[str]) -> str:
    """Return what is wrong in words of ours."""
    given, kind = repr(fault["input"]), fault["type"]
    given = given if len(given) < 60 else f"{given[:56]} ..."
    if kind == "extra_forbidden":
        return f"unknown key{nearest(str(fault['loc'][-1]), [*(home.model_fields if home else ()), *also])}"
    if kind == "missing":
        return "missing"
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
        return f"{given} is not known{nearest(str(fault['input']), valid)}"
    if len(kinds) > 1:
        return f"{given} is none of {', '.join(getattr(one, '__name__', str(one)) for one in kinds)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"should be a section with keys, not {given}"
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "value_error":
        return str(said)
    said = said.partition(", ")[0].replace("a valid tuple", "a list")
    return f"{said[0].lower()}{said[1:]}, not {given}"


def _walk(
    model: type[BaseModel], place: Sequence[int | str]
) -> tuple[Sequence[int | str], list[Any], type[BaseModel] | None]:
    """Follow the place of a fault through the sections.

    Returns:
        The place without pydantic's names for the branches of a union, what may stand there if it is such a
        union, and the section that its last word belongs to.
    """
    home: type[BaseModel] | None = model
    for number, word in enumerate(place[:-1]):
        field = home.model_fields.get(str(word)) if home else None
        if field is None:  # inside something free, such as a list
            return place, [], None
        found = field.annotation
        kinds = list(get_args(found)) if get_origin(found) in (Union, UnionType) else [found]
        kinds = [kind for kind in kinds if kind is not type(None)]
        if len(kinds) > 1:
            return place[: number + 1], kinds, home
        home = kinds[0] if isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None
    return place, [], home
