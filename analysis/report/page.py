"""The report as one HTML file: tables in HTML, the data of charts and runs and plotly.js in compressed form.

The page needs no network. plotly.js is the whole library of the package plotly, 4.8 MB as text, 2 MB in the page; the
browser decompresses it (DecompressionStream, in all browsers since 2023).
"""

import base64
import gzip
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd

import bayesq
from analysis.loading import finished, records
from analysis.methods import title
from analysis.paper import REFERENCE
from analysis.report.content import LAYER_VALUES, QUESTION, Content, interval_text, title_of, units
from analysis.table import Table
from bayesq.files import atomic_path
from bayesq.suite.config import flatten
from bayesq.suite.errors import UserError
from bayesq.suite.results import PROVENANCE, plain

FOLDER = Path(__file__).parent
# plotly's names of matplotlib's markers
SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down", "P": "cross", "X": "x",
    "d": "diamond-tall", "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "h": "hexagon", "H": "hexagon2",
    "*": "star",
}  # fmt: skip
# Significant digits of numbers in the data.
DIGITS = 6
# Heads of the main table, and whether a column is text.
HEADS = {
    "workload": True, "bits": False, "method": True, "n": False, "score": False, "metric": True, "KL (nats)": False,
    "stored bits": False,
}  # fmt: skip
# Keys of a record that the comparison of two runs leaves out or shows in another group.
NOT_COMPARED = (
    *PROVENANCE, "run_id", "path", "variant", "workload", "overrides", "memory/process", "duplicates", "status",
    "error",
)  # fmt: skip


def write_page(content: Content, path: str | Path) -> Path:
    """Write the page, atomically; returns its path.

    Raises:
        UserError: the package plotly is missing, or the file cannot be written.
    """
    path = Path(path)
    text = page(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror}): choose another file") from error
    return path


