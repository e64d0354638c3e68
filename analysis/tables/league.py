"""The league table: every setting of every method, ranked by KL over workloads and budgets.

A block is a workload at a budget, under the same calibration size, budget count and excluded layers. A setting is a
method with all that a run chose beside the defaults: allocator, inputs, correction, codec, the method's switches.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.captions import known, remarks_of
from analysis.comparisons import ALIKE, KL, Examples, NotComparedError, alike, counted, is_seedless
from analysis.defaults import deviations
from analysis.loading import finished, records
from analysis.methods import label, methods_of
from analysis.paper import PROPOSED, REFERENCE, short_names
from analysis.ranks import LEVEL, complete, critical_difference, friedman, ranks, too_few
from analysis.table import GAP, Table, as_number, as_ratio, make_table
from analysis.tables.cost import run_costs

# Settings that separate blocks; others separate the settings of a method.
CONDITIONS = tuple(key for key in ALIKE if key != "distill")
# Parts of a configuration whose deviations name a setting.
NAMING = (
    "method",
    "posterior",
    "allocator",
    "allocation",
    "inputs",
    "codec",
    "correction",
    "rotate",
    "proxy",
    "distill",
)
COLUMNS = ["setting", "method", "mean_rank", "ranked_blocks", "wins", "kl_ratio", "kl_ratio_low", "kl_ratio_high"]
COLUMNS += ["no_interval", "ratio_blocks", "time x", "stored_beyond", "memory x", "blocks", "workloads"]


@dataclass(frozen=True)
class League:
    """Finished runs as blocks and settings.

    Attributes:
        runs: finished runs with `block`, `setting` and `label`, those of incomplete seeds left out.
        kl: mean KL [blocks, settings], NaN where a setting has no runs; blocks are (workload, bits, conditions).
        ranked: the part of `kl` that is ranked, see `analysis.ranks.complete`.
        reference: the setting of GPTQ that others are compared with, or None.
        left_out: number of settings in blocks that lack a seed.
    """

    runs: pd.DataFrame
    kl: pd.DataFrame
    ranked: pd.DataFrame
    reference: str | None
    left_out: int


def league_of(runs: pd.DataFrame) -> League:
    """The blocks and settings of the finished runs.

    In a block, the seeds are those that most settings have. A setting that lacks one of them is left out there, because
    it may lack a bad seed; one that reads no calibration data needs a single run.
    """
    done = finished(runs)
    rows = records(done)
    blocks = [(run["workload"], float(run["bits/target"]), alike(run, CONDITIONS)) for run in rows]
    done = done.assign(
        block=pd.Series(blocks, done.index, dtype="object"),
        setting=pd.Series([setting_of(run) for run in rows], done.index, dtype="object"),
        seedless=pd.Series([is_seedless(run) for run in rows], done.index, dtype=bool),
    )
    parts, left_out = [done.iloc[:0]], 0
    for _, members in done.groupby("block", sort=True):
        seeds = {name: frozenset(of["seed"]) for name, of in members[~members["seedless"]].groupby("setting")}
        had = sorted(set(seeds.values()), key=lambda one: (-list(seeds.values()).count(one), -len(one), sorted(one)))
        wanted = had[0] if had else frozenset()
        lacking = {name for name, of in seeds.items() if not wanted <= of}
        left_out += len(lacking)
        fits = members["seedless"] | members["seed"].isin(wanted)
        parts.append(members[fits & ~members["setting"].isin(lacking)])
    chosen = pd.concat(parts)
    chosen = chosen.assign(**{KL: pd.to_numeric(chosen[KL])})
    chosen = chosen[chosen.groupby("setting")[KL].transform("count") > 0]  # remarks name results without a KL
    kl = chosen.pivot_table(KL, "block", "setting", aggfunc="mean")
    first = [name for name in (PROPOSED, REFERENCE) if name in kl]
    of_reference = chosen[chosen["method"] == REFERENCE]["setting"].drop_duplicates()
    counts = {str(name): int(count) for name, count in kl.notna().sum().items()}
    most = sorted(of_reference, key=lambda name: (name != REFERENCE, -counts[name], name))
    return League(chosen, kl, complete(kl, first), most[0] if most else None, left_out)


def setting_of(run: Mapping[str, Any]) -> str:
    """The method of a run and its deviations from the defaults, as a variant: `gptq allocator=knapsack`."""
    chosen = {key: text for key, text in deviations(run).items() if key.partition(".")[0] in NAMING}
    names = {key: key.removeprefix("method.") for key in chosen if key not in CONDITIONS}
    place = {key: NAMING.index(key.partition(".")[0]) for key in names}
    shown = sorted(names, key=lambda key: (place[key] < 2, place[key], key))  # axes before switches
    return " ".join([run["method"], *(f"{names[key]}={chosen[key]}" for key in shown)])


def league_table(runs: pd.DataFrame) -> Table:
    """Mean rank by KL, KL over GPTQ's with its interval, time, stored bits and memory of every setting.

    Ranks are over the blocks that all ranked settings have; everything else is over all blocks of a setting, and
    multiples over those that GPTQ has too.
    """
    runs = known(runs)
    league, methods = league_of(runs), methods_of(runs)
    numbers = pd.DataFrame(_rows(league), columns=COLUMNS)
    numbers = numbers.sort_values(["mean_rank", "kl_ratio", "setting"], kind="stable").reset_index(drop=True)
    reference = label(league.reference, methods) if league.reference else methods[REFERENCE].title
    cells = pd.DataFrame(
        {
            "setting": [label(name, methods) for name in numbers["setting"]],
            "mean rank": [as_number(value, ".2f") for value in numbers["mean_rank"]],
            "wins": [
                f"{wins:.0f} of {of:.0f}" if of else GAP
                for wins, of in zip(numbers["wins"], numbers["ranked_blocks"], strict=True)
            ],
            f"KL / {reference}'s": [
                as_ratio(*values)
                for values in zip(*(numbers[f"kl_ratio{end}"] for end in ("", "_low", "_high")), strict=True)
            ],
            "time ×": [as_number(value, ".2f") for value in numbers["time x"]],
            "stored − bits": [as_number(value, "+.3f") for value in numbers["stored_beyond"]],
            "memory ×": [as_number(value, ".2f") for value in numbers["memory x"]],
            "blocks": numbers["blocks"].map(str),
            "workloads": numbers["workloads"].map(str),
        }
    )
    bold = {f"KL / {reference}'s": numbers["kl_ratio_high"] < 1}
    notes = [winners(league, methods)]
    unranked = len(league.kl.columns) - len(league.ranked.columns)
    if unranked:
        notes.append(f"Without a rank, as not run on all {len(league.ranked)} ranked blocks: {unranked} settings.")
    for reason, of in numbers.groupby("no_interval", sort=True):
        notes.append(f"No interval: {', '.join(label(name, methods) for name in of['setting'])} ({reason}).")
    if league.left_out:
        notes.append(f"Left out, as a seed of the others is missing: {league.left_out} pairs of setting and block.")
    return make_table(cells, numbers, bold, _caption(league, reference), [*notes, *remarks_of(runs)])


def _rows(league: League) -> list[dict[str, Any]]:
    ranked, examples = ranks(league.ranked), Examples()
    ties = league.ranked.eq(league.ranked.min(axis=1), axis=0)
    costs = run_costs(league.runs).assign(block=league.runs["block"], setting=league.runs["setting"])
    costs["beyond"] = pd.to_numeric(league.runs["bits/stored"]) - pd.to_numeric(league.runs["bits/target"])
    medians = costs.groupby(["setting", "block"])[["total", "memory", "beyond"]].median()
    rows = []
    for name in map(str, league.kl):
        of = league.runs[league.runs["setting"] == name]
        here = medians.xs(name)
        row = {"setting": name, "method": of["method"].iloc[0], "blocks": len(here), "ranked_blocks": 0}
        row |= {"workloads": of["workload"].nunique(), "stored_beyond": here["beyond"].mean()}
        if name in ranked:
            row |= {"mean_rank": ranked[name].mean(), "ranked_blocks": len(ranked), "wins": int(ties[name].sum())}
        if league.reference is not None:
            multiples = here / medians.xs(league.reference).reindex(here.index)
            row |= {"time x": _geometric(multiples["total"]), "memory x": _geometric(multiples["memory"])}
            row |= _ratio(league, name, examples)
        rows.append(row)
    return rows


def _geometric(values: pd.Series) -> float:
    """Geometric mean of the values that are not missing, NaN without any."""
    usable = values[values > 0]
    return float(np.exp(np.log(usable).mean())) if len(usable) else math.nan


def _ratio(league: League, name: str, examples: Examples) -> dict[str, Any]:
    """Geometric mean over blocks of the KL over the reference's, with its interval."""
    common = league.kl.index[league.kl[name].notna() & league.kl[league.reference].notna()]
    if name == league.reference or not len(common):
        return {"ratio_blocks": len(common), "kl_ratio": 1.0 if len(common) else math.nan}
    sides = [league.runs[league.runs["setting"] == one] for one in (league.reference, name)]
    pairs = [tuple(side[[block == one for one in side["block"]]] for side in sides) for block in common]
    try:
        interval = examples.compare_kl([(first, second) for first, second in pairs])
    except NotComparedError as reason:
        ratio = league.kl.loc[common, name] / league.kl.loc[common, league.reference]
        return {"ratio_blocks": len(common), "kl_ratio": _geometric(ratio), "no_interval": str(reason)}
    ends = {"kl_ratio": interval.value, "kl_ratio_low": interval.low, "kl_ratio_high": interval.high}
    return {"ratio_blocks": len(common), **ends}


