# %% [markdown]
# # Reliability: accuracy against confidence
#
# Reliability diagrams: test examples are sorted into the 15 bins of the expected calibration error by the probability
# of the predicted class; each point is a bin's mean probability against its accuracy, with an area that grows with the
# bin's share. Examples of all seeds are pooled. On the dotted line a network is calibrated.

# %%
from analysis.comparisons import counted
from analysis.figures import reliability
from analysis.figures.shared import shown_budgets
from analysis.notebooks import Page

page = Page("reliability")

# %%
examples = page.results.examples
data = reliability.data(examples[examples["run_id"].isin(page.main_runs["run_id"])])
for workload, bins in data.groupby("workload"):
    shown = bins[bins["bits"].isin(shown_budgets(bins))]
    pooled = counted(shown[shown["method"] != ""].groupby(["bits", "variant"])["n"].sum())
    caption = f"{workload}: accuracy against confidence; n = {pooled} predictions a line, seeds pooled;"
    caption += f" bins of fewer than {reliability.LEAST_IN_BIN} are not drawn, a marker's area is the share of its bin."
    members = page.main_runs[page.main_runs["workload"] == workload]
    page.figure(reliability.draw(shown, page.looks), caption, shown, members, workload)

# %%
for workload in sorted(set(page.workloads) - set(data["workload"])):
    page.say(
        f"{workload}: no recorded confidences; a regression has none, `python run.py ... force=true` records others"
    )
