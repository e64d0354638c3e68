"""Any sequence classifier of the transformers library, from the hub or from a folder.

Weights are read from safetensors only, and code from a checkpoint is never run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.hub import MAIN, from_hub, reachable, tell_commit
from bayesq.suite.models.base import Network, initialised
from bayesq.suite.models.checkpoint import checkpoint_sha256, reading
from bayesq.suite.models.text import SequenceClassifier, config_of, label_order
from bayesq.suite.models.tokens import Tokens
from bayesq.suite.tasks import TEXT_REGRESSION

log = logging.getLogger(__name__)

UNNAMED = "transformers"  # the YAML's default for model.name
SHORTEST = 8  # tokens: special tokens and a few words
# Tables of integers 0, 1, 2, ... and counters: they are not weights.
INTEGERS = ("position_ids", "token_type_ids", "num_batches_tracked")
# The library's options in every build. With "eager", the backward pass is deterministic on every device.
OPTIONS: dict[str, Any] = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "dtype": torch.float32,
    "trust_remote_code": False,
}


@dataclass(frozen=True)
class Origin:
    """Where a network comes from.

    Attributes:
        key: the setting as typed, for messages.
        place: folder (`local`), or id on the hub.
        revision: commit, tag or branch on the hub; None: its main branch.
    """

    key: str
    place: str
    local: bool
    revision: str | None = None

    @cached_property
    def online(self) -> bool:
        """Whether files may be downloaded from the hub."""
        return not self.local and reachable()

    def load(self, kind: Any, **options: Any) -> Any:
        """`kind.from_pretrained` for a class `kind` of the library; any error becomes a UserError of one line."""
        options = {"trust_remote_code": False, "local_files_only": not self.online, **options}
        if self.local:
            return reading(self.key, lambda: kind.from_pretrained(self.place, **options))
        options["revision"] = self.revision or MAIN
        remedy = "give model.checkpoint=DIR with config.json, model.safetensors, tokenizer"
        return from_hub(self.key, remedy, lambda: kind.from_pretrained(self.place, **options), self.online)

    def version(self, config: Any) -> dict[str, str]:
        """What identifies the weights in the result file; `config` has the commit of a repository."""
        if self.local:
            return {"checkpoint_sha256": checkpoint_sha256(Path(self.place))}
        commit = getattr(config, "_commit_hash", None) or self.revision or MAIN
        tell_commit(self.key, self.revision, commit, "model.revision")
        return {"revision": commit}


def given_origin(checkpoint: str | None, source: str | None, revision: str | None) -> Origin | None:
    """The origin that model.checkpoint or model.name names; None if both are null."""
    if checkpoint is not None:
        return Origin(f"model.checkpoint={checkpoint}", checkpoint, True)
    if source is None:
        return None
    local = Path(source).exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    return Origin(f"model.name={source}", source, local, revision)


@dataclass(frozen=True)
class TransformersClassifier:
    """A fine-tuned sequence classifier with its tokenizer.

    Attributes: the keys of conf/model/transformers.yaml and bert_base.yaml, which explain them. `checkpoint` overrides
    `source`, and both override `hub`. Without a `label_order`, the names in the checkpoint's config give the order of
    the logits; if they are not the data set's classes, the orders count as equal.
    """

    max_length: int
    source: str | None = None
    checkpoint: str | None = None
    revision: str | None = None
    label_order: Sequence[str] | None = None
    hub: Mapping[str, str] | None = None
    hub_label_order: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        length, order = self.max_length, self.label_order
        if length < SHORTEST:
            raise UserError(f"model.max_length={length} is not possible: choose at least {SHORTEST} tokens")
        if order is not None and (isinstance(order, str) or not order):
            raise UserError(f"model.label_order={order}: needs a list of class names, such as [no,yes], or null")

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The classifier for `data`; `cache_dir` is not used (the hub has its own cache).

        Raises:
            UserError: files are missing or unreadable, the hub cannot be reached, the checkpoint is not a fine-tuned
                sequence classifier in safetensors, or its outputs do not fit the data set.
        """
        origin, order, order_key = self._origin(data.subset)
        if origin.local:
            check_folder(origin)

        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = origin.load(AutoConfig)
        if config.num_labels != data.num_classes:
            kind = "a score" if data.task == TEXT_REGRESSION else f"{data.num_classes} classes"
            kind += f" ({', '.join(data.classes)})" if data.classes else ""
            raise UserError(
                f"{origin.key}: has {config.num_labels} outputs, but the data set has {kind}: choose a checkpoint that "
                f"was fine-tuned on this task"
            )
        names = [str(config.id2label[k]) for k in range(config.num_labels)]
        positions, known_by = label_order(names, data.classes, order, order_key)
        encode = Tokens(load_tokenizer(origin), self.max_length, origin.key)
        what, remedy = "fine-tuned sequence classifier", "; `python -m bayesq.suite.finetune` makes one"
        model, unused = load_weights(origin, AutoModelForSequenceClassification, what, config, OPTIONS, remedy)
        encode.fit_to(model)
        module = SequenceClassifier(model, positions).eval()
        encode.try_layouts(module, data.calibration_pool)
        description = {
            "architecture": type(model).__name__,
            "fp_source": origin.place,
            "label_order": known_by,
            "unused_weights": unused,
            "max_length": self.max_length,
            "batches": str(encode.layout),
            **origin.version(config),
        }
        return Network(module, encode, description, {"classifier": config_of(model), "order": module.order})

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.for_model(**blueprint["classifier"])
        with quiet_transformers():
            model = initialised(lambda: AutoModelForSequenceClassification.from_config(config, **OPTIONS))
        return SequenceClassifier(model, blueprint["order"]).eval()

    def _origin(self, task: str) -> tuple[Origin, Sequence[str] | None, str]:
        """The origin from the settings and the data set's task; UserError if they name none.

        Also label names from the configuration, in the order of the logits (None: not configured), and their key.
        """
        if self.checkpoint is None and self.source == UNNAMED:
            raise UserError("model=transformers needs model.name=ID_ON_THE_HUB or model.checkpoint=DIR")
        if origin := given_origin(self.checkpoint, self.source, self.revision):
            return origin, self.label_order, "model.label_order"
        hub, orders = self.hub or {}, self.hub_label_order or {}
        if task not in hub:
            raise UserError(
                "the model needs a checkpoint that was fine-tuned on this data set: add model.checkpoint=DIR (its YAML "
                f"names some on the hub for dataset=glue dataset.task={', '.join(hub) or '(none)'})"
            )
        repository, _, pinned = hub[task].partition("@")
        origin = Origin(f"model.hub.{task}={repository}", repository, False, self.revision or pinned or None)
        if self.label_order is None and task in orders:
            return origin, orders[task], f"model.hub_label_order.{task}"
        return origin, self.label_order, "model.label_order"


