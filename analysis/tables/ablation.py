"""What the parts of BayesQ are worth."""

import math

import pandas as pd

from analysis.captions import (
    known,
    metrics,
    population_of_rows,
    remarks_of,
    settings,
    source_of,
)
from analysis.comparisons import (
    BASELINE,
    Examples,
    summarise,
)
from analysis.gaps import missing, workload_command
from analysis.loading import finished, records
from analysis.table import (
    LEVEL,
    Table,
    make_table,
)
from analysis.tables.rows import against, compared, measured, measured_cells, pick, shown_in
from bayesq.suite.composition import conf_dir


def ablation_table(runs: pd.DataFrame) -> Table:
    """Every variant of BayesQ and GPTQ against the full method, at the budgets where a variant of BayesQ ran."""
    runs = known(runs)
    done = finished(runs)
    means, examples, rows, notes = summarise(runs), Examples(), [], []
    full = "bayesq"
    for workload, members in runs.groupby("workload", sort=True):
        own_variants = done[(done["workload"] == workload) & (done["method"] == full) & (done["variant"] != full)]
        if own_variants.empty:
            sweep = [f"ablation={','.join(_ablations(members))}", "bits=3", "seed=0,1,2"]
            makes = workload_command(records(members)[0], sweep, source_of(runs))
            notes.append(f"{workload}: no variant of BayesQ among these runs: `{makes}`")
        for bits in sorted(set(own_variants["bits/target"])):
            here = members[(members["bits/target"] == bits) & members["method"].isin([full, BASELINE])]
            for variant in sorted({full, *here["variant"]}, key=lambda name: (name != full, name)):
                own = pick(done, workload, variant, bits)
                row = {"workload": workload, "bits": bits, "variant": variant, **measured(means, own)}
                if variant != full and not own.empty:
                    row["reference"] = full
                    where = f"{workload}, {variant} at {bits:g} bits"
                    found, said = against(examples, full, pick(done, workload, full, bits), own, where)
                    row |= found
                    notes += said
                rows.append(row)
                notes += missing(members, variant, [bits], source_of(runs))
    table = compared(rows, "full")
    cells = pd.DataFrame(
        {
            "workload": table["workload"],
            "bits": table["bits"].map("{:g}".format),
            "variant": table["variant"],
            **measured_cells(table, "full"),
        }
    )
    caption = (
        f"Ablation: {population_of_rows(table)}. Every row switches the named settings of the full method (bayesq). "
        f"Score: primary metric ({metrics(runs)}); score and KL to full precision (nats) are mean ± sample standard "
        "deviation over calibration seeds. Δ and the ratio of KL are against the full method, with 95 % intervals "
        "(paired bootstrap over examples and seeds). p: McNemar's exact test, where the metric is no accuracy the "
        "bootstrap's, "
        f"Holm-corrected over {int(table['p'].notna().sum())} tests. Bold: different from the full method at 5 %."
        f"{settings(shown_in(table, done))}"
    )
    significant = {"Δ full": table["p_holm"] < LEVEL}
    return make_table(cells, table, significant, caption, [*notes, *remarks_of(runs)])


def _ablations(members: pd.DataFrame) -> list[str]:
    """Names of the suite's ablations, without calibration sets larger than the pool of a workload."""
    pool = members.iloc[0]["config"]["dataset"].get("calibration_pool") or math.inf
    names = sorted(path.stem for path in (conf_dir() / "ablation").glob("*.yaml"))
    kept = [name for name in names if not (name.startswith("examples_") and int(name.partition("_")[2]) > pool)]
    return sorted(kept, key=lambda name: name != "full")
