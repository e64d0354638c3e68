"""What every method shares and the only part of bayesq that baselines import.

layers    Linear and Conv2d as stacks of matrices, and their inputs as rows of samples
grids     affine and codebook grids: from a real number to a code and back
in_step   forward passes of several batches that wait for each other at chosen modules
correction  activation moments matched to the full-precision network's
feedback  successive rounding with error feedback (the routine GPTQ and BayesQ share)
tensor    QuantizedTensor, the one representation every method returns
packing   QuantizedTensor <-> bytes
accounting  bits counted on those bytes
gptq_layout  the same codes in the checkpoint layout of GPTQ tools
method    the protocol a method fulfils
"""
