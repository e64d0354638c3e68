"""Cost of quantizing: seconds of the stages and peak memory, also as multiples of GPTQ's."""

import math
from collections.abc import Mapping

import pandas as pd

from analysis.captions import failed, known, remarks_of, settings, source_of
from analysis.comparisons import ALIKE_IN_COST, alike, counted
from analysis.gaps import usual_seeds, workload_command
from analysis.loading import OWN_MEMORY, finished, records
from analysis.methods import title
from analysis.paper import REFERENCE
from analysis.table import Table, as_number, make_table
from bayesq.suite.summary import STAGES

# Columns that a run shares with the reference run, whose cost is 1.
SAME = ["workload", "bits", "size"]
MEMORY = "Peak memory is given for runs that had a separate process."
NO_MEMORY = "No peak memory: one process made several of these runs, and its peak only grows."
KIND = ("processor", "device", "threads")


def cost_table(runs: pd.DataFrame) -> Table:
    """Seconds from the loaded model to its codes, and peak memory: medians over seeds, and as multiples of GPTQ's.

    Statistics count with the time of their first computation, so compared runs need separate caches. `quantize x` is
    all but distillation. Without a run in a separate process there are no columns for memory.
    """
    runs = known(runs)
    medians = medians_of(run_costs(runs))
    table = with_multiples(medians, medians)
    memory = bool(table["memory"].notna().any())
    multiples = ("quantize", "total", "memory") if memory else ("quantize", "total")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "method": table["variant"],
            **{f"{stage} s": table[stage].map(lambda value: as_number(value, ".2f")) for stage in STAGES},
            **{f"{name} ×": table[f"{name} x"].map(lambda value: as_number(value, ".2f")) for name in multiples},
            **({"peak MiB": (table["memory"] / 2**20).map(lambda value: as_number(value, ".0f"))} if memory else {}),
            "n": table["n"].map(str),
        }
    )
    notes = []
    for workload, members in runs.groupby("workload", sort=True):
        for bits in sorted(set(finished(members)["bits/target"])):
            rows = table[(table["workload"] == workload) & (table["bits"] == bits)]
            if rows["reference"].isna().all():
                swept = ",".join(str(seed) for seed in usual_seeds(members))
                what = [f"method={REFERENCE}", f"bits={bits:g}", f"seed={swept}"]
                makes = workload_command(records(members)[0], what, source_of(runs))
                notes.append(f"{workload} at {bits:g} bits: no {title(REFERENCE)} to compare with: `{makes}`")
    caption = (
        f"Cost: medians over n = {counted(table['n'])} seeds. Seconds of the stages from the loaded model to its "
        "codes, statistics counted at what they took when they were computed; × are multiples of the fastest "
        f"undistilled {title(REFERENCE)} on the same workload, budget and calibration size, quantize × "
        f"without distillation. {MEMORY if memory else NO_MEMORY}{settings(runs)}"
    )
    of_memory = ["memory", "memory x"] if memory else []
    columns = ["workload", "bits", "variant", "method", *STAGES, "quantize x", "total x", *of_memory, "n", "reference"]
    numbers = table[columns]
    return make_table(cells, numbers, {}, caption, [*notes, *machines(runs), *failed(runs), *remarks_of(runs)])


def run_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """Seconds of the stages of every finished run, their sums with and without distillation, and its peak memory.

    `memory` (bytes) is NaN for a run whose process made other runs: the peak may be theirs. `size` are the other
    settings that a GPTQ must share with a run.
    """
    done = finished(runs)
    seconds = {stage: pd.to_numeric(done.get(f"time/{stage}_s", pd.Series(math.nan, done.index))) for stage in STAGES}
    frame = done[["workload", "variant", "method", "seed"]].assign(bits=done["bits/target"], **seconds)
    peak = pd.to_numeric(done.get("memory/peak_rss_bytes", pd.Series(math.nan, done.index))).astype("float64")
    return frame.assign(
        without=frame[list(STAGES[:-1])].sum(axis=1, min_count=1),
        total=frame[list(STAGES)].sum(axis=1, min_count=1),
        memory=peak.where(done[OWN_MEMORY].astype(bool)),
        size=["/".join(alike(run, ALIKE_IN_COST)) for run in records(done)],
    )


def with_multiples(costs: pd.DataFrame, medians: pd.DataFrame) -> pd.DataFrame:
    """`costs` beside the `base` seconds and `base memory` of their `reference`, and `... x`, the multiples of both.

    The reference is the fastest undistilled GPTQ on the same workload, budget and calibration size.

    Args:
        medians: over seeds, with the columns of `run_costs`.
    """
    plain = medians[(medians["method"] == REFERENCE) & (medians["distill"].fillna(0) == 0)]
    fastest = plain.sort_values(["total", "variant"]).drop_duplicates(SAME)
    fastest = fastest.rename(columns={"total": "base", "memory": "base memory", "variant": "reference"})
    table = costs.merge(fastest[[*SAME, "base", "base memory", "reference"]], "left", SAME)
    return table.assign(
        **{
            "quantize x": table["without"] / table["base"],
            "total x": table["total"] / table["base"],
            "memory x": table["memory"] / table["base memory"],
        }
    )


def medians_of(costs: pd.DataFrame) -> pd.DataFrame:
    """Medians over seeds, and n."""
    grouped = costs.drop(columns="seed").groupby(["workload", "bits", "variant", "size", "method"])
    return grouped.median().assign(n=grouped.size()).reset_index()


def machines(runs: pd.DataFrame) -> list[str]:
    """One line per workload with finished runs on several kinds of machine, whose seconds cannot be compared."""
    lines = []
    for workload, members in finished(runs).groupby("workload", sort=True):
        hosts = [run["host"] if isinstance(run.get("host"), Mapping) else {} for run in records(members)]
        kinds = dict.fromkeys(
            ", ".join(f"{host[key]}" + (" threads" if key == "threads" else "") for key in KIND if key in host)
            for host in hosts
        )
        if len(kinds) > 1:
            said = "; ".join(sorted(kind or "not recorded" for kind in kinds))
            lines.append(f"{workload}: seconds are of {len(kinds)} kinds of machine ({said}) and do not compare.")
    return lines
