# SPDX-License-Identifier: Apache-2.0
"""The pages of a run and of a comparison, from what lies in their folders."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tutelage import methods
from tutelage.core.card import Card
from tutelage.report.dry_run import DryRun
from tutelage.report.environment import environment
from tutelage.report.measure import Measures
from tutelage.report.measure import table as cost_table
from tutelage.report.metric import OF, Metric
from tutelage.report.number import percent
from tutelage.report.page import Page, write
from tutelage.report.plot import Dot, curves, differences, loss_parts, scores, styles, trade
from tutelage.report.records import curve, parts, read_metrics
from tutelage.report.table import Table
from tutelage.report.verdict import Verdict
from tutelage.run.folder import RunFolder
from tutelage.run.pictures import gallery
from tutelage.run.recipe import Recipe

if TYPE_CHECKING:
    from tutelage.run.compare import Compared

CLASSES = 20  # rows of a table of classes
LOADING = """from tutelage.models.load import load

student = load("run:{folder}")  # student.module is the plain torch.nn.Module, in eval mode
logits = student(inputs)  # tokens, or pixels [B, C, H, W] in [0, 1]: it normalises and resizes them
"""


def cards_of(objective: Mapping[str, Any]) -> tuple[Card, ...]:
    """Return the cards of the methods an objective names, each once; a method of one's own has none."""
    found = methods.cards()
    return tuple(found[stem] for stem in dict.fromkeys(_stems(objective)) if stem in found)


def _stems(objective: Mapping[str, Any]) -> Iterator[str]:
    """Yield the methods of an objective, those among a term's options after it."""
    for label, block in objective.items():
        options = block if isinstance(block, Mapping) else {}
        yield str(options.get("method", label))
        nested = (value for value in options.values() if isinstance(value, Mapping) and "method" in value)
        yield from (stem for value in nested for stem in _stems({"": value}))


def lead(recipe: Recipe) -> str:
    """Return what a run is about in a line."""
    teacher = f"{recipe.teacher.model} teaches " if recipe.teacher else ""
    labels = f", {recipe.data.labels} labels" if recipe.data.labels is not None else ""
    return f"{teacher}{recipe.student.model} on {recipe.data.source}{labels}"


def run_tables(result: Mapping[str, Any]) -> tuple[Table, ...]:
    """Return the tables of a run's page: scores, classes, size and speed.

    Args:
        result: what `result.json` holds.
    """
    scores, teacher = result["scores"], result["teacher"]
    rows = [
        (
            Metric.of(key).head,
            Metric.of(key).show(value),
            *([Metric.of(key).show(teacher[key]) if key in teacher else None] if teacher else []),
        )
        for key, value in scores.items()
        if OF not in key
    ]
    heads = ("score", "student", *(["teacher"] if teacher else []))
    title = "Scores after the last step"
    classes = class_table(result["classes"])
    cost = cost_table({"student": Measures(**result["measures"])})
    tables = (Table(heads, rows, title=title), classes, scored_classes(scores, teacher or {}), cost)
    return tuple(table for table in tables if table.rows)


def scored_classes(scores: Mapping[str, float], teacher: Mapping[str, float]) -> Table:
    """Return the scores that are of one class each, `iou/road`, of student and teacher.

    Args:
        scores: of the student.
        teacher: of the teacher, or nothing.
    """
    kinds = tuple(dict.fromkeys(key.partition(OF)[0] for key in scores if OF in key))
    names = tuple(dict.fromkeys(key.partition(OF)[2] for key in scores if OF in key))
    sides = (("", scores), ("teacher's ", teacher)) if teacher else (("", scores),)
    heads = tuple(f"{side}{Metric.of(kind).head}" for kind in kinds for side, _ in sides)
    rows = [
        (name, *(Metric.of(kind).show(found.get(f"{kind}{OF}{name}")) for kind in kinds for _, found in sides))
        for name in names
    ]
    return Table(("class", *heads), rows, title="Class by class")


