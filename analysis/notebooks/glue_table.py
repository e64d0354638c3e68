# %% [markdown]
# # GLUE
#
# Scores of every task, the mean of its metrics times 100, and their average, which is a GLUE score only where no task
# is missing. Means and sample standard deviations over calibration seeds.

# %%
from analysis.notebooks import Page
from analysis.tables.glue import glue_table, has_glue

page = Page("glue_table", tables=["glue_table"])

# %%
if not has_glue(page.runs):
    page.nothing("no finished run of a GLUE task", "python run.py -m +experiment=glue bits=3,3.5,4 seed=0,1,2")
else:
    page.table(glue_table(page.runs), "glue_table")
