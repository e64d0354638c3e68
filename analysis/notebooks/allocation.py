# ---
# jupyter:
#   kernelspec: {name: python3, display_name: Python 3, language: python}
# ---
# %% [markdown]
# # Where the bits go
#
# Before anything is rounded, the knapsack chooses a width for each row by the risk it predicts, the expected increase
# of the loss in nats per example. Left: code bits per weight of each layer against the budget (grey). Middle: the share
# of a layer's rows at each width, from the packed file. Right: predicted against achieved risk of each layer, both
# summed over its rows; on the grey line they agree. Means over calibration seeds.

# %%
from analysis import captions, packed, plots
from analysis.notebooks import Page

page = Page("allocation")

# %%
data = plots.allocation_data(page.layers)
for workload, members in data.groupby("workload"):
    variant = str(plots.main_variant(members, page.looks))
    own = members[members["variant"] == variant]
    runs = page.runs[(page.runs["workload"] == workload) & (page.runs["variant"] == variant)]
    widths = packed.width_frame(runs)
    rank = ", ".join(
        f"{plots.rank_correlation(own[own['bits'] == bits]):.2f} at {bits:g} bits" for bits in plots.shown_budgets(own)
    )
    caption = (
        f"{workload}, {variant}: bits per layer, widths of rows, and risk; rank correlation of predicted and achieved"
    )
    caption += (
        f" risk over {own['name'].nunique()} layers {rank}; {captions.seeds(own['n'])}. Grey: the budget; equal risks."
    )
    caption += captions.settings(runs)
    page.figure(plots.allocation(own, widths, page.looks[variant]), f"allocation_{plots.slug(workload)}", caption, own)

# %%
for workload in sorted(set(page.workloads) - set(data["workload"])):
    command = page.command(workload, "method=bayesq", "bits=3,3.5,4")
    page.say(f"{workload}: no run with allocator=knapsack among these; `{command}`")
