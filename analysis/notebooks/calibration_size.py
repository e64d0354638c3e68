# %% [markdown]
# # How many calibration examples are needed
#
# KL to full precision and the primary metric against the number of calibration examples. For one seed a smaller
# calibration set is the beginning of a larger one. Means and sample standard deviations over seeds.

# %%
from analysis import captions
from analysis.figures import calibration_size
from analysis.notebooks import Page
from analysis.paper import PROPOSED, REFERENCE

SIZES = "calibration.examples=16,32,64,128,256,512,1024"  # of sweeps/calibration_size.yaml
page = Page("calibration_size")

# %%
data = calibration_size.data(page.runs)
for (workload, bits), points in data.groupby(["workload", "bits"]):
    population = captions.population(points, page.runs, "examples")
    caption = f"{workload} at {bits:g} bits: KL and score against calibration examples; {population}."
    members = page.runs[(page.runs["workload"] == workload) & (page.runs["bits/target"] == bits)]
    drawn = calibration_size.draw(points, page.looks_without("calibration.examples"))
    page.figure(drawn, caption, points, members, workload, bits, without=["calibration.examples"])

# %%
for workload in sorted(set(page.workloads) - set(data["workload"])):
    command = page.command(workload, f"method={REFERENCE},{PROPOSED}", "bits=3", "seed=0,1,2", SIZES)
    page.say(f"{workload}: no budget has runs with several calibration sizes among these; `{command}`")
