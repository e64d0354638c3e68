"""Any causal language model of the transformers library, from the hub, a folder, or a GGUF file.

Weights are read from safetensors or GGUF only, and code from a checkpoint is never run. The token embeddings stay in
full precision, and so does the head, unless model.quantize_head=true.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.gguf import GGUF, converted
from bayesq.suite.models.text import config_of
from bayesq.suite.models.transformers_model import (
    OPTIONS,
    Origin,
    check_folder,
    given_origin,
    load_tokenizer,
    load_weights,
    quiet_transformers,
)
from bayesq.suite.models.windows import Windows

UNNAMED = "causal_lm"  # the YAML's default for model.name
# The library chooses the attention: torch's fused one where the network has it. The plain one would store t x t numbers
# for each head of each layer until the backward pass.
LM_OPTIONS = {key: value for key, value in OPTIONS.items() if key != "attn_implementation"}
WRAPPED = "model."  # what `NextTokens` puts before the names of a network's modules


class NextTokens(nn.Module):
    """A causal language model whose output is its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [b, t, V] of the token after each position."""
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


@dataclass(frozen=True)
class CausalLM:
    """A causal language model with its tokenizer.

    Attributes: the keys of conf/model/causal_lm.yaml, which explains them. `checkpoint` overrides `source`.
    """

    source: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    quantize_head: bool = False

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network; a GGUF file is converted once and cached in `cache_dir`.

        Raises:
            UserError: the settings name no files, files are missing or unreadable, the hub cannot be reached, the
                checkpoint is no causal language model, or it has no tokenizer.
        """
        origin = given_origin(self.checkpoint, None if self.source == UNNAMED else self.source, self.revision)
        if origin is None:
            raise UserError("model=causal_lm needs model.name=ID_ON_THE_HUB or model.checkpoint=DIR_OR_GGUF_FILE")
        description: dict[str, object] = {}
        if origin.local and origin.place.lower().endswith(GGUF):
            folder, description = converted(Path(origin.place), origin.key, cache_dir)
            origin = Origin(origin.key, str(folder), True)
        if origin.local:
            check_folder(origin)
        from transformers import AutoConfig, AutoModelForCausalLM

        config = origin.load(AutoConfig)
        tokenizer = load_tokenizer(origin)
        model, unused = load_weights(origin, AutoModelForCausalLM, "causal language model", config, LM_OPTIONS)
        described = {"fp_source": origin.place, "unused_weights": unused, **origin.version(config), **description}
        return language_model(model, tokenizer, origin.key, described, self.quantize_head)

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**blueprint["config"])
        with quiet_transformers():
            return NextTokens(initialised(lambda: AutoModelForCausalLM.from_config(config, **LM_OPTIONS))).eval()


def language_model(
    model: Any, tokenizer: Any, key: str, description: Mapping[str, object], quantize_head: bool = False
) -> Network:
    """A network from a causal language model of the transformers library and its tokenizer.

    Raises:
        UserError: the head is to be quantized, but it shares its weight with the embedding.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    if quantize_head and (tied or head is None):
        raise UserError(f"model.quantize_head=true: {key} has no head of its own, it shares the embedding's weight")
    names = [WRAPPED + name for name, child in model.named_modules() if child is head]
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    described = {
        "architecture": type(model).__name__,
        **description,
        "embedding": "full precision",
        "head": "tied to the embedding, full precision" if tied else "quantized" if quantize_head else "full precision",
    }
    encode = Windows(tokenizer, key, positions if isinstance(positions, int) else None, table.num_embeddings)
    module = NextTokens(cast(nn.Module, model)).eval()
    exclude = () if tied or quantize_head else tuple(names)
    return Network(module, encode, described, {"config": config_of(model)}, left_out=exclude)
