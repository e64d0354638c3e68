"""A report on a results folder: one HTML page that needs no network, or a Report in Weights & Biases.

It is not in the package bayesq, because its numbers are those of analysis/, which imports the suite and is not part of
the wheel. `python -m bayesq.suite.report` starts it.
"""
