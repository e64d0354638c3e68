# %% [markdown]
# # A risk that predicts
#
# The layerwise risk that is minimised is not the loss that the network pays: errors add up between layers. The table
# shows the achieved risk of all layers over the measured KL to full precision, by method and budget, and whether runs
# with less risk also have less KL: Spearman's rank correlation over the runs of a workload, of all of them and by the
# inputs that the layers were calibrated on.

# %%
from analysis import gaps
from analysis.notebooks import Page
from analysis.tables.risk import risk_table

page = Page("risk", tables=["risk"])

# %%
if page.finished.empty:
    page.nothing("no finished run", gaps.main_sweep())
else:
    page.table(risk_table(page.runs), "risk")