def class_table(classes: Mapping[str, Sequence[int]]) -> Table:
    """Return the accuracy of each class; of many, the lowest ones.

    Args:
        classes: number of samples named rightly and number of samples, by class.
    """
    seen = {name: (right, there) for name, (right, there) in classes.items() if there}
    lowest = sorted(seen, key=lambda name: seen[name][0] / seen[name][1])[:CLASSES]
    shown = [name for name in seen if name in lowest] if len(seen) <= CLASSES else lowest
    rows = [(name, str(seen[name][1]), percent(seen[name][0] / seen[name][1])) for name in shown]
    left_out = f"The {CLASSES} lowest of {len(seen)}; all are in result.json." if len(seen) > CLASSES else ""
    return Table(("class", "images", "accuracy (%)"), rows, title="Class by class", note=left_out)


def run_page(folder: RunFolder, recipe: Recipe, result: Mapping[str, Any]) -> None:
    """Write the page of one run.

    Args:
        folder: of the run.
        recipe: resolved.
        result: what `result.json` holds.
    """
    metric, found, teacher = Metric.of(result["metric"]), result["scores"], result["teacher"] or {}
    records = read_metrics(folder.metrics) if folder.metrics.exists() else []
    plots = [curves({"student": [curve(records, "evaluation", metric.key, "epoch")]}, metric)]
    if parts(records):
        plots.append(loss_parts({label: curve(records, "train", label) for label in parts(records)}))
    page = Page(
        title=f"{folder.path.name}",
        lead=lead(recipe),
        verdict=Verdict.of_run(metric, found[metric.key], teacher=teacher.get(metric.key)),
        tables=run_tables(result),
        plots=tuple(plots),
        gallery=gallery(folder.path),
        dry_runs={"student": DryRun.of_plain(result["dry_run"])},
        recipe=recipe.text(),
        environment=environment(),
        cards=cards_of(recipe.objective),
        loading=LOADING.format(folder=folder.path.name),
    )
    write(page, folder.report)


def comparison_page(compared: "Compared", arms: Mapping[str, Recipe]) -> None:
    """Write the page of a comparison."""
    shown = [*arms.values()][-1]
    found, metric = compared.comparison, compared.comparison.metric
    looks = styles([*found.scores], found.baseline, "teacher")
    records = {
        arm: [read_metrics(folder / "metrics.jsonl") for folder in runs.values()] for arm, runs in compared.runs.items()
    }
    dots = {
        arm: Dot(measures.macs, summary.mean or 0.0, summary.deviation)
        for arm, summary, measures in ((arm, found.summaries[arm], compared.measures[arm]) for arm in found.scores)
    }
    if found.teacher is not None:
        dots = {"teacher": Dot(compared.measures["teacher"].macs, found.teacher), **dots}
    last = next(reversed(records))
    page = Page(
        title=compared.title,
        lead=lead(shown),
        verdict=found.verdict,
        tables=compared.tables,
        plots=(
            curves(
                {arm: [curve(one, "evaluation", metric.key, "epoch") for one in runs] for arm, runs in records.items()},
                metric,
                looks=looks,
            ),
            scores(
                {arm: [*values.values()] for arm, values in found.scores.items()},
                metric,
                looks=looks,
                teacher=found.teacher,
            ),
            differences(found.pairs, metric, found.baseline, looks=looks),
            trade(dots, metric, cost="MACs", looks=looks),
            loss_parts(
                {label: curve(records[last][0], "train", label) for label in parts(records[last][0])},
                title=f"Parts of the loss: {last}, seed {next(iter(compared.runs[last]))}",
            ),
        ),
        dry_runs={arm: DryRun.of_plain(runs) for arm, runs in _dry_runs(compared).items()},
        recipe="\n".join(f"# {name}\n{one.text()}" for name, one in arms.items()),
        environment=environment(),
        cards=cards_of({key: block for one in arms.values() for key, block in one.objective.items()}),
        loading=LOADING.format(folder=f"{compared.folder.name}/{next(iter(compared.runs[last].values())).name}"),
    )
    write(page, compared.folder / "report.html")


def _dry_runs(compared: "Compared") -> dict[str, Any]:
    found = {arm: RunFolder(next(iter(runs.values()))).result() for arm, runs in compared.runs.items()}
    return {arm: result["dry_run"] for arm, result in found.items() if result and "dry_run" in result}
