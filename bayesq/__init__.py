"""BayesQ: post-training quantization that minimises the posterior-expected loss increase."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayesq.suite.loading import load_quantized as load_quantized

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_quantized`, imported when it is first asked for: the command line checks its keys without torch."""
    if name == "load_quantized":
        from bayesq.suite.loading import load_quantized

        return load_quantized
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
