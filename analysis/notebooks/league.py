# %% [markdown]
# # The league
#
# Every setting of every method by its KL to full precision, over workloads and budgets: mean ranks over the blocks
# that all ranked settings have, KL as a multiple of GPTQ's, and what it costs. The figure connects settings whose mean
# ranks do not differ significantly.

# %%
from analysis import gaps, style
from analysis.captions import known
from analysis.figures import league as figure
from analysis.notebooks import Page
from analysis.ranks import too_few
from analysis.tables.league import league_of, league_table, significance

page = Page("league", tables=["league_table"])

# %%
if page.finished.empty:
    page.nothing("no finished run", gaps.main_sweep())
else:
    page.table(league_table(page.runs), "league_table")

# %%
if not page.finished.empty:
    league = league_of(known(page.runs))
    why = too_few(*league.ranked.shape)
    if why:
        page.say(f"No figure of mean ranks: {why}.")
    else:
        data = figure.data(league)
        looks = style.looks(league.runs.assign(variant=league.runs["setting"]))
        caption = f"Mean ranks by KL; bars connect settings that do not differ significantly. {significance(league)}"
        page.figure(figure.draw(data, looks), caption, data, page.runs)
