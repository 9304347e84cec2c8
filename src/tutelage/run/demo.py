# SPDX-License-Identifier: Apache-2.0
"""The demo of a method: a recipe like any other, `recipes/STEM/demo.yaml`."""

from tutelage import methods
from tutelage.core.error import UserError
from tutelage.run.recipe import SHIPPED, Recipe, load


def demo_recipe(stem: str | None) -> Recipe:
    """Return a method's demo, or without a stem the tour of the package.

    Raises:
        UserError: on an unknown method, or one without a demo.
    """
    if stem is None:
        return load(str(SHIPPED / "tour.yaml"))
    methods.entry(stem)
    path = SHIPPED / stem / "demo.yaml"
    if not path.exists():
        raise UserError(f"{stem} has no demo yet")
    return load(str(path))
