"""Calibration statistics of a layer's inputs and output gradients over a set of examples.

statistic    the base class; each statistic is one class
inputs       statistics of a layer's inputs; those of the gradients are in `bayesq.fisher`
samples      a layer's inputs and output gradients as samples, a few examples at a time
collector    running sums of all layers, from hooks on a network; runs the Fisher's backward passes
passes       the layers of each pass over the examples; `collect`, in memory
order        layers in the order of their first call
memory       statistics that stay in memory, for `bayesq.quantize`
prefix       statistics of inputs behind the quantized prefix
paired       moments of a layer's inputs in both networks: in full precision, and behind the prefix
block_samples  inputs and outputs of whole blocks, for methods that reconstruct them (BRECQ)
"""
