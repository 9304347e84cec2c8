# SPDX-License-Identifier: Apache-2.0
"""`tutelage store`: a teacher's answers on disk."""

from pathlib import Path
from typing import Annotated

import typer

from tutelage.cli._show import Json, Quiet, Sets, document, remark


def store(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file or the name of a shipped one.")],
    out: Annotated[Path, typer.Option(help="Folder of the answers.")],
    views: Annotated[
        int | None,
        typer.Option(help="Views of each sample; as many as the recipe has epochs by default, one if all are alike."),
    ] = None,
    top: Annotated[
        int | None, typer.Option(help="Keep so many of the largest class probabilities instead of the logits.")
    ] = None,
    sets: Sets = [],  # noqa: B006  (typer reads the default)
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a teacher's answers to disk, for runs with `teacher: {stored: FOLDER}`.

    What the recipe's terms read is stored: its logits, and features in bfloat16. The same command goes on where it
    stopped, and holds a finished store against its hashes.
    """
    from tutelage.run.recipe import load
    from tutelage.run.store import store

    say = (lambda text: None) if quiet else remark
    kept = store(load(recipe, sets), out, views=views, top=top, quiet=quiet, say=say)
    if as_json:
        document(kept.plain())
        return
    for name, shape in kept.signals.items():
        print(f"{name:20} {shape}")
    print(f"{kept.samples} samples, {kept.views} views of each, {kept.bytes / 2**20:.3g} MiB")
    print(f"\nteach with them: --set teacher.stored={kept.folder}")