def load_tokenizer(origin: Origin) -> Any:
    """The origin's tokenizer of the transformers library; UserError if it has none."""
    from transformers import AutoTokenizer

    tokenizer = origin.load(AutoTokenizer)
    # without these files, the library makes a tokenizer from the special tokens and up to two more
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 2:
        raise UserError(f"{origin.key}: has no tokenizer (tokenizer.json or vocab.txt): save one there")
    return tokenizer


def load_weights(
    origin: Origin, kind: Any, what: str, config: Any, options: Mapping[str, Any], remedy: str = ""
) -> tuple[Any, list[str]]:
    """The model of an origin, and the names of unused weights.

    `kind` is a class of the library. If weights are missing, the message says `what` such a model is, and `remedy`.

    Raises:
        UserError: a part of the network has no weights.
    """
    # the library initialises with the global generator before it loads the weights
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model, report = origin.load(kind, config=config, use_safetensors=True, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise UserError(
            f"{origin.key}: is no {what}, it has no weights for {', '.join(sorted(report['missing_keys']))}{remedy}"
        )
    if unused := sorted(report["unexpected_keys"]):
        log.warning(
            f"{origin.key}: {len(unused)} weights are not part of a {type(model).__name__} and stay unused, "
            f"{unused[0]} first"
        )
    return model, unused


def check_folder(origin: Origin) -> None:
    """Check the files of a local classifier before slow imports.

    The headers are checked too, because the library would convert integers to weights without an error.
    """
    folder = Path(origin.place)
    if not folder.is_dir():
        raise UserError(f"{origin.key}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{origin.key}: has no config.json, so it is no transformers checkpoint")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{origin.key}: has no model.safetensors (a pickle is never opened: save it as safetensors)")

    def kinds() -> dict[str, str]:
        with safe_open(file, framework="pt") as content:
            return {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118

    for file in files:
        for name, kind in reading(f"{origin.key}: {file.name}", kinds).items():
            if not kind.startswith(("F", "BF")) and name.rpartition(".")[2] not in INTEGERS:
                raise UserError(f"{origin.key}: {file.name}: {name} holds {kind}, not floating-point weights")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off warnings and progress bars of the transformers library; bayesq reports the problems itself."""
    from transformers.utils import logging as library

    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
