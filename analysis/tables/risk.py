"""How much of the measured KL the layerwise risk explains, and whether it ranks runs as the KL does."""

import math
from typing import Any

import pandas as pd

from analysis.captions import known, remarks_of, settings
from analysis.comparisons import KL
from analysis.loading import finished, records
from analysis.methods import setting
from analysis.table import GAP, Table, as_kl, as_number, as_spread, make_table

EXPLAINED = "risk/explained"
RISK = "risk/achieved"
FEWEST = 5
TOO_FEW = f"fewer than {FEWEST} runs"
COLUMNS = ["workload", "runs", "bits", "n", KL, f"{KL}/std", EXPLAINED, f"{EXPLAINED}/std", "rank_correlation"]


def risk_table(runs: pd.DataFrame) -> Table:
    """Achieved risk over KL of every variant and budget, and rank correlations of achieved risk with KL.

    The risk is that of all layers, in nats: `risk/explained` times the KL. Correlations are Spearman's over the runs of
    a workload, all of them and those of each value of `inputs`. Runs that have no risk, because they read no posterior,
    are left out.
    """
    runs = known(runs)
    done = finished(runs)
    explained = pd.to_numeric(done.get(EXPLAINED, pd.Series(math.nan, done.index)))
    done = done.assign(**{EXPLAINED: explained, KL: pd.to_numeric(done[KL])})
    without = int(done[EXPLAINED].isna().sum())
    done = done[done[EXPLAINED].notna()]
    done = done.assign(**{RISK: done[EXPLAINED] * done[KL]})
    rows: list[dict[str, Any]] = []
    for workload, members in done.groupby("workload", sort=True):
        rows += [{"workload": workload, **row} for row in [*_cells(members), *_correlations(members)]]
    numbers = pd.DataFrame(rows, columns=COLUMNS)
    several = "runs have no risk, as they" if without > 1 else "run has no risk, as it"
    notes = [f"{without} finished {several} read no posterior."] if without else []
    caption = (
        f"Achieved risk of all layers over the measured KL to full precision ({EXPLAINED}), mean ± sample standard "
        "deviation over n seeds, and Spearman's rank correlation of achieved risk with KL over n runs (methods, bits "
        f"and seeds) of a workload; {TOO_FEW} give no correlation.{settings(done)}"
    )
    return make_table(_shown(numbers), numbers, {}, caption, [*notes, *remarks_of(runs)])


def _cells(members: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each variant and budget of a workload."""
    rows = []
    for (variant, bits), cell in members.groupby(["variant", "bits/target"], sort=True):
        row: dict[str, Any] = {"runs": variant, "bits": bits, "n": len(cell)}
        for key in (KL, EXPLAINED):
            row |= {key: cell[key].mean(), f"{key}/std": cell[key].std(ddof=1)}
        rows.append(row)
    return rows


def _correlations(members: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for all runs of a workload, and one for those of each value of `inputs`."""
    inputs = pd.Series([setting(run, "inputs") for run in records(members)], members.index)
    groups = {"all runs": members} | {f"inputs={value}": group for value, group in members.groupby(inputs)}
    return [
        {"runs": name, "n": len(group), "rank_correlation": _spearman(group[RISK], group[KL])}
        for name, group in groups.items()
    ]


def _spearman(first: pd.Series, second: pd.Series) -> float:
    """Spearman's rank correlation; NaN for too few runs or equal values."""
    return float(first.rank().corr(second.rank())) if len(first) >= FEWEST else math.nan


def _shown(numbers: pd.DataFrame) -> pd.DataFrame:
    cells = []
    for row in records(numbers):
        groups, few = math.isnan(row["bits"]), row["n"] < FEWEST
        cells.append(
            {
                "workload": row["workload"],
                "runs": row["runs"],
                "bits": "all" if groups else f"{row['bits']:g}",
                "n": str(row["n"]),
                "KL": GAP if groups else as_kl(row[KL], row[f"{KL}/std"]),
                "risk / KL": as_spread(row[EXPLAINED], row[f"{EXPLAINED}/std"]),
                "rank correlation": TOO_FEW if groups and few else as_number(row["rank_correlation"], ".2f"),
            }
        )
    return pd.DataFrame(cells)
