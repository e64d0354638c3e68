"""Any sequence classifier of the transformers library, from the hub or from a folder.

Weights are read from safetensors only, and no code that comes with a checkpoint is ever run.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bayesq.suite.config import one_line
from bayesq.suite.datasets.base import DataSplits
from bayesq.suite.errors import UserError
from bayesq.suite.hub import MAIN, from_hub, reachable, tell_commit
from bayesq.suite.models.base import (
    Network,
    parameter_count,
    state_checksum,
)
from bayesq.suite.models.checkpoint import INTEGERS, checkpoint_sha256
from bayesq.suite.models.text import SequenceClassifier, config_of, label_order
from bayesq.suite.models.tokens import Tokens
from bayesq.suite.tasks import TEXT_REGRESSION

log = logging.getLogger(__name__)

UNNAMED = "transformers"  # the YAML's name of a model that nobody has named
SHORTEST = 8  # tokens: the special ones and a few words
# A folder has a tokenizer if it holds one of these; without any the library would make one up that knows no words.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "*.bpe.model", "tokenizer.model")

# Of characters or bytes: these need no such file.
CHARACTER_TOKENIZERS = ("CanineTokenizer", "ByT5Tokenizer", "PerceiverTokenizer")


@dataclass(frozen=True)
class Origin:
    """Where a classifier comes from.

    Attributes:
        key: as typed, for messages.
        place: folder, or id on the hub.
        local: whether it is a folder.
        revision: commit, tag or branch on the hub; None: its main branch.
        order: names of its logits in their order, if they have to be told.
        order_key: where those come from.
    """

    key: str
    place: str
    local: bool
    revision: str | None
    order: Sequence[str] | None
    order_key: str


class TransformersClassifier:
    """A fine-tuned sequence classifier with its tokenizer.

    Args:
        max_length: tokens a sentence (or pair) is truncated to, special ones included.
        source: id on the hub, or folder.
        checkpoint: folder with config.json, *.safetensors and the tokenizer's files; comes before `source` and `hub`.
        revision: commit, tag or branch on the hub; None: the one that `hub` names, else its main branch.
        label_order: names of the data set's classes in the order of the checkpoint's logits; None: the names in the
            checkpoint's config if they are the data set's, else the data set's order.
        hub: ids on the hub by task, for models with a checkpoint per task; ID@REVISION pins one.
        hub_label_order: `label_order` of those, by task.
    """

    def __init__(
        self,
        max_length: int,
        source: str | None = None,
        checkpoint: str | None = None,
        revision: str | None = None,
        label_order: Sequence[str] | None = None,
        hub: Mapping[str, str] | None = None,
        hub_label_order: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if max_length < SHORTEST:
            raise UserError(f"model.max_length={max_length} is not possible: choose at least {SHORTEST} tokens")
        if label_order is not None and (isinstance(label_order, str) or not label_order):
            raise UserError(f"model.label_order={label_order}: needs a list of class names, such as [no,yes], or null")
        self.max_length, self.source, self.checkpoint, self.revision = max_length, source, checkpoint, revision
        self.label_order = label_order
        self.hub, self.hub_label_order = hub or {}, hub_label_order or {}

    def build(self, data: DataSplits, cache_dir: Path) -> Network:
        """The classifier for `data`; `cache_dir` stays untouched (the hub has its own).

        Raises:
            UserError: files are missing or unreadable, the hub cannot be reached, it is no fine-tuned sequence
                classifier in safetensors, or its outputs are not the data set's.
        """
        origin = self._origin(data.subset)
        if origin.local:
            check_folder(origin)
            check_files(origin)
        online = not origin.local and reachable()
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not online}
        if not origin.local:
            options["revision"] = origin.revision or MAIN

        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = _loaded(origin, partial(AutoConfig.from_pretrained, origin.place, **options), online)
        if config.num_labels != data.num_classes:
            kind = "a score" if data.task == TEXT_REGRESSION else f"{data.num_classes} classes"
            raise UserError(
                f"{origin.key}: has {config.num_labels} outputs, but the data set has {kind}: choose a checkpoint that "
                f"was fine-tuned on this task"
            )
        names = [str(config.id2label[k]) for k in range(config.num_labels)]
        order, known_by = label_order(names, data.classes, origin.order, origin.order_key)
        tokenizer = _loaded(origin, partial(AutoTokenizer.from_pretrained, origin.place, **options), online)
        encode = Tokens(tokenizer, self.max_length, origin.key)
        # The initialisation, overwritten by the checkpoint, draws from the global generator.
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model, report = _loaded(
                origin,
                partial(
                    AutoModelForSequenceClassification.from_pretrained,
                    origin.place,
                    config=config,
                    use_safetensors=True,
                    dtype=torch.float32,
                    # Plain matrix products: deterministic in the backward pass on every device.
                    attn_implementation="eager",
                    experts_implementation="eager",
                    output_loading_info=True,
                    **options,
                ),
                online,
            )
        if report["missing_keys"]:
            raise UserError(
                f"{origin.key}: is no fine-tuned sequence classifier, it has no weights for "
                f"{', '.join(sorted(report['missing_keys']))}; `python -m bayesq.suite.finetune` makes one"
            )
        if unused := sorted(report["unexpected_keys"]):
            log.warning(
                "%s: %d weights are not part of a %s and stay unused, %s the first",
                origin.key,
                len(unused),
                type(model).__name__,
                unused[0],
            )
        encode.fit_to(model)
        module = SequenceClassifier(model, order).eval()
        encode.try_layouts(module, data.calibration_pool)
        description: dict[str, object] = {
            "architecture": type(model).__name__,
            "fp_source": origin.place,
            "label_order": known_by,
            "unused_weights": unused,
            "max_length": self.max_length,
            "batches": str(encode.layout),
            "parameters": parameter_count(module),
        }
        if origin.local:
            description["checkpoint_sha256"] = checkpoint_sha256(Path(origin.place))
        else:
            commit = getattr(config, "_commit_hash", None) or options["revision"]
            tell_commit(origin.key, origin.revision, commit, "model.revision")
            description["revision"] = commit
        return Network(
            module=module,
            encode=encode,
            checksum=state_checksum(module),
            description=description,
            blueprint={"classifier": config_of(model), "order": module.order},
        )

    def bare(self, blueprint: Mapping[str, Any]) -> nn.Module:
        """The network at a random initialisation, in evaluation mode."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        # The initialisation, which weights overwrite, draws from the global generator.
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            model = AutoModelForSequenceClassification.from_config(
                AutoConfig.for_model(**blueprint["classifier"]),
                attn_implementation="eager",
                experts_implementation="eager",
                dtype=torch.float32,
                trust_remote_code=False,
            )
        return SequenceClassifier(model, blueprint["order"]).eval()

    def _origin(self, task: str) -> Origin:
        """What the configuration and the data set's task say about the place.

        Raises:
            UserError: they say nothing.
        """
        own = (self.revision, self.label_order, "model.label_order")
        if self.checkpoint is not None:
            return Origin(f"model.checkpoint={self.checkpoint}", self.checkpoint, True, *own)
        if self.source == UNNAMED:
            raise UserError("model=transformers needs model.name=ID_ON_THE_HUB or model.checkpoint=DIR")
        if self.source is not None:
            local = Path(self.source).is_dir() or self.source.startswith((".", "/", "~")) or self.source.count("/") > 1
            return Origin(f"model.name={self.source}", self.source, local, *own)
        if task not in self.hub:
            raise UserError(
                "the model needs a checkpoint that was fine-tuned on this data set: add model.checkpoint=DIR (its YAML "
                f"names some on the hub for dataset=glue dataset.task={', '.join(self.hub) or '(none)'})"
            )
        repository, _, pinned = self.hub[task].partition("@")
        order, order_key = self.label_order, "model.label_order"
        if order is None and task in self.hub_label_order:
            order, order_key = self.hub_label_order[task], f"model.hub_label_order.{task}"
        revision = self.revision or pinned or None
        return Origin(f"model.hub.{task}={repository}", repository, False, revision, order, order_key)