def page(content: Content) -> str:
    """The text of the page; UserError if the package plotly is missing."""
    if find_spec("plotly") is None:
        raise UserError("the page needs the package plotly: pip install 'bayesq[analysis]'")
    from plotly.offline import get_plotlyjs

    made = f"{len(finished(content.runs))} finished runs of {content.source}"
    filters = f", only {' '.join(content.where)}" if content.where else ""
    return Template((FOLDER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"bayesq: {', '.join(map(title_of, units(content.table)))}"),
        style=(FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(FOLDER / "page.js").read_text(encoding="utf-8"),
        question=escape(QUESTION),
        answers=_items(content.answers),
        source=escape(f"{made}{filters}; written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."),
        heads="".join(_head(name, text) for name, text in HEADS.items()),
        rows="\n".join(_rows(content)),
        caption=escape(content.caption),
        paired="" if content.paired is None else _paired(content.paired),
        commands=_commands(content),
        versions="\n".join(_versions(content.runs)),
        remarks=f"<h3>Remarks</h3><ul>{_items(content.remarks)}</ul>" if content.remarks else "",
        data=_packed(json.dumps(data_of(content), separators=(",", ":"), allow_nan=False)),
        plotly=_packed(get_plotlyjs()),
    )


def data_of(content: Content) -> dict[str, Any]:
    """What the page's script reads: curves, layers and runs, with numbers of DIGITS significant digits."""
    names = {name: place for place, name in enumerate(dict.fromkeys(content.layers["name"]))}
    first = content.table.drop_duplicates("workload").set_index("workload")
    return {
        "looks": {
            variant: {
                "label": look.label,
                "color": look.color,
                "symbol": SYMBOLS.get(look.marker, "circle"),
                "variant": look.variant,
            }
            for variant, look in content.looks.items()
        },
        "workloads": {
            workload: {"title": title_of(workload), "unit": unit, "fp": _short(first.loc[workload, "fp"])}
            for workload, unit in units(content.table).items()
        },
        "table": [{key: _short(value) for key, value in row.items()} for row in records(content.table)],
        "quantities": {key: name for key, name in LAYER_VALUES.items() if key in content.layers},
        "names": list(names),
        "layers": _layers(content, names),
        "runs": _runs(content.runs),
    }


def _layers(content: Content, names: Mapping[str, int]) -> list[dict[str, Any]]:
    """A group for each workload, variant and budget in the order of legends, without quantities that have no number."""
    order = {variant: place for place, variant in enumerate(content.looks)}
    groups = []
    for (workload, variant, bits), rows in content.layers.groupby(["workload", "variant", "bits"], sort=True):
        values = {key: [_short(value) for value in rows[key]] for key in LAYER_VALUES if key in rows}
        values = {key: of for key, of in values.items() if any(value is not None for value in of)}
        groups.append(
            {
                "workload": workload,
                "variant": variant,
                "bits": bits,
                "names": [names[name] for name in rows["name"]],
                "values": values,
            }
        )
    return sorted(groups, key=lambda group: (group["workload"], group["bits"], order[group["variant"]]))


def _runs(runs: pd.DataFrame) -> dict[str, Any]:
    """Names of the finished runs, their keys by group, and a column for each key; equal values are written once."""
    done = records(finished(runs).sort_values(["workload", "variant", "bits/target", "seed"]))
    parts: list[dict[str, dict[str, Any]]] = [
        {
            "run": {"id": run["run_id"], "path": run["path"], "workload": run["workload"]},
            "results": flatten(
                {key: value for key, value in run.items() if key not in (*NOT_COMPARED, "run_id", "path")}
            ),
            **{key: flatten(run[key]) for key in PROVENANCE if isinstance(run.get(key), Mapping)},
        }
        for run in done
    ]
    groups: dict[str, dict[str, None]] = {}
    for part in parts:
        for group, values in part.items():
            groups.setdefault(group, {}).update(dict.fromkeys(f"{group} {key}" for key in values))
    columns = {}
    for group, keys in groups.items():
        for key in keys:
            column = [_short(part.get(group, {}).get(key.removeprefix(f"{group} "))) for part in parts]
            columns[key] = column[:1] if all(value == column[0] for value in column) else column
    return {
        "first": [0, _counterpart(done)],
        "names": [
            f"{title_of(run['workload'])} · {run['variant']} · {run['bits/target']:g} bits · seed {int(run['seed'])} · "
            f"{run['run_id']}"
            for run in done
        ],
        "groups": {group: list(keys) for group, keys in groups.items()},
        "columns": columns,
    }


def _counterpart(done: Sequence[Mapping[str, Any]]) -> int:
    """The place of the first run of another variant with workload, budget and seed of run 0; the last if none has."""
    keys = ("workload", "bits/target", "seed")
    for place, run in enumerate(done):
        if run["variant"] != done[0]["variant"] and all(run[key] == done[0][key] for key in keys):
            return place
    return len(done) - 1


def _short(value: Any) -> Any:
    """A value for JSON: rounded numbers, None for NaN, text for anything that is neither number nor text."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return json.dumps([_short(item) for item in value])
    return value if value is None or isinstance(value, bool | int | str) else json.dumps(plain(value))


def _packed(text: str) -> str:
    """gzip in base64, the same bytes for the same text."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=9, mtime=0)).decode()


# --------------------------------------------------------------------------------------------------------------- HTML


def _items(lines: Iterable[str]) -> str:
    return "\n".join(f"<li>{escape(line)}</li>" for line in lines)


def _head(name: str, text: bool) -> str:
    return f'<th{_kind(text)}><button type="button">{escape(name)}</button></th>'


def _kind(text: bool) -> str:
    return ' class="text"' if text else ""


def _rows(content: Content) -> Iterable[str]:
    """A row of the main table; the lowest KL of several at a workload and budget is bold."""
    alike = content.table.groupby(["workload", "bits"])["kl"]
    named = units(content.table)
    lowest = alike.transform("min").where(alike.transform("count") > 1)
    for row, least in zip(records(content.table), lowest, strict=True):
        cells = [
            f'<td class="text">{escape(title_of(row["workload"]))}</td>',
            _number(row["bits"], "g"),
            f'<td class="text">{escape(content.looks[row["variant"]].label)}</td>',
            _number(row["n"], "d"),
            _number(row["score"], ".2f", interval_text(row["score_low"], row["score_high"], ".2f")),
            f'<td class="text">{escape(named[row["workload"]])}</td>',
            _number(row["kl"], ".3g", interval_text(row["kl_low"], row["kl_high"], ".2g"), best=row["kl"] == least),
            _number(row["stored"], ".3f"),
        ]
        yield f"<tr>{''.join(cells)}</tr>"


def _number(value: float, form: str, interval: str = "", best: bool = False) -> str:
    """A cell that sorts by its value, with an interval."""
    if value is None or math.isnan(value):
        return '<td data-value="">-</td>'
    more = f" <small>{escape(interval)}</small>" if interval else ""
    return f'<td data-value="{value!r}"{" class=best" if best else ""}>{value:{form}}{more}</td>'


def _paired(table: Table) -> str:
    """The table of paired comparisons with its caption and footnotes."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in map(str, table.cells))
    rows = [
        "".join(f"<td{' class=best' if bold else ''}>{escape(cell)}</td>" for cell, bold in zip(*pair, strict=True))
        for pair in zip(table.cells.to_numpy().tolist(), table.bold.to_numpy().tolist(), strict=True)
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h3>Paired comparisons</h3>\n"
        f'<div class="wide"><table id="paired"><thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>\n'
        f'<p class="note">{escape(table.caption)}</p><ul class="note">{_items(table.footnotes)}</ul>'
    )


def _commands(content: Content) -> str:
    """The commands by workload, then those of this page and of the table with paired intervals."""
    parts = []
    for workload in units(content.table):
        lines = [line for of, _, line in content.commands if of == workload]
        parts.append(f"<h3>{escape(title_of(workload))}</h3>\n<pre>{escape(chr(10).join(lines))}</pre>")
    given = shlex.join([content.source, *content.where])
    again = f"python -m bayesq.suite.report {given} --paired --html page.html"
    note = f"This page, with paired bootstrap intervals and tests against the strongest {title(REFERENCE)}:"
    return "\n".join([*parts, f"<p>{note}</p>\n<pre>{escape(again)}</pre>"])


def _versions(runs: pd.DataFrame) -> Iterable[str]:
    """Commits, versions and machines of the finished runs, each with the number of runs if they differ."""
    done = records(finished(runs))
    shown = {"commit": ("git", "commit"), "machine": ("host", "processor"), "device": ("host", "device")}
    shown |= {name: ("versions", name) for name in (bayesq.__name__, "python", "torch", "transformers", "timm")}
    for name, (part, key) in shown.items():
        had = Counter(str((run.get(part) or {}).get(key, "unknown")) for run in done)
        texts = [text if len(had) == 1 else f"{text} ({count} runs)" for text, count in had.items()]
        yield f"<tr><td>{name}</td><td>{escape(', '.join(texts))}</td></tr>"
