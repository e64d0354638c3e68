"""The report as a Report in Weights & Biases: text and table from the results, panels from the project's runs."""

import math
from typing import TYPE_CHECKING, Any

from analysis.report.content import LAYER_VALUES, QUESTION, Content, interval_text, title_of, units
from analysis.table import Table, make_table
from bayesq.suite import wandb_panels as panels
from bayesq.suite.config import require_wandb_key
from bayesq.suite.errors import UserError
from bayesq.suite.wandb_names import LABEL_CHARACTERS, label, project_label

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report

# The heat maps of the layers, from the smallest to the largest value of a workload; UNRECORDED: no value above 0.
MAPPED = ("bits/code", "relative_error", "achieved_risk")
SHADES, UNRECORDED = "▁▂▃▄▅▆▇█", "·"
DESCRIPTION = "Written by python -m bayesq.suite.report"


def report(content: Content, project: str, entity: str) -> "Report":
    """Build the Report without saving it; this needs neither a login nor the network.

    The numbers of its text and table are those of `content`; its panels show the runs of the project.

    Raises:
        UserError: the package wandb-workspaces is missing.
    """
    panels.require_workspaces("report")
    import wandb_workspaces.reports.v2 as wr

    project = project_label(project)
    metrics = list(dict.fromkeys(content.table["metric"]))

    def grid(shown: list[Any], grouped: bool = True) -> Any:
        groups = [f"config.{key}" for key in panels.GROUPS] if grouped else []
        # a run set without a project uses that of the Report, and no account is needed to build it
        return wr.PanelGrid(runsets=[wr.Runset(groupby=groups)], panels=shown)

    return wr.Report(
        project=project,
        entity=entity,
        title=label(f"bayesq: {', '.join(map(title_of, units(content.table)))}", LABEL_CHARACTERS),
        description=DESCRIPTION,
        width="fluid",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Question"),
            wr.P(QUESTION),
            wr.UnorderedList(items=list(content.answers)),
            wr.H1("Main table"),
            wr.MarkdownBlock(text=main_table(content).markdown()),
            *([wr.MarkdownBlock(text=content.paired.markdown())] if content.paired else []),
            wr.H1("KL and score against bits"),
            grid(panels.quality(metrics)),
            wr.H1("Layers"),
            *([wr.CodeBlock(code=heat, language=None)] if (heat := layer_maps(content)) else []),
            grid(panels.layer_curves()),
            wr.H1("Compare runs"),
            grid([wr.RunComparer(diff_only="split"), panels.parallel_coordinates(metrics)], grouped=False),
            wr.H1("Commands"),
            wr.P("Every run of the table, from the folder of the repository:"),
            wr.CodeBlock(code="\n".join(line for _, _, line in content.commands), language=None),
        ],
    )


def main_table(content: Content) -> Table:
    """The table of the report: means over seeds with intervals and n, one row per workload, variant and budget."""
    table = content.table

    def numbers(column: str, form: str, form_of_ends: str) -> list[str]:
        ends = zip(table[column], table[f"{column}_low"], table[f"{column}_high"], strict=True)
        return [f"{mean:{form}} {interval_text(low, high, form_of_ends)}".strip() for mean, low, high in ends]

    cells = table.assign(
        workload=table["workload"].map(title_of),
        method=[content.looks[variant].label for variant in table["variant"]],
        bits=table["bits"].map("{:g}".format),
        n=table["n"].astype(str),
        score=numbers("score", ".2f", ".2f"),
        kl=numbers("kl", ".3g", ".2g"),
        stored=table["stored"].map("{:.3f}".format),
    )[["workload", "bits", "method", "n", "metric", "score", "kl", "stored"]]
    cells = cells.rename(columns={"kl": "KL (nats)", "stored": "stored bits"})
    return make_table(cells, table, {}, content.caption, content.remarks, padded=False)


def layer_maps(content: Content) -> str:
    """Heat maps of the layers as text, because W&B's panels have none: a line for each variant and budget.

    A character is a layer, in forward order, on a logarithmic scale of the workload's values.
    """
    maps = []
    for workload, here in content.layers.groupby("workload", sort=True):
        for key in MAPPED:
            values = here[key][here[key] > 0] if key in here else here["position"].head(0)
            if values.empty:
                continue
            low, high = float(values.min()), float(values.max())
            lines = {
                (variant, bits): "".join(shade(value, low, high) for value in rows.sort_values("position")[key])
                for (variant, bits), rows in here.groupby(["variant", "bits"], sort=True)
                if (rows[key] > 0).any()
            }
            names = {group: f"{content.looks[str(group[0])].label}, {group[1]:g} bits" for group in lines}
            width = max(map(len, names.values()))
            scale = f"{SHADES[0]} {low:.3g} to {SHADES[-1]} {high:.3g}"
            head = f"{title_of(str(workload))}: {LAYER_VALUES[key]} by layer, {scale}"
            maps.append("\n".join([head, *(f"{names[group]:{width}}  {line}" for group, line in lines.items())]))
    return "\n\n".join(maps)


def shade(value: float, low: float, high: float) -> str:
    """The character of a value on the logarithmic scale from low to high, 0 < low <= high."""
    if not value > 0:
        return UNRECORDED
    part = math.log(value / low) / math.log(high / low) if high > low else 0.0
    return SHADES[min(int(len(SHADES) * part), len(SHADES) - 1)]


def spec(built: "Report") -> dict[str, Any]:
    """The Report as W&B stores it."""
    stored: dict[str, Any] = built._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    return stored


def save(content: Content, project: str, entity: str) -> str:
    """Save the Report in the project and return its URL.

    Raises:
        UserError: there is no login, or W&B did not save the Report.
    """
    built = report(content, project, entity)
    require_wandb_key("report", "add --dry-run, which prints the Report without an account, or give --html PAGE")
    try:
        built.save()
        return str(built.url)
    except Exception as error:  # the client raises errors of many types
        raise UserError(f"W&B did not save the report ({type(error).__name__}: {error})") from error
