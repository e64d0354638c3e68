# %% [markdown]
# # Accuracy and calibration from 2 to 8 bits
#
# The primary metric, the KL divergence to full precision, the negative log-likelihood of the labels and the
# expected calibration error (15 bins), against the bits of the codes alone (upper row) and of everything on disk
# (lower row). Means and sample standard deviations over calibration seeds; the grey line is the full-precision network.

# %%
from analysis import captions, gaps
from analysis.figures import bit_curve
from analysis.notebooks import Page

BUDGETS = (2, 2.5, 3, 3.5, 4, 5, 6, 7, 8)  # of sweeps/bit_curve.yaml
page = Page("bit_curve")

# %%
data = bit_curve.data(page.main_runs)
for workload, points in data.groupby("workload"):
    population = captions.population(points, page.main_runs)
    caption = f"{workload}: score, KL, NLL and ECE against code and stored bits; {population}."
    members = page.main_runs[page.main_runs["workload"] == workload]
    page.figure(bit_curve.draw(points, page.looks), caption, points, members, workload)

# %% [markdown]
# Missing runs of the whole curve from 2 to 8 bits, within the filters:

# %%
page.missing(gaps.gaps(page.main_runs, () if page.where else BUDGETS, page.source))
