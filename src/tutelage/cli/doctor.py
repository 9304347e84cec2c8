# SPDX-License-Identifier: Apache-2.0
"""`tutelage doctor`: whether everything is there that a run needs."""

import typer

from tutelage.cli._show import Json, document, tables_text


def doctor(as_json: Json = False) -> None:
    """Show versions, devices and packages, and train for ten steps on digits.

    Exit code 1 if something is wrong; a missing optional package is not.
    """
    from tutelage.run.doctor import doctor as examine

    found = examine()
    if as_json:
        document(found.plain())
    else:
        tables_text(found.tables)
        print(
            f"self-test: ten steps on digits, saved and loaded again, in {found.seconds:.1f} s; "
            f"loss {found.first:.2f} to {found.last:.2f}"
        )
        for fault in found.faults:
            print(f"wrong: {fault}")
        if not found.faults:
            print("all is well")
    if found.faults:
        raise typer.Exit(1)
