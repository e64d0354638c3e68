"""A random MPNet of a few kilobytes, in five packages that hold one zip file in parts, for tests."""

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch

from bayesq.files import file_sha256
from bayesq.suite.models.packages import SplitArchive

NAMES = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")  # padding is token 1, as MPNet's positions assume
WORDS = ("the", "a", "good", "bad", "fine", "poor", "warm", "cold", "film", "story", "number", "of", "train", "dev")
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 66}


def tiny_config(layers: int = 2, **changed: int):
    """A configuration with the token numbers of MPNet-base."""
    from transformers import MPNetConfig

    vocabulary = len(NAMES) + len(WORDS) + 30
    return MPNetConfig(vocab_size=vocabulary, num_hidden_layers=layers, initializer_range=0.3, **SIZES, **changed)


def write_files(folder: Path, seed: int = 0) -> None:
    """The encoder with its pooler, and its tokenizer, as the package has them."""
    from tokenizers import BertWordPieceTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import MPNetModel, PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MPNetModel(tiny_config())
        for parameter in model.parameters():  # biases and norms of the library's start are constants
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(folder)
    words = {name: i for i, name in enumerate([*NAMES, *WORDS, *map(str, range(30))])}
    backend = BertWordPieceTokenizer(words, unk_token="[UNK]", sep_token="</s>", cls_token="<s>", pad_token="<pad>")
    backend._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer,
        **{"unk_token": "[UNK]", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"},
        **{"model_max_length": 64, "model_input_names": ["input_ids", "attention_mask"]},
    ).save_pretrained(folder)


def write_packages(site: Path, files: Path, names: Mapping[str, str]) -> SplitArchive:
    """Install packages `names` (name to version) in `site`, with the files' zip in as many parts; what reads them."""
    memory = BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("network/1_Pooling/config.json", "{}")  # another file of that name
        for file in sorted(files.iterdir()):
            archive.write(file, f"network/{file.name}")
    content, size = memory.getvalue(), -(-len(memory.getvalue()) // len(names))
    for number, (name, version) in enumerate(names.items(), 1):
        folder = f"{name[:-4]}_{name[-3:]}"  # such a name cannot be imported
        part = f"{folder}/input/network.zip.{number:03}"
        (site / part).parent.mkdir(parents=True)
        (site / part).write_bytes(content[(number - 1) * size : number * size])
        about = site / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "RECORD").write_text(f"{folder}/__init__.py,,\n{part},,\n")
    wanted = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    return SplitArchive("mpnet_base", tuple(names.items()), {name: file_sha256(files / name) for name in wanted})
