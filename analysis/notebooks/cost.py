# %% [markdown]
# # What preprocessing costs
#
# Seconds from the loaded model to its codes, calibration statistics, posterior, rounding and distillation included, and
# peak memory of the process, as multiples of GPTQ's on the same workload and budget (the fastest GPTQ that was run, its
# median over seeds). Points are medians over budgets and seeds, bars reach from the smallest to the largest. Statistics
# count with the time of their first computation. A process that made several runs reports the peak of all runs so far,
# so memory is shown only for runs with a separate process (one command per run).

# %%
from analysis.comparisons import counted
from analysis.figures import cost
from analysis.methods import title
from analysis.notebooks import Page
from analysis.paper import REFERENCE
from analysis.tables.cost import MEMORY, NO_MEMORY, cost_table

page = Page("cost", tables=["cost"])

# %%
data = cost.data(page.main_runs)
compared = data.dropna(subset=["time x"])
if len(compared):
    memory = compared["memory x"].notna().any()
    points = counted(compared.groupby(["workload", "variant"]).size())
    caption = f"Preprocessing time{' and peak memory' if memory else ''} as multiples of the fastest "
    caption += f"{title(REFERENCE)}'s, median, smallest and largest over budgets and seeds; n = {points} runs a point."
    caption += f" {MEMORY if memory else NO_MEMORY}"
    members = page.main_runs[page.main_runs["workload"].isin(compared["workload"])]
    page.figure(cost.draw(compared, page.looks), caption, data, members, "multiples")

# %%
if len(page.finished):
    page.table(cost_table(page.main_runs), "cost")

# %%
for workload in sorted(set(page.workloads) - set(compared["workload"])):
    command = page.command(workload, f"method={REFERENCE}", "bits=3,3.5,4", "seed=0,1,2")
    page.say(f"{workload}: no {title(REFERENCE)} to compare with; `{command}`")
