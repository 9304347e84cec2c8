# SPDX-License-Identifier: Apache-2.0
"""Arms of one recipe over paired seeds: same initial weights, same batches, same number of updates."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from tutelage.core import Live, Shared, ranks
from tutelage.core.error import UserError
from tutelage.core.storage import write_text
from tutelage.data.load import Splits
from tutelage.data.load import load as load_data
from tutelage.functional.noise import mix
from tutelage.models.load import load as load_model
from tutelage.report.comparison import Comparison
from tutelage.report.measure import Measures
from tutelage.report.measure import table as cost_table
from tutelage.report.metric import Metric
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict
from tutelage.run.assemble import INIT, task_class, task_of, teacher_of
from tutelage.run.distill import Result, distill, distilling, rehearse, teacher_recipe
from tutelage.run.folder import RunFolder
from tutelage.run.given import NOTHING, Given
from tutelage.run.objective import build as build_objective
from tutelage.run.objective import of_methods, peers_of, rebuilds_of
from tutelage.run.page import comparison_page
from tutelage.run.recipe import Recipe, TaskSection, load, parse, read_text
from tutelage.run.resolve import resolve
from tutelage.run.stored import replay_of
from tutelage.train.lockstep import InStep, advance
from tutelage.train.runtime import Runtime

COMPARISON = "comparison.json"


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Say of a file of a comparison that it is damaged, where it does not hold what was written.

    Raises:
        UserError: in the place of whatever such a file ends in; one from within stays as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}); give the command of the comparison again") from error


@dataclass(frozen=True)
class Compared:
    """What a comparison ended with.

    Args:
        title: of its report.
        comparison: scores by arm and seed, against the first arm.
        measures: of the teacher and of each arm's student.
        runs: folders by arm and seed.
        folder: of all of them.
        left_out: why an arm could not run, by name.
    """

    title: str
    comparison: Comparison
    measures: Mapping[str, Measures]
    runs: Mapping[str, Mapping[int, Path]]
    folder: Path
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> tuple[Table, Table]:
        """What is printed and reported: scores, then size and speed."""
        return self.comparison.table(self.title), cost_table(self.measures)

    @property
    def verdict(self) -> Verdict:
        """What the differences allow to be said."""
        return self.comparison.verdict

    def markdown(self) -> str:
        """Return the tables and the verdict as Markdown."""
        said = " ".join((self.verdict.sentence, *self.verdict.details))
        return "\n\n".join((*(one.markdown() for one in self.tables), said))

    def plain(self) -> dict[str, Any]:
        """Return the comparison as plain data."""
        found = self.comparison
        return {
            "title": self.title,
            "metric": found.metric.key,
            "baseline": found.baseline,
            "teacher": found.teacher,
            "published": dict(found.published),
            "scores": {
                arm: {str(seed): value for seed, value in scores.items()} for arm, scores in found.scores.items()
            },
            "differences": {arm: vars(pairs) for arm, pairs in found.pairs.items()},
            "measures": {name: one.plain() for name, one in self.measures.items()},
            "verdict": self.verdict.sentence,
            "runs": {arm: {str(seed): path.name for seed, path in runs.items()} for arm, runs in self.runs.items()},
            "left_out": dict(self.left_out),
        }

    @classmethod
    def read(cls, folder: Path) -> "Compared":
        """Return the comparison that a folder holds.

        Raises:
            UserError: if it holds none, or a damaged one.
        """
        file = folder / COMPARISON
        with undamaged(file):
            found = json.loads(read_text(file))
            scores = {arm: {int(s): float(v) for s, v in runs.items()} for arm, runs in found["scores"].items()}
            runs = {arm: {int(s): folder / name for s, name in runs.items()} for arm, runs in found["runs"].items()}
            measures = {name: Measures(**one) for name, one in found["measures"].items()}
            metric, baseline = Metric.of(found["metric"]), found["baseline"]
            comparison = Comparison(metric, scores, baseline, found["teacher"], published=found["published"])
            return cls(found["title"], comparison, measures, runs, folder, found.get("left_out", {}))


def compare(
    arms: Mapping[str, Recipe],
    seeds: Sequence[int],
    folder: Path,
    *,
    title: str,
    quiet: bool = False,
    apart: bool = False,
    lenient: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Compared:
    """Run every arm with every seed; finished runs are not run again.

    Arms of one seed with the same data and training go side by side, step by step: each batch is loaded once, and a
    teacher that several of them have answers it once. Their bits are those of runs one after another.

    Args:
        arms: recipes by name, the baseline first; their own seeds do not count.
        seeds: each arm runs with all of them.
        folder: of the comparison; each run has a folder in it, and arms of one teacher share its fit.
        title: of the report.
        quiet: show no progress.
        apart: run one arm after another: slower, in the memory of one student.
        lenient: leave an arm out that does not fit its teacher and student, and say why.
        say: told what has run.

    Raises:
        UserError: if there is nothing to compare, or whatever is wrong with a run.
    """
    if len(arms) < 2 or not seeds:
        raise UserError("a comparison needs at least two arms and one seed")
    baseline, arms, left_out = next(iter(arms)), dict(arms), dict[str, str]()
    for name in tuple(arms):
        try:
            recipe = arms[name] = resolve(arms[name])
            if not (folder / f"{_stem(name)}-{seeds[0]}").exists():  # every arm is valid before one trains
                rehearse(recipe, Runtime(recipe.train.device, recipe.train.precision))
        except UserError as error:
            if not lenient or name == baseline:
                raise UserError(f"arm {name!r}: {error}") from error
            left_out[name] = str(error)
            del arms[name]
            say(f"{name} is left out: {error}")
    metric = Metric.of(task_of(next(iter(arms.values())).task, num_classes=2, class_names=()).headline)
    teachers: dict[str, Path] = {}
    measures: dict[str, Measures] = {}
    teacher_score = None
    results: dict[str, dict[int, Result]] = {name: {} for name in arms}
    places: dict[str, Path | None] = {}
    for seed in seeds:
        seeded: dict[str, Recipe] = {}
        for name, recipe in arms.items():
            place = None
            if recipe.teacher is not None and recipe.teacher.fit is not None:
                fit = teacher_recipe(recipe)
                number = f"-{len(teachers) + 1}" if teachers else ""
                place = teachers.setdefault(fit.text(), folder / f"teacher{number}")
                if place.name not in measures:
                    fitted = distill(fit, place, title="teacher", quiet=quiet)
                    measures[place.name] = fitted.measures
                    teacher_score = fitted.scores[metric.key] if len(teachers) == 1 else None
                    say(f"{place.name}: {metric.told(fitted.scores[metric.key])}")
            train = recipe.train.model_copy(update={"seed": seed})
            seeded[name], places[name] = recipe.model_copy(update={"compare": None, "train": train}), place
        for group in _groups(seeded, apart):
            for name, found in _run(group, places, folder, seed, quiet):
                results[name][seed] = found
                say(f"{name}, seed {seed}: {metric.told(found.scores[metric.key])}")
    measures |= {name: runs[seeds[0]].measures for name, runs in results.items()}
    scores = {name: {seed: r.scores[metric.key] for seed, r in runs.items()} for name, runs in results.items()}
    compared = Compared(
        title,
        Comparison(
            metric,
            scores,
            baseline=next(iter(results)),
            teacher=teacher_score,
            published=published(next(iter(arms.values())), metric),
        ),
        measures,
        {name: {seed: r.folder.path for seed, r in runs.items()} for name, runs in results.items()},
        folder,
        left_out,
    )
    write_text(folder / COMPARISON, json.dumps(compared.plain(), indent=2) + "\n")
    comparison_page(compared, arms)
    return compared


def _groups(arms: Mapping[str, Recipe], apart: bool) -> list[dict[str, Recipe]]:
    """Return the arms that can go side by side together: those of the same batches."""
    groups: list[dict[str, Recipe]] = []
    for name, recipe in arms.items():
        firsts = [(group, next(iter(group.values()))) for group in groups]
        like = [group for group, one in firsts if _batches(one) == _batches(recipe) and not one.stages]
        if like and not (apart or recipe.stages):
            like[0][name] = recipe
        else:
            groups.append({name: recipe})
    return groups


def _batches(recipe: Recipe) -> tuple[Any, ...]:
    """Return all that the batches of a run depend on."""
    return recipe.task.name, recipe.data, recipe.train, recipe.teacher.stored if recipe.teacher is not None else None


def _run(
    arms: Mapping[str, Recipe], places: Mapping[str, Path | None], folder: Path, seed: int, quiet: bool
) -> Iterator[tuple[str, Result]]:
    """Run the arms of one seed side by side; yield what each ended with."""
    recipe = next(iter(arms.values()))
    runtime = Runtime(recipe.train.device, recipe.train.precision)
    homes = {name: folder / f"{_stem(name)}-{seed}" for name in arms}
    left = [name for name, home in homes.items() if RunFolder(home).result() is None]
    title = f"{len(left)} arms, seed {seed}"
    with runtime.joined():
        given = _shared(arms, places, runtime) if len(left) > 1 else {}
        running = {
            name: distilling(
                arm,
                homes[name],
                title=title if len(left) > 1 else f"{name}, seed {seed}",
                quiet=quiet or (name in left[1:]),  # one bar for all
                teacher_folder=places[name],
                given=given.get(name, NOTHING),
            )
            for name, arm in arms.items()
        }
        try:
            yield from advance(running)
        except torch.OutOfMemoryError as error:
            if len(left) < 2:
                raise
            said = f"{len(left)} arms side by side do not fit into memory: --apart runs one after another"
            raise UserError(said) from error


def _shared(arms: Mapping[str, Recipe], places: Mapping[str, Path | None], runtime: Runtime) -> dict[str, Given]:
    """Return by arm the data and batches of all, and the teacher it has in common with others."""
    first = next(iter(arms.values()))
    world: dict[str, Any] = {"rank": ranks.rank(), "world_size": ranks.world_size()}
    reading: dict[str, Any] = {"task": first.task.name, "seed": first.train.seed, "replay": replay_of(first)}
    data = load_data(first.data.model_dump(), **reading, **world)
    batches, teachers = InStep(data.train, runtime.device), dict[str, Shared]()
    found = {}
    for name, arm in arms.items():
        section, place, shared = arm.teacher, places[name], None
        if section is not None and section.mode == "eval" and section.stored is None:
            key = f"{section.model_dump_json()} {arm.student.model_dump_json()}"
            if key not in teachers:
                teachers[key] = Shared(_teacher(arm, data, place))
            shared = Shared(teachers[key])
        found[name] = Given(teacher=shared, splits=data, batches=batches)
    return found


def _teacher(recipe: Recipe, data: Splits, place: Path | None) -> Live:
    """Return the teacher that a run of its own would build, after its student: also where it starts at random."""
    torch.manual_seed(mix(recipe.train.seed, INIT))
    load_model({"model": recipe.student.model, **recipe.student.options}, **data.model_facts())
    found = teacher_of(recipe, data, RunFolder(place).weights if place else None, NOTHING)
    assert isinstance(found, Live)
    return found


def published(recipe: Recipe, metric: Metric) -> dict[str, float]:
    """Return what the papers print of each arm, by name, from a recipe's `expected` section."""
    scale = 0.01 if metric.percent else 1.0
    found = {name: row.get(metric.key) for name, row in recipe.expected.items()}
    return {name: scale * value for name, value in found.items() if isinstance(value, (int, float))}


