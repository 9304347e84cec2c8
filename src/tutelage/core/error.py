# SPDX-License-Identifier: Apache-2.0
"""What a user did wrong, in one line."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A mistake in what was given, not in the program: the command line prints it and exits with code 2."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the closest known word, or the list of valid ones.

    Example:
        >>> nearest("tempreature", ["temperature", "form"])
        '; did you mean temperature?'
        >>> nearest("x", ["temperature", "form"])
        '; valid: form, temperature'
    """
    names = sorted(set(known))
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]}?"
    shown = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
    return f"; valid: {shown}" if names else ""


def check_words(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse a word that a section does not know.

    Args:
        given: the words found there.
        known: those there are.
        where: the section's place in the recipe.

    Raises:
        UserError: naming the word's place, and the nearest valid one.
    """
    names = list(known)
    for word in given:
        if word not in names:
            raise UserError(f"{where}.{word} is not known{nearest(str(word), names)}")
