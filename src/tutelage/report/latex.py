# SPDX-License-Identifier: Apache-2.0
"""Plain text as LaTeX source."""

SPECIAL = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "[": "{[}",  # a bracket after \\ would be read as its argument
    "]": "{]}",
    "±": r"$\pm$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "→": r"$\rightarrow$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}
TABLE = str.maketrans(SPECIAL)


def escape(text: str) -> str:
    r"""Return text in which every character that LaTeX would act upon stands for itself; newlines are spaces.

    Example:
        >>> print(escape("layer4.1_conv & 50 %"))
        layer4.1\_conv \& 50 \%
    """
    return " ".join(text.split()).translate(TABLE)