def arms_of(recipe: Recipe) -> dict[str, Recipe]:
    """Return the arms that a recipe's `compare` section names: the recipe with another objective each.

    Raises:
        UserError: if it has none.
    """
    if recipe.compare is None:
        raise UserError("the recipe has no `compare` section: arms and seeds")
    return {name: _arm(recipe, name, given) for name, given in recipe.compare.arms.items()}


def _arm(recipe: Recipe, name: str, given: Mapping[str, Any]) -> Recipe:
    """Return the recipe with what an arm says: an objective, or stages.

    Raises:
        UserError: if an arm has both, or is not valid.
    """
    if "stages" not in given:
        return with_objective(recipe, given)
    if len(given) > 1:
        raise UserError(f"compare.arms.{name}: its stages have an objective each; nothing stands beside them")
    plain = recipe.model_dump(mode="json", exclude={"compare", "stages"})
    return parse({**plain, "stages": given["stages"]}, where=f"compare.arms.{name}")


def baselines(recipe: Recipe) -> dict[str, Recipe]:
    """Return the arms that no comparison lacks: the student alone, plain and, where it can, with smoothed labels."""
    alone = with_objective(recipe, {"task": 1.0})
    if "label_smoothing" not in signature(task_class(recipe.task.name)).parameters:
        return {"alone": alone}
    smooth = TaskSection.model_validate({**recipe.task.model_dump(), "label_smoothing": 0.1})
    return {"alone": alone, "label smoothing": alone.model_copy(update={"task": smooth})}


