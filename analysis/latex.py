"""Tables as LaTeX: floats that fit a page, with any text in their cells."""

import re
from collections.abc import Iterator, Sequence

import pandas as pd

# Limits of a float, so that caption, rows and notes fit a page.
MOST_ROWS, MOST_NOTES = 24, 8
NAMING = ("", "workload", "method", "bits", "variant", "model")
NOTHING = "-"
CHARACTERS = {
    "\\": "\\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "Δ": "$\\Delta$",
    "×": "$\\times$",
    "−": "$-$",
    "†": "$\\dagger$",
    "‡": "$\\ddagger$",
    "§": "\\S{}",
    "¶": "\\P{}",
    "<": "$<$",
    ">": "$>$",
    "|": "\\textbar{}",
    "[": "{[}",  # after a line's end it would be an argument
    '"': "{\\char34}",
}
IN_CODE = {"'": "\\textquotesingle{}", ",": ",\\allowbreak ", "/": "/\\allowbreak "}
# The letters beyond ASCII that LaTeX sets without further packages.
LETTERS = frozenset("ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ")


def floats(cells: pd.DataFrame, bold: pd.DataFrame, caption: str, footnotes: Sequence[str], label: str) -> str:
    r"""A table as one or more `table*` for booktabs and graphicx, scaled down if wider than the text.

    A table of more than MOST_ROWS rows has a float for each value of its first column, or more if needed. The first
    float has the caption and the label `tab:LABEL`; the others refer to it and are `tab:LABEL-2` and so on. Footnotes
    without their commands are below the last float; complete ones are comments.

    Args:
        cells: text; code is in backquotes.
        bold: of the same shape, True for bold cells.
    """
    lines = ["% needs \\usepackage{booktabs,graphicx}"]
    parts = list(_parts(cells))
    for number, (name, part) in enumerate(parts, 1):
        anchor = f"tab:{label}" if number == 1 else f"tab:{label}-{number}"
        said = escaped(caption) if number == 1 else f"As Table~\\ref{{tab:{label}}}"
        shown = f"{said.removesuffix('.')}. Here: {escaped(name)}." if name else said
        lines += [
            "\\begin{table*}",
            "\\centering\\footnotesize\\setlength{\\tabcolsep}{3pt}",
            f"\\caption{{{shown}}}",
            f"\\label{{{anchor}}}\\medskip",
            "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
            *_tabular(part, bold.loc[part.index, list(part)]),
            "}",
            *(_notes(footnotes) if number == len(parts) else []),
            "\\end{table*}",
        ]
    comments = [f"% {' '.join(line.split())}" for line in footnotes]
    return "\n".join([*lines, *comments]) + "\n"


def _parts(cells: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The name and the rows of each float; the name is "" if there is one float."""
    if len(cells) <= MOST_ROWS:
        yield "", cells
        return
    first = cells.columns[0]
    several = first in NAMING and cells[first].nunique() > 1
    for name, members in cells.groupby(first, sort=False) if several else [("", cells)]:
        rows = members.drop(columns=first) if several else members
        count = -(-len(rows) // MOST_ROWS)
        for place in range(count):
            part = rows.iloc[place * len(rows) // count : (place + 1) * len(rows) // count]
            which = f"part {place + 1} of {count}" if count > 1 else ""
            yield ", ".join(filter(None, [str(name), which])), part


def _tabular(cells: pd.DataFrame, bold: pd.DataFrame) -> list[str]:
    naming = [name in NAMING for name in cells]
    names = naming.index(False) if False in naming else len(naming)
    rows = [
        " & ".join(
            f"\\textbf{{{escaped(cell)}}}" if mark else escaped(cell) for cell, mark in zip(row, marks, strict=True)
        )
        for row, marks in zip(cells.to_numpy(), bold.to_numpy(), strict=True)
    ]
    return [
        f"\\begin{{tabular}}{{{'l' * names}{'r' * (cells.shape[1] - names)}}}",
        "\\toprule",
        f"{' & '.join(escaped(str(name)) for name in cells)} \\\\",
        "\\midrule",
        *(f"{row} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]


def _notes(footnotes: Sequence[str]) -> list[str]:
    """The lines below a table, at most MOST_NOTES."""
    shown = list(dict.fromkeys(re.sub(r"[:;,]? `[^`]*`$", "", line) for line in footnotes))
    if len(shown) > MOST_NOTES:
        rest = len(shown) - MOST_NOTES + 1
        shown = [*shown[: MOST_NOTES - 1], f"{rest} further lines are comments of this table's file."]
    lines = [f"{escaped(line)}\\\\".replace("/", "/\\allowbreak ") for line in shown]
    return ["\\begin{flushleft}\\scriptsize", *lines, "\\end{flushleft}"] if lines else []


def escaped(text: str) -> str:
    """`text` for LaTeX: characters with a meaning escaped, code in backquotes as \\texttt, a leading minus as one.

    A character that LaTeX has no glyph for without further packages is a question mark.
    """
    parts = []
    for place, part in enumerate(text.split("`")):
        known = CHARACTERS | IN_CODE if place % 2 else CHARACTERS
        safe = "".join(known.get(c, c if (c.isascii() and c.isprintable()) or c in LETTERS else "?") for c in part)
        if place % 2:
            safe = f"\\texttt{{{safe.replace('--', '-{}-')}}}"
        else:
            safe = re.sub(r"(?<![\w.])-(?=\d)", "$-$", safe)
        parts.append("--" if safe == NOTHING else safe)
    return "".join(parts)
