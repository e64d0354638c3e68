"""Ranks of settings over blocks, and which differences of mean ranks are larger than chance (Demsar, JMLR 7, 2006).

Values are frames [blocks, settings], smaller is better; within a block, equal values share their mean rank. Friedman's
test asks whether any mean ranks differ, Nemenyi's critical difference which pairs do:

    CD = q sqrt(k (k + 1) / (6 n)),   q: quantile of the studentized range over sqrt(2)
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

LEVEL = 0.05
# With fewer blocks not even the same winner in all of them is significant at 5 %, by a two-sided sign test.
FEWEST_BLOCKS = 6


def ranks(values: pd.DataFrame) -> pd.DataFrame:
    """Rank of each setting in each block, from 1; values must not be missing."""
    return values.astype(np.float64).rank(axis=1)


def complete(values: pd.DataFrame, first: Sequence[str] = ()) -> pd.DataFrame:
    """The largest part without missing values, if settings join in the order of their number of blocks.

    Of all numbers k >= 2 of settings, the one with most values k x blocks is chosen, the larger k if equal.

    Args:
        values: [blocks, settings], NaN where a setting was not run.
        first: settings that join before all others.
    """
    present = values.notna()
    blocks = {str(name): int(count) for name, count in present.sum().items()}
    order = sorted(blocks, key=lambda name: (name not in first, -blocks[name], name))
    best = values.iloc[:0, :0]
    for k in range(2, len(order) + 1):
        chosen = order[:k]
        part = values.loc[present[chosen].all(axis=1), chosen]
        if part.size and part.size >= best.size:
            best = part
    return best


def friedman(values: pd.DataFrame) -> float:
    """p value of Friedman's test that all settings have the same mean rank; NaN for fewer than three settings."""
    if values.shape[1] < 3 or len(values) < 2:
        return math.nan
    from scipy import stats  # takes as long as two figures; most folders have too few blocks for a test

    return float(stats.friedmanchisquare(*values.to_numpy(dtype=np.float64).T).pvalue)


def critical_difference(settings: int, blocks: int, level: float = LEVEL) -> float:
    """Nemenyi's critical difference of mean ranks."""
    from scipy import stats

    q = float(stats.studentized_range.ppf(1 - level, settings, np.inf)) / math.sqrt(2)
    return q * math.sqrt(settings * (settings + 1) / (6 * blocks))


def alike_groups(mean_ranks: pd.Series, difference: float) -> list[list[str]]:
    """Groups of two or more settings whose mean ranks differ by no more than `difference`, largest groups only."""
    ordered = mean_ranks.sort_values(kind="stable")
    groups: list[list[str]] = []
    for place, low in enumerate(ordered):
        group = [str(name) for name, rank in ordered.iloc[place:].items() if rank - low <= difference]
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return groups


def too_few(blocks: int, settings: int) -> str:
    """Why mean ranks cannot be compared, in words; "" if they can."""
    if settings < 2:
        return "fewer than two settings ran on the same workloads and budgets"
    if blocks < FEWEST_BLOCKS:
        return (
            f"{settings} settings ran together on {blocks} workloads x budgets; a critical difference needs at least "
            f"{FEWEST_BLOCKS}, because with fewer no order is significant at 5 %"
        )
    return ""
