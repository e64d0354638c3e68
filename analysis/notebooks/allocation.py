# %% [markdown]
# # Where the bits go
#
# Before anything is rounded, the knapsack chooses a width for each row by the risk it predicts, the expected increase
# of the loss in nats per example. Left: code bits per weight of each layer against the budget (grey). Middle: the share
# of a layer's rows at each width, from the packed file. Right: predicted against achieved risk of each layer, both
# summed over its rows; on the grey line they agree. Means over calibration seeds.

# %%
from analysis import captions
from analysis.figures import allocation
from analysis.figures.shared import shown_budgets
from analysis.notebooks import Page
from analysis.paper import PROPOSED

page = Page("allocation")

# %%
data = allocation.data(page.results.layers)
for workload, members in data.groupby("workload"):
    variant = allocation.main_variant(members, page.looks)
    chosen = members[members["variant"] == variant]
    runs = page.runs[(page.runs["workload"] == workload) & (page.runs["variant"] == variant)]
    widths = allocation.width_frame(runs)
    rank = ", ".join(
        f"{allocation.rank_correlation(chosen[chosen['bits'] == bits]):.2f} at {bits:g} bits"
        for bits in shown_budgets(chosen)
    )
    caption = f"{workload}, {variant}: bits per layer, widths of rows, and risk; rank correlation of predicted and "
    caption += f"achieved risk over {chosen['name'].nunique()} layers {rank}; {captions.seeds(chosen['n'])}. "
    caption += "Grey: the budget; equal risks."
    page.figure(allocation.draw(chosen, widths, page.looks[variant]), caption, chosen, runs, workload)

# %%
for workload in sorted(set(page.workloads) - set(data["workload"])):
    command = page.command(workload, f"method={PROPOSED}", "bits=3,3.5,4")
    page.say(f"{workload}: no run with allocator=knapsack among these; `{command}`")
