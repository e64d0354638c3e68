"""What every method shares: layers, codes, rounding, files. It imports no method and no statistic.

layers    what can be quantized as stacks of matrices, and its inputs as rows of samples
watch     what layers read and give in a forward pass, called or used through a function
attention  multi-head attention written out, so that its products can be watched
usage     how a network uses its layers, checked before the long work
grids     affine and codebook grids: from a real number to a code and back
one_by_one  parts of a batch, one example each
compiled  numba's compilation, cached on disk if possible
blocks    parts that a network runs one after the other
resume    forward passes of several batches that stop at chosen modules together
mean_takers  what absorbs a shift of the mean of a layer's outputs: its bias, or a norm
correction  activation moments matched to the full-precision network's
feedback  successive rounding with error feedback (the routine GPTQ and BayesQ share)
bitshift  searching codes along a trellis whose paths are rings of bits
entropy_search  searching entropy-coded codes, on a trellis or each separately
codes     decoding of a layer's codes: affine, tables shared or of each row, trellises, streams; weights in fp16
rotation  random Hadamard rotations of a layer's columns, or of both sides
tensor    QuantizedTensor, the one representation every method returns
bits      streams of bits
packing   QuantizedTensor <-> bytes
file      a model's packed file
network   quantized weights put into a network
accounting  bits counted on those bytes
layout    checkpoint layouts of other tools
gptq_layout  the same codes in the layout of GPTQ tools
compressed_layout  the same codes in the layout of compressed-tensors
"""