def with_objective(recipe: Recipe, objective: Mapping[str, Any]) -> Recipe:
    """Return a recipe with another objective; a teacher that no term reads, and peers it does not name, are left out.

    Raises:
        UserError: if the objective is not valid.
    """
    entries = build_objective(objective).entries.values()
    read = [e for e in entries if e.teacher.partition("@")[0] == "teacher" and e.term.reads.taught]
    named, taught = peers_of(objective), bool(read or rebuilds_of(objective))
    return recipe.model_copy(
        update={
            "compare": None,
            "objective": dict(objective),
            "stages": (),
            "inherit": recipe.inherit if taught else {},
            "teacher": recipe.teacher if taught else None,
            "peers": {name: peer for name, peer in recipe.peers.items() if name in named},
        }
    )


def asked(
    names: Sequence[str], methods_text: str | None, seeds_text: str | None, sets: Sequence[str]
) -> tuple[dict[str, dict[str, Recipe]], tuple[int, ...]]:
    """Return the arms of each comparison that a command line stands for, by its name, and the seeds.

    Methods are tried on every recipe; recipes without methods are arms of one comparison. Baselines come first.

    Raises:
        UserError: on a seed that is no number, or an unknown recipe or method.
    """
    found = {name: load(name, sets) for name in names}
    first = next(iter(found.values()))
    titles = dict(zip(found, _titles(tuple(found)), strict=True))
    if methods_text is not None:
        stems = [text.strip() for text in methods_text.split(",") if text.strip()]
        objectives = {stem: of_methods(stem) for stem in stems}
        grid = {
            titles[name]: baselines(recipe) | {stem: with_objective(recipe, o) for stem, o in objectives.items()}
            for name, recipe in found.items()
        }
    else:
        arms = baselines(first)
        for name, recipe in found.items():
            arms |= arms_of(recipe) if recipe.compare else {Path(name).stem: recipe}
        grid = {titles[names[0]]: arms}
    try:
        seeds = tuple(int(seed) for seed in seeds_text.split(",")) if seeds_text else ()
    except ValueError:
        raise UserError(f"--seeds takes numbers such as 0,1,2, not {seeds_text!r}") from None
    return grid, seeds or (first.compare.seeds if first.compare else (0, 1, 2, 3, 4))


def _titles(names: Sequence[str]) -> tuple[str, ...]:
    """Return what recipes are called: that of a run after its folder, those of one name after their folders as well.

    Raises:
        UserError: if two would still be called the same.
    """
    paths = [Path(name) for name in names]
    short = [path.parent.name if path.stem == "recipe" and path.parent.name else path.stem for path in paths]
    if len(set(short)) == len(short):
        return tuple(short)
    long = [f"{path.parent.name}-{path.stem}" for path in paths]
    if len(set(long)) < len(long):
        raise UserError(f"recipes that are compared have names of their own, not {', '.join(names)}")
    return tuple(long)


def _stem(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())