def winners(league: League, methods: Mapping[str, Any]) -> str:
    """Sentences: which setting has the lowest KL where, and the proposed method's KL over the best other method's.

    All settings that ran at a place count; a place with a single setting does not.
    """
    contested = league.kl[league.kl.notna().sum(axis=1) > 1]
    if contested.empty:
        return "No workload and budget has more than one setting."
    places = contested.index.tolist()
    names = short_names(dict.fromkeys(workload for workload, _, _ in places))
    first: dict[str, dict[str, list[str]]] = {}
    for (workload, bits, _), winner in zip(places, map(str, contested.idxmin(axis=1)), strict=True):
        first.setdefault(winner, {}).setdefault(names[workload], []).append(f"{bits:g}")
    parts = []
    for setting, won in sorted(first.items(), key=lambda item: -sum(map(len, item[1].values()))):
        where = ", ".join(f"{name} ({', '.join(bits)} bits)" for name, bits in won.items())
        parts.append(f"{label(setting, methods)} on {where}")
    ours = [name for name in map(str, contested) if name.split(" ")[0] == PROPOSED]
    ratio = (contested[ours].min(axis=1) / contested.drop(columns=ours).min(axis=1)).dropna()
    said = f"Lowest KL of all that ran: {'; '.join(parts)}."
    if ratio.empty:
        return said
    span = f"{ratio.min():.2f}" if len(ratio) == 1 else f"{ratio.min():.2f} to {ratio.max():.2f}"
    return f"{said} The best {methods[PROPOSED].title} has {span} times the KL of the best other method there."


