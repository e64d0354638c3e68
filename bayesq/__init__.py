"""BayesQ: post-training quantization that minimises the posterior-expected loss increase."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesq.library import quantize as quantize
    from bayesq.report import Report as Report
    from bayesq.suite.loading import load_quantized as load_quantized

__version__ = "0.1.0"
# What is imported when it is first asked for: the command line checks its keys without torch.
_PUBLIC = {"quantize": "bayesq.library", "Report": "bayesq.report", "load_quantized": "bayesq.suite.loading"}


def __getattr__(name: str) -> Any:
    """`quantize`, `Report` and `load_quantized`."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
