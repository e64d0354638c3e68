"""Read what runs left behind into data frames and tables."""

from pathlib import Path

import pandas as pd

from bayesq.suite.results import differing_settings, load_results, settings_of


def load_runs(source: str | Path) -> pd.DataFrame:
    """One row per finished run below `source` (a results folder), one column per key of result.json.

    Accuracies are fractions, KL is in nats, sizes are bits per quantized weight; `config`, `versions`, `host` and
    `git` hold mappings.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}")
    return pd.DataFrame(load_results(folder))


def main_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Methods x bit budgets: the primary metric in percent and the KL to full precision, means over n seeds.

    The index is (model, dataset, method) and every setting that separates runs of one method and budget, so that only
    runs which differ in nothing but the seed are averaged; the columns are the budgets. A cell reads
    `79.12 / 0.0123 (n=3)` and is empty where there is no run.
    """
    records = [{str(key): value for key, value in row.items()} for row in runs.to_dict("records")]
    differing = differing_settings(records)
    settings = [settings_of(record) for record in records]
    table = pd.DataFrame(
        {
            **{key: runs[key] for key in ("model", "dataset", "method")},
            **{key: ["-" if key not in own else str(own[key]) for own in settings] for key in differing},
            "bits": runs["bits/target"],
            "score": [record[f"q/{record['primary_metric']}"] for record in records],
            "kl": runs["q/kl_to_fp"],
        }
    )
    means = table.groupby(["model", "dataset", "method", *differing, "bits"]).agg(
        score=("score", "mean"), kl=("kl", "mean"), n=("score", "size")
    )
    cells = [f"{100 * score:.2f} / {kl:.4f} (n={n})" for score, kl, n in means.itertuples(index=False, name=None)]
    return pd.Series(cells, index=means.index).unstack("bits").fillna("")