def significance(league: League) -> str:
    """A sentence on Friedman's test and the critical difference, or why there is none."""
    blocks, settings = league.ranked.shape
    why = too_few(blocks, settings)
    if why:
        return f"No test of the mean ranks: {why}."
    p, difference = friedman(league.ranked), critical_difference(settings, blocks)
    test = "" if math.isnan(p) else f"Friedman's test: p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}. "
    return (
        f"{test}Mean ranks that differ by more than {difference:.2f} differ at {100 * LEVEL:g} % (Nemenyi, "
        f"n = {blocks} blocks; budgets of one workload are not independent)."
    )


def _caption(league: League, reference: str) -> str:
    workloads = len({workload for workload, _, _ in league.kl.index.tolist()})
    seeds = counted(league.runs.groupby(["block", "setting"])["seed"].nunique()) if len(league.runs) else "0"
    return (
        f"League of all settings over {len(league.kl)} blocks, a workload at a budget each ({workloads} workloads; n = "
        f"{seeds} seeds). Mean rank: by mean KL to full precision, 1 is the lowest, over the {len(league.ranked)} "
        f"blocks that all ranked settings have. KL / {reference}'s: geometric mean over the blocks of both, with 95 % "
        "interval (paired bootstrap over examples and seeds within each block). Time and peak memory: geometric mean "
        f"of multiples of {reference}'s. Stored − bits: bits on disk beyond the budget. Bold: an interval below 1. "
        f"{significance(league)}"
    )
