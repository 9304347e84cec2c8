# SPDX-License-Identifier: Apache-2.0
"""The tasks that a method works with, read from its card and the files of the tasks without importing them."""

import ast
from functools import cache
from pathlib import Path

from tutelage.core.card import Listing

TASKS = Path(__file__).parent.parent / "tasks"
METHODS = Path(__file__).parent.parent / "methods"
#: Roles whose shape is that of the task's answers.
ANSWERS = frozenset({"logits", "classifier", "pooled"})


@cache
def provided() -> dict[str, frozenset[str]]:
    """Return the roles that models of each task offer, by the task's name, as its class says in `provides`."""
    found = {}
    for path in sorted(TASKS.glob("[!_]*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id
            if named == "provides" and isinstance(node, ast.AnnAssign) and node.value is not None:
                words = (one.value for one in ast.walk(node.value) if isinstance(one, ast.Constant))
                found[path.stem] = frozenset(str(word) for word in words)
    return found


def suited(entry: Listing) -> tuple[str, ...]:
    """Return the tasks whose models offer all that a method reads unless other taps are named, in alphabetical order.

    - a method of a family that is named after a task works with that task: `segmentation` compares pixels
    - any other method that reads answers, such as `logits`, takes one answer a sample: it does not work with a task
      that has a family of its own, such as `language`, whose answers are one a token
    - any other method works wherever the roles are

    Example:
        >>> from tutelage.methods import entry
        >>> suited(entry("kd")), suited(entry("gkd"))
        (('classification',), ('language',))
    """
    tasks, structured = provided(), {path.name for path in METHODS.iterdir() if path.is_dir()}
    roles = {base(role) for side in entry.card.reads.values() for role in side}
    if entry.family in tasks:
        return (entry.family,) if roles <= tasks[entry.family] else ()
    return tuple(
        name
        for name, offers in sorted(tasks.items())
        if roles <= offers and not (name in structured and roles & ANSWERS)
    )


def base(role: str) -> str:
    """Return a role as tasks name it: without its index, and without the part of it that is meant.

    Example:
        >>> base("stages[*].pre"), base("classifier.weight"), base("head.cls[0]")
        ('stages', 'classifier', 'head.cls')
    """
    name = role.partition("[")[0]
    for part in (".pre", ".norm", ".weight"):
        name = name.removesuffix(part)
    return name
