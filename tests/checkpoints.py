"""Checkpoints of the paper's sizes for machines without a hub: `python tests/checkpoints.py resnet50|bert_base --help`.

resnet50   timm's ResNet-50 (25.6 M parameters for ImageNet, 23.5 M with ten classes), trained from scratch for a few
           epochs on CIFAR-10 at low resolution: a real network with real, if modest, accuracy. Without --data: random
           weights, as below.
bert_base  a sequence classifier of BERT-base's sizes (110 M parameters) with random weights and MiniLM's vocabulary:
           what it predicts means nothing, what it costs to quantize is what BERT-base costs.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from bayesq.suite.datasets.cifar10 import Cifar10
from bayesq.suite.models.minilm import package_folder


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [n, 3, s, s] flipped at random and moved by up to an eighth of their size."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    reach = images.shape[-1] // 8
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return images.roll((dy, dx), (2, 3))


def train_resnet50(data: Path, output: Path, epochs: int, image_size: int, seed: int) -> float:
    """Train, save the weights as `output` (safetensors) and return the accuracy on the first 2,000 test images."""
    import timm

    torch.manual_seed(seed)  # a script of its own: the initialisation draws from the global generator
    splits = Cifar10(str(data), limit=2000).load(Path())
    module = timm.create_model("resnet50", pretrained=False, num_classes=10)
    mean, std = (torch.tensor(module.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))

    def encoded(images: object) -> Tensor:
        assert isinstance(images, Tensor)
        return (nn.functional.interpolate(images, size=image_size, mode="bilinear", antialias=True) - mean) / std

    train, labels = encoded(splits.calibration_pool.inputs), splits.calibration_pool.labels
    batch = 64
    steps = epochs * (len(train) // batch)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    module.train()
    with tqdm(total=steps, desc="train resnet50") as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(train), generator=generator).split(batch):
                if len(index) < batch:
                    continue
                loss = nn.functional.cross_entropy(module(augmented(train[index], generator)), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{float(loss):.3f}")
                bar.update()
    module.eval()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, output)
    with torch.inference_mode():
        predicted = torch.cat([module(x).argmax(1) for x in encoded(splits.evaluation.inputs).split(100)])
    return float((predicted == splits.evaluation.labels).double().mean())


def make_resnet50(output: Path, classes: int, seed: int) -> None:
    """Write timm's ResNet-50 with random weights as the file `output` (safetensors)."""
    import timm

    torch.manual_seed(seed)
    module = timm.create_model("resnet50", pretrained=False, num_classes=classes)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.contiguous() for name, x in module.state_dict().items()}, output)


def make_bert_base(output: Path, classes: int, seed: int) -> None:
    """Write config.json, model.safetensors and the tokenizer's files into the folder `output`."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    package = package_folder()
    vocabulary = json.loads((package / "config.json").read_text())["vocab_size"]
    BertForSequenceClassification(BertConfig(vocab_size=vocabulary, num_labels=classes)).save_pretrained(output)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (package / name).exists():
            shutil.copy(package / name, output / name)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["resnet50", "bert_base"])
    parser.add_argument("output", type=Path, help="resnet50: a .safetensors file; bert_base: a folder")
    parser.add_argument("--data", type=Path, help="resnet50: folder with CIFAR-10's train.parquet and test.parquet")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--classes", type=int, default=2, help="of a network with random weights")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.network == "bert_base":
        make_bert_base(given.output, given.classes, given.seed)
        return
    if given.data is None:
        make_resnet50(given.output, given.classes, given.seed)
        return
    accuracy = train_resnet50(given.data, given.output, given.epochs, given.image_size, given.seed)
    print(f"accuracy on the first 2,000 test images: {accuracy:.4f}")


if __name__ == "__main__":
    main()
