"""BayesQ: post-training quantization that minimises the posterior-expected loss increase.

The paper is "BayesQ: Uncertainty-Guided Bayesian Quantization" (arXiv 2511.08821). In its order:

likelihood, fisher, calibration   what outputs mean, what goes backward, statistics of inputs and gradients
posterior, whitening              q(w) and the coordinates in which its risk is squared distance
codebook, rounding                levels and their tables; grids, risk, rounding (the loop over columns: quant.feedback)
allocation, knapsack, proxy       which row gets how many bits (also: budget, uniform, ilp)
method                            BayesQ itself, which calls them in that order
distillation, teacher, student    training of scales, levels, biases, norms (matching of moments: quant.correction)

Beyond the paper:

target, in_step                   inputs=prefix or paired: a layer's target, and the moments of its outputs
rotated                           rotate=true: any method in rotated columns (quant.rotation)
entropy, entropy_rounding         codec=entropy: steps, code tables, lengths of streams; BayesQ's rounds with it
entropy_scalar                    codec=entropy for methods with scalar codes

Around it:

contract, loop                    what a method is, the loop that runs every method
nearest                           rounding to nearest on affine grids, for RTN and embedding tables
recipe, pipeline, repair          from a network and examples to quantized tensors; correction and distillation
batches, observer                 encoded examples; called after each step, for a progress log
library, report                   `bayesq.quantize`, `bayesq.evaluate`
evaluation, metrics, coverage     both networks' outputs -> rows -> metrics; what share of a network is quantized
export                            folders that other programs read
walker, visits, kept_outputs      inputs carried from block to block (hidden_states: the inputs of one block)
defaults, errors, progress        the YAML files of conf/; the error `Refused`; progress bars
memory, files                     retries when memory runs out; atomic writes and locks
tensor_file, scratch_file         files of tensors: checked by a digest; temporary
quant                             layers, codes, packed files
suite                             models, data sets, configurations, tracking: everything that makes a run
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesq.library import evaluate as evaluate
    from bayesq.library import quantize as quantize
    from bayesq.report import Report as Report
    from bayesq.suite.loading import load_quantized as load_quantized

__version__ = "0.1.0"
# Imported on first use, so that the command line can check its keys without importing torch.
_PUBLIC = {
    "quantize": "bayesq.library",
    "evaluate": "bayesq.library",
    "Report": "bayesq.report",
    "load_quantized": "bayesq.suite.loading",
}


def __getattr__(name: str) -> Any:
    """The names of _PUBLIC."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
