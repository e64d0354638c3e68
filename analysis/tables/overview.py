"""Methods and budgets in short."""

import math

import pandas as pd

from analysis.captions import failed, known, metrics, remarks_of, settings
from analysis.comparisons import KL, summarise
from analysis.metrics import SCALE
from analysis.table import GAP, Table, as_kl, as_number, make_table


def overview_table(runs: pd.DataFrame) -> Table:
    """Variants x budgets on every workload: the primary metric and the KL to full precision, means over n seeds."""
    runs = known(runs)
    frame = summarise(runs)
    budgets = sorted(set(runs["bits/target"]))
    rows, notes = [], []
    for (workload, variant), members in runs.groupby(["workload", "variant"], sort=True):
        row = {"workload": workload, "method": variant}
        for bits in budgets:
            cell = frame[(frame["workload"] == workload) & (frame["variant"] == variant) & (frame["bits"] == bits)]
            row[f"{bits:g} bit"] = GAP if cell.empty else _overview(cell.iloc[0])
        rows.append(row)
        notes += failed(members)
    cells = pd.DataFrame(rows, columns=["workload", "method", *(f"{bits:g} bit" for bits in budgets)])
    caption = f"Primary metric ({metrics(runs)}) / KL to full precision in nats, mean over n seeds.{settings(runs)}"
    return make_table(cells, frame, {}, caption, [*notes, *remarks_of(runs)])


def _overview(row: pd.Series) -> str:
    return f"{as_number(SCALE * row['score'], '.2f')} / {as_kl(row[KL], math.nan)} (n={row['n']})"
