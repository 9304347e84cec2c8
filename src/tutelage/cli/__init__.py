# SPDX-License-Identifier: Apache-2.0
"""The command line: one thin module a verb, found in this folder. torch is imported inside the verbs."""

import sys
from importlib import import_module
from pathlib import Path

import typer

from tutelage.core.error import UserError

app = typer.Typer(
    help="Teach a small model what a big one knows: tap, bridge, compare, train, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def verbs() -> list[str]:
    """Return the verbs: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


for _verb in verbs():
    app.command(_verb)(getattr(import_module(f"tutelage.cli.{_verb}"), _verb))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A mistake of the user's is one line and exit code 2; a crash is exit code 1."""
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        print(f"tutelage: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("tutelage: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
