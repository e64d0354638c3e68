"""Calibration statistics: what a layer's inputs and output gradients are like over a set of examples.

statistic    the base class; one class per statistic says all there is to know of it
inputs       statistics of a layer's inputs; those of the gradients are in `bayesq.fisher`
samples      a layer's inputs and output gradients as samples, a few examples at a time
collector    running sums of all layers, from hooks on a network; runs the Fisher's backward passes
passes       which layers' sums share a pass over the examples; `collect`, in memory
order        layers in the order of their first call
memory       statistics that stay in memory, for `bayesq.quantize`
prefix       statistics of inputs behind the quantized prefix
"""