def check_folder(origin: Origin) -> None:
    """Check that a folder has what a classifier needs, before anything slow is imported.

    Raises:
        UserError: naming what is missing.
    """
    folder = Path(origin.place)
    if not folder.is_dir():
        raise UserError(f"{origin.key}: there is no such folder")
    if not (folder / "config.json").is_file():
        raise UserError(f"{origin.key}: has no config.json, so it is no transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        pickled = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])), None)
        other = f" ({pickled.name} is a pickle, which is never opened: save it as safetensors)" if pickled else ""
        raise UserError(f"{origin.key}: has no model.safetensors{other}")
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES) and not _reads_characters(folder):
        raise UserError(f"{origin.key}: has no tokenizer (tokenizer.json or vocab.txt): save one there")


def _reads_characters(folder: Path) -> bool:
    """Whether the folder's tokenizer has no vocabulary, so that its configuration is all there is of it."""
    try:
        content = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("tokenizer_class") in CHARACTER_TOKENIZERS


def check_files(origin: Origin) -> None:
    """Check the headers of a folder's weights, which the library would convert whatever they hold.

    Raises:
        UserError: a file cannot be read, or holds whole numbers in place of weights.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(origin.place).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as content:
                kinds = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, LookupError) as error:
            raise UserError(f"{origin.key}: {file.name} cannot be read ({one_line(str(error))[:200]})") from error
        for name, kind in kinds.items():
            if not kind.startswith(("F", "BF")) and name.rpartition(".")[2] not in INTEGERS:
                raise UserError(f"{origin.key}: {file.name}: {name} holds {kind}, not floating-point weights")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """The transformers library neither warns nor draws progress bars: what matters is raised here."""
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


def _loaded(origin: Origin, load: Callable[[], Any], online: bool) -> Any:
    """`load()` with one line for whatever is wrong.

    Raises:
        UserError: a file is unreadable, or the hub does not answer.
    """
    if not origin.local:
        remedy = "give model.checkpoint=DIR with config.json, model.safetensors, tokenizer"
        return from_hub(origin.key, remedy, load, online)
    try:
        return load()
    except Exception as error:  # the library raises errors of several packages for a damaged file
        raise UserError(f"{origin.key}: cannot be read ({one_line(str(error))[:300]})") from error
