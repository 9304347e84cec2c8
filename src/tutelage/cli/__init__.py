# SPDX-License-Identifier: Apache-2.0
"""The command line: one thin module a verb, found in this folder. torch is imported inside the verbs."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import typer

from tutelage.core.error import UserError

INTERRUPTED = 130
#: typer's word for a call that does not fit the verb; where the class lies depends on its version
UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Teach a small model what a big one knows: tap, bridge, compare, train, export.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def verbs() -> list[str]:
    """Return the verbs: the files of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


for _verb in verbs():
    _function = getattr(import_module(f"tutelage.cli.{_verb}"), _verb)
    app.command(_verb, short_help=_function.__doc__.partition("\n")[0])(_function)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; without arguments it shows the help.

    A mistake of the user's is one line and exit code 2, an interrupt exit code 130; a crash is a traceback
    and exit code 1.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=given or ["--help"], prog_name="tutelage", standalone_mode=False)
    except UserError as error:
        _stop(str(error), 2)
    except UsageError as error:
        context = getattr(error, "ctx", None)
        said = str(error.format_message()).rstrip(".").replace(". Did you mean", "; did you mean")
        help_of = f"; see {context.command_path} --help" if context and not said.endswith("?") else ""
        _stop(f"{said[0].lower()}{said[1:]}{help_of}", 2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:  # which typer makes of an interrupt
        _stop("stopped; the command of a run, given again, goes on from its last checkpoint", INTERRUPTED)
    if code:
        raise SystemExit(code)


def _stop(said: str, code: int) -> NoReturn:
    print(f"tutelage: {' '.join(said.split())}", file=sys.stderr)
    raise SystemExit(code)
