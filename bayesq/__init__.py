"""BayesQ: post-training quantization that minimises the posterior-expected loss increase."""

__version__ = "0.1.0"
