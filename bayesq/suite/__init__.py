"""The suite around the method, from a configuration to a result: its modules in the order of a run.

The command, without torch:

cli, arguments, errors            entry point, parsers of command lines, the exception with a message for the user
composition, config, schema       from overrides to jobs; run ids; allowed values
launchers, progress               cores and GPUs of parallel runs; the place in a sweep
labels, results                   names of models in results; result files
newer_files, code_digest          input files and code that have changed since a run finished

One run:

runner, plan                      the stages; from the configuration to their objects
datasets, models, tasks           examples and networks, one module each; what pairs them
hub, workload                     downloads; the loaded network and data, and checks of their numbers
fingerprint, calibration          what determines a network's function; statistics cached on disk
preflight                         memory and disk that the run will need
full_precision, zeroshot          cached outputs of the network; questions for language models
rehearsal                         compilation before the clock starts
packed, record, provenance        the file of codes; the flat result; versions, host and git commit
summary                           the table at the end of a command

Weights & Biases:

tracking, wandb_history, plots    each run as a W&B run: result, steps, charts
wandb_environment, wandb_names    W&B's variables; labels within its limits
wandb_artifacts, relog            files with their lineage; runs that W&B lacks
dashboard, wandb_panels, report   workspace and Report

Other commands:

status, reproduce, outlook        states of runs; a run repeated and compared; needs of a large language model
loading, export                   networks from packed files; files for other programs
finetune, partial_training        checkpoints to quantize: all parameters, BitFit or LoRA
"""
