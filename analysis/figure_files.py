"""Files of figures, without a date, and figures.tex, which includes them in a document with their captions."""

import re
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from analysis.latex import escaped
from analysis.style import style

# Metadata that matplotlib adds, left out because it depends on the date and the version.
PDF_METADATA = {"CreationDate": None, "Producer": None, "Creator": None}
PNG_METADATA = {"Software": None}
SUFFIXES = (".pdf", ".png", ".txt", ".csv")
FIGURES_TEX = "figures.tex"
POINTS = 72
# inches: wider figures span both columns
WIDEST_COLUMN = 4.0


def save(
    figure: Figure, folder: Path, name: str, caption: str, data: pd.DataFrame | None = None, dpi: int = 300
) -> Path:
    """Write NAME.pdf, NAME.png, the caption as NAME.txt and the data as NAME.csv; the same input gives the same bytes.

    Returns:
        the path of the PNG file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # matplotlib would lay a figure out again after its first file
    with style(), matplotlib.rc_context({"figure.constrained_layout.use": False}):
        figure.savefig(folder / f"{name}.pdf", metadata=PDF_METADATA)
        figure.savefig(folder / f"{name}.png", metadata=PNG_METADATA, dpi=dpi)
    (folder / f"{name}.txt").write_text(caption.strip() + "\n", encoding="utf-8")
    if data is not None:
        data.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.10g")
    return folder / f"{name}.png"


def remove(folder: Path, name: str) -> None:
    """Remove the files of a figure without data, so that old ones are not mistaken for new ones."""
    for suffix in SUFFIXES:
        (folder / f"{name}{suffix}").unlink(missing_ok=True)


def write_figures_tex(folder: Path) -> None:
    r"""Write figures.tex: a float with \includegraphics, \caption and \label{fig:NAME} for each figure there."""
    floats = [
        _float(file, width_of(file)) for file in sorted(folder.glob("*.pdf")) if file.with_suffix(".txt").is_file()
    ]
    (folder / FIGURES_TEX).unlink(missing_ok=True)
    if floats:
        head = "% needs \\usepackage{graphicx}, and \\graphicspath{{FOLDER/}} in a document elsewhere\n"
        (folder / FIGURES_TEX).write_text(head + "\n".join(floats), encoding="utf-8")


def width_of(file: Path) -> float:
    """Width in inches of a PDF that matplotlib wrote."""
    box = re.search(rb"/MediaBox \[ 0 0 ([\d.]+) ", file.read_bytes())
    assert box is not None, f"{file}: no page"
    return float(box[1]) / POINTS


def _float(file: Path, width: float) -> str:
    kind = "figure*" if width > WIDEST_COLUMN else "figure"
    caption = escaped(file.with_suffix(".txt").read_text(encoding="utf-8").strip())
    lines = [
        f"\\begin{{{kind}}}",
        "\\centering",
        f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{\\includegraphics{{{file.name}}}}}",
        f"\\caption{{{caption}}}",
        f"\\label{{fig:{file.stem}}}",
        f"\\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"
