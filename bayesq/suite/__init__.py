"""The suite around the method: what turns a configuration into a result.

cli, composition, config   the command line and what a configuration means; nothing here imports torch before a run
construct, labels, progress, summary   objects of a configuration, names of runs, the place in a sweep, the last table
models, datasets   networks and examples, one module each
calibration, sequential, fingerprint   statistics cached on disk, or behind a quantized prefix; what decides a network's
              function
coverage, forward   what share of a network is quantized; networks that cannot run
rehearsal, terminal   compilation before the clock starts; what the terminal shows of long steps
runner        one experiment from config to result
evaluation, results, tracking, provenance   metrics, files and tables, Weights & Biases, where a result comes from
wandb_names, wandb_environment   names within W&B's limits, W&B's variables
code_digest   the code that a result comes from
cache, files, errors   whole-or-absent files, and errors that are one clear line
"""
