# %% [markdown]
# # The main table
#
# The primary metric of every method at 3, 3.5 and 4 bits, mean and sample standard deviation over calibration seeds,
# and the difference to the strongest GPTQ with its 95 % interval from a paired bootstrap over test examples and seeds.
# P values are Holm-corrected across the table; bold is significantly better than that GPTQ. The paper's
# differences are in a separate column: they are against another GPTQ, on other networks.

# %%
from analysis import gaps
from analysis.notebooks import Page
from analysis.tables.compact import compact_table
from analysis.tables.main import main_table

page = Page("main_table", tables=["main_table", "compact_table"])

# %%
if page.finished.empty:
    page.nothing("no finished run", gaps.main_sweep())
else:
    main = main_table(page.runs)
    page.table(main, "main_table")
    if not main.empty:
        page.table(compact_table(main, page.runs), "compact_table")
