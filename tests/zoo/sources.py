"""Random networks and data for the real runner: what a configuration's `_target_` names in these tests."""

from pathlib import Path
from typing import Any

import torch
from architectures import CLASSES, TIMM, TRANSFORMERS, Architecture, build_image
from torch import nn

from bayesq.batches import TensorExamples
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.models.base import Network
from bayesq.suite.tasks import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION

EXAMPLES = 16  # of calibration, and as many of evaluation
SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")  # tokens 0 to 3; the tokenizer puts the last behind each text
VOCABULARY, END = 60, 3
LONGEST = 32  # tokens that a classifier is asked to take
LENGTHS = (24, 4, 9, 17, 5, 24, 7, 13, 4, 21, 6, 11, 15, 8, 19, 10)


def splits(inputs: Any) -> DataSplits:
    """Calibration and evaluation on the two halves of the inputs."""
    task = IMAGE_CLASSIFICATION if isinstance(inputs, torch.Tensor) else TEXT_CLASSIFICATION
    labels = torch.arange(2 * EXAMPLES) % CLASSES
    whole = Examples(inputs, labels, [str(i) for i in range(2 * EXAMPLES)])
    pool, evaluation = (whole.select(part) for part in torch.arange(2 * EXAMPLES).split(EXAMPLES))
    return DataSplits(pool, pool, evaluation, CLASSES, "accuracy", {"origin": "random"}, task=task)


class Noise:
    """Images of noise around a grey of their own, each with another contrast."""

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with inputs [n, 3, pixels, pixels]."""
        draws = torch.Generator().manual_seed(0)
        count = 2 * EXAMPLES
        noise = torch.randn(count, 3, self.pixels, self.pixels, generator=draws)
        grey, contrast = torch.randn(count, 3, 1, 1, generator=draws), torch.linspace(0.2, 2, EXAMPLES).repeat(2)
        return splits(grey + contrast[:, None, None, None] * noise)


class Sentences:
    """Texts of very different length, whose words are drawn."""

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with texts; a text has as many tokens as LENGTHS says."""
        draws = torch.Generator().manual_seed(0)
        rows = [torch.randint(len(SPECIAL), VOCABULARY, (n - 1,), generator=draws).tolist() for n in 2 * LENGTHS]
        return splits([" ".join(f"w{number}" for number in row) for row in rows])


def random_weights(module: nn.Module) -> nn.Module:
    """The network with weights that make its layers matter: none is constant, and no branch is switched off."""
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                spread = max(float(parameter.std()), parameter[0].numel() ** -0.5)
                parameter.copy_(spread * torch.randn(parameter.shape, generator=draws))
            else:
                parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draws))
    return module.eval()


def find(name: str) -> Architecture:
    """A network of the two lists."""
    return next(one for one in (*TIMM, *TRANSFORMERS) if one.name == name)


class RandomImages:
    """A model source: a network of timm."""

    def __init__(self, architecture: str) -> None:
        self.architecture = find(architecture)

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The network; its attention is the plain product, as the suite's own source has it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = random_weights(build_image(self.architecture))
        for part in module.modules():
            if hasattr(part, "fused_attn"):
                part.fused_attn = False
        encode = lambda examples: TensorExamples({"x": examples.inputs}, examples.labels)  # noqa: E731
        return Network(module, encode, {})


def write_classifier(name: str, folder: Path) -> None:
    """A sequence classifier of the transformers library as people keep it: weights, configuration and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

    architecture = find(name)
    options = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2 * LONGEST,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": END,
        "decoder_start_token_id": END,
        "num_labels": CLASSES,
        "initializer_range": 0.02,
    }
    config = AutoConfig.for_model(architecture.factory)
    known = config.to_dict().keys() | type(config).attribute_map.keys()
    options = {key: value for key, value in options.items() if key in known or key.endswith("_token_id")}
    config = AutoConfig.for_model(architecture.factory, **(options | {"num_labels": CLASSES} | architecture.options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random_weights(AutoModelForSequenceClassification.from_config(config)).save_pretrained(folder)
    vocabulary = [*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), VOCABULARY))]
    pad, begin, unknown, end = SPECIAL
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, END)])
    PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=pad,
        bos_token=begin,
        unk_token=unknown,
        eos_token=end,
        padding_side=architecture.padding,
        model_max_length=LONGEST,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)
