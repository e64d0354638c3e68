# %% [markdown]
# # KL to full precision against bits
#
# Distance of the quantized network's predictions from those of the full-precision network, for every method and budget:
# the KL divergence in nats, averaged over the test examples, on a logarithmic axis. Points are means over calibration
# seeds, bars one sample standard deviation. A line breaks where a budget that other methods have was not run.

# %%
from analysis import captions, gaps
from analysis.figures import bit_curve, main_figure
from analysis.notebooks import Page

page = Page("main_figure")

# %%
data = bit_curve.data(page.main_runs)
if data.empty:
    page.nothing("no finished run", gaps.main_sweep())
else:
    population = captions.population(data, page.main_runs)
    caption = f"KL to full precision against code bits, mean and standard deviation; {population}."
    page.figure(main_figure.draw(data, page.looks), caption, data, page.main_runs, dpi=200)

# %%
page.missing(gaps.gaps(page.main_runs, source=page.source))
