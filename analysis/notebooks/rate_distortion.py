# %% [markdown]
# # Bits above the Gaussian rate-distortion bound
#
# Bits per weight of a code above the lower bound of any code at the same risk. Each row of a layer is treated
# as a normal source of that row's variance $s_r^2$, the distortion is the risk $\frac12\delta^\top P\delta$ of
# the posterior with $P = A \otimes G$. It separates into independent components of variances
# $v_{ij} = \frac12\,\mathrm{eig}_i(S^{1/2} G S^{1/2})\,\mathrm{eig}_j(A)$, $S = \mathrm{diag}(s_r^2)$, and reverse
# water-filling gives
#
# $$D = \sum_{ij}\min(\theta, v_{ij}), \qquad
# R(D) = \sum_{ij} \max\left(0, \tfrac12\log_2\frac{v_{ij}}{\theta}\right).$$
#
# Left: code bits minus the network's bound, one water level $\theta$ for all layers at the sum of their risks.
# Middle: minus the bounds of the layers, each at its risk; the left panel exceeds this by the loss of the allocation of
# bits to layers. Right: layer by layer. All methods are compared by the same risk, on the inputs of the full-precision
# network: sequential GPTQ minimises another risk, on the inputs from the quantized prefix.
# `python -m analysis.bounds` computes the bounds of finished runs.

# %%
from analysis import captions
from analysis.figures import rate_distortion
from analysis.notebooks import Page

page = Page("rate_distortion")

# %%
bounds = rate_distortion.bounds_frame(page.main_runs)
for workload, members in bounds.groupby("workload"):
    points, layers = rate_distortion.data(members), rate_distortion.layer_gaps(members)
    caption = f"{workload}: code bits per weight above the Gaussian rate-distortion bound at the achieved risk, of the"
    caption += f" network, of its {layers['name'].nunique()} layers, and layer by layer;"
    caption += f" {captions.seeds(points['n'])}."
    runs = page.main_runs[page.main_runs["run_id"].isin(members["run_id"])]
    page.figure(rate_distortion.draw(points, layers, page.looks), caption, points, runs, workload)

# %%
without = page.finished[~page.finished["run_id"].isin(rate_distortion.bounds_frame(page.finished)["run_id"])]
if len(without):
    page.say(f"{len(without)} runs have no bounds.csv; `python -m analysis.bounds {page.source}`")
