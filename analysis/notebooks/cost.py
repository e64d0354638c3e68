# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---
# %% [markdown]
# # What preprocessing costs
#
# Seconds from the loaded model to its codes, calibration statistics, posterior, rounding and distillation included, and
# peak memory of the process, as multiples of GPTQ's on the same workload and budget (the fastest GPTQ that was run, its
# median over seeds). Points are medians over budgets and seeds, bars reach from the smallest to the largest. Statistics
# count what they cost when they were computed. Processes that made several runs report the peak of the largest so far,
# so memory compares only runs that had a process each (a parallel launcher, or one command a run).

# %%
from analysis import plots, tables
from analysis.comparisons import counted
from analysis.notebooks import Page

page = Page("cost")

# %%
data = plots.cost_data(page.main_runs)
compared = data.dropna(subset=["time x"])
if len(compared):
    caption = "Preprocessing time and peak memory as multiples of the fastest GPTQ's, median, smallest and largest over"
    caption += f" budgets and seeds; n = {counted(compared.groupby(['workload', 'variant']).size())} runs a point."
    page.figure(plots.cost(compared, page.looks), "cost_multiples", caption, data)

# %%
if len(page.finished):
    page.table(tables.cost_table(page.main_runs), "cost")

# %%
for workload in sorted(set(page.workloads) - set(compared["workload"])):
    page.say(
        f"{workload}: no GPTQ to compare with; `{page.command(workload, 'method=gptq', 'bits=3,3.5,4', 'seed=0,1,2')}`"
    )
