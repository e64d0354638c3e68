"""Tables as LaTeX: rows and escapes, floats that fit, and a document of all tables that pdflatex compiles."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from frozen import add, add_ablation, add_glue, add_main

from analysis import load_runs
from analysis.latex import CHARACTERS, MOST_NOTES, MOST_ROWS, escaped, floats
from analysis.tables.ablation import ablation_table
from analysis.tables.compact import compact_table
from analysis.tables.cost import cost_table
from analysis.tables.glue import glue_table
from analysis.tables.main import main_table
from analysis.tables.overview import overview_table

HEAD = "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n"
needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")


def plain(rows: int, first: str = "workload") -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells of two workloads, and where they are bold: nowhere."""
    cells = pd.DataFrame({first: [f"w{2 * i // rows}" for i in range(rows)], "score": [f"{i}.0" for i in range(rows)]})
    return cells, pd.DataFrame(False, index=cells.index, columns=cells.columns)


def compiled(text: str, folder: Path) -> str:
    """What pdflatex says about a document with `text`, on its second run."""
    (folder / "document.tex").write_text(f"{HEAD}{text}\\end{{document}}\n", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "document.tex"]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def test_latex_has_its_rows_rules_and_escapes() -> None:
    cells = pd.DataFrame({"method": ["a_b 50% & {x}", "-"], "score": ["±1", "-1.50 [-2.00, -1.00]"]})
    bold = pd.DataFrame({"method": [False, False], "score": [False, True]})
    text = floats(cells, bold, "n = 3 & more", ["run `x_y=1,2` first"], "t")
    assert "a\\_b 50\\% \\& \\{x\\} & $\\pm$1 \\\\\n" in text
    assert "-- & \\textbf{$-$1.50 {[}$-$2.00, $-$1.00]} \\\\\n" in text
    assert "\\caption{n = 3 \\& more}" in text and "\\texttt{x\\_y=1,\\allowbreak 2}" in text
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")


def test_commands_are_comments() -> None:
    text = floats(*plain(2), "n = 1", ["w0: no result with seed 1: `python run.py seed=1`"], "t")
    assert "w0: no result with seed 1\\\\\n" in text
    assert text.endswith("\\end{table*}\n% w0: no result with seed 1: `python run.py seed=1`\n")
    assert text.count("python") == 1


def test_a_long_table_has_a_float_for_each_workload_and_loses_no_row() -> None:
    rows = 4 * MOST_ROWS - 2
    text = floats(*plain(rows), "n = 1.", ["note"], "t")
    assert re.findall(r"\\label{(.+?)}", text) == ["tab:t", "tab:t-2", "tab:t-3", "tab:t-4"]
    captions = re.findall(r"\\caption{(.+)}", text)
    assert captions[0] == "n = 1. Here: w0, part 1 of 2."
    assert captions[3] == "As Table~\\ref{tab:t}. Here: w1, part 2 of 2."
    assert re.findall(r"^(\d+\.0) \\\\$", text, re.MULTILINE) == [f"{i}.0" for i in range(rows)]
    assert text.count("note\\\\") == 1


def test_a_table_has_room_for_so_many_notes() -> None:
    text = floats(*plain(2), "n = 1", [f"note {i}" for i in range(MOST_NOTES + 3)], "t")
    shown = text[text.index("flushleft") :].partition("\\end{flushleft}")[0]
    assert shown.count("\\\\") == MOST_NOTES
    assert "4 further lines are comments" in shown
    assert text.count("% note ") == MOST_NOTES + 3


@needs_latex
def test_every_table_compiles_and_fits(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for model in ("resnet", "cifar_resnet56"):
        add_main(results, model=model)
    add_ablation(results)
    add_glue(results)
    add(results, "rtn", 3.0, 2, error="memory ran | out of `60 %` & $x_1 #\\ ^~ → ü")
    (results / "bare").mkdir()
    (results / "bare" / "result.json").write_text("{")
    runs = load_runs(results)
    main = main_table(runs)
    made = [main, compact_table(main), *(table(runs) for table in (ablation_table, cost_table, glue_table))]
    made.append(overview_table(runs))
    said = compiled("\\clearpage\n".join(table.latex(f"t{i}") for i, table in enumerate(made)), tmp_path)
    for complaint in ("Overfull", "Float too large", "undefined", "multiply"):
        assert complaint not in said, said[said.index(complaint) :][:300]
    assert "Output written on document.pdf" in said


@needs_latex
def test_every_character_compiles_in_text_and_in_code(tmp_path: Path) -> None:
    printable = [chr(i) for i in range(32, 0x250) if chr(i).isprintable() and chr(i) != "`"]
    lines = [*("".join(printable[i : i + 20]) for i in range(0, len(printable), 20)), "".join(CHARACTERS), "\t → 漢"]
    said = compiled("\n\n".join(escaped(text) for line in lines for text in (line, f"`{line}`")), tmp_path)
    assert "Missing character" not in said
    assert escaped("→ ü") == "? ü"
