# %% [markdown]
# # Ablation
#
# One component switched at a time from the full method (`conf/ablation`). KL to full precision in nats, mean and sample
# standard deviation over calibration seeds, smallest first; the line is the full method's. Hollow markers are BayesQ
# with a component switched, squares are GPTQ.

# %%
from analysis import captions
from analysis.figures import ablation
from analysis.notebooks import Page
from analysis.paper import PROPOSED, REFERENCE
from analysis.tables.ablation import ablation_table

page = Page("ablation", tables=["ablation"])

# %%
data = ablation.data(page.runs)
for (workload, bits), points in data.groupby(["workload", "bits"]):
    population = captions.population(points.assign(variant=points["ablation"]), page.runs)
    caption = f"{workload} at {bits:g} bits: KL to full precision of ablations; {population}."
    members = page.runs[(page.runs["workload"] == workload) & (page.runs["bits/target"] == bits)]
    shown = members[members["variant"].isin([PROPOSED, REFERENCE])]
    page.figure(ablation.draw(points), caption, points, shown, workload, bits)

# %%
if page.finished.empty:
    page.nothing("no finished run", "python run.py -m ablation=full,gptq,allocator_uniform bits=3 seed=0,1,2")
else:
    page.table(ablation_table(page.runs), "ablation")
