"""The suite around the method: what turns a configuration into a result.

cli, config   the command line and what a configuration means; nothing here imports torch before a run begins
models, datasets   networks and examples, one module each
calibration   statistics, collected once and cached on disk
runner        one experiment from config to result
evaluation, results, tracking, provenance   metrics, files and tables, Weights & Biases, where a result comes from
cache, files, errors   whole-or-absent files, and errors that are one clear line
"""
