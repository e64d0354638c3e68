"""The suite around the method: what turns a configuration into a result.

cli, composition, config, schema   the command line and what a configuration means; nothing here imports torch
labels, progress, summary   names of runs, the place in a sweep, the last table
models, datasets   networks and examples, one module each; tasks pairs them
runner        one run in stages, with plan (configuration -> objects), workload (network and data), record (what is
              written down)
calibration, fingerprint   statistics cached on disk; what decides a network's function
preflight, rehearsal   memory and disk a run will need; compilation before the clock starts
full_precision, results, tracking, provenance   cached outputs, files, Weights & Biases, where a result comes from
export, loading, packed   files for other tools, and networks from packed files
wandb_names, wandb_environment   names within W&B's limits, W&B's variables
code_digest   the code that a result comes from
"""
