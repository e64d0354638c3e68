"""Calibration statistics on disk: computed once per (model, data, settings) and shared by a whole sweep.

Each statistic has a file under <cache_dir>/statistics/<key>/. The key covers the model's weights, the calibration
examples, the layers and every setting that changes a number. `bayesq.calibration` and `bayesq.fisher` define the
statistics.
"""

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from bayesq.calibration.memory import NetworkStatistics
from bayesq.calibration.statistic import Source, Statistic, families, with_required
from bayesq.files import file_sha256, lock
from bayesq.quant.layers import ParameterLayer, groups_of, kind_of, weight_to_matrix
from bayesq.suite import code_digest
from bayesq.tensor_file import CorruptFile, tensor_writer, verify

log = logging.getLogger(__name__)

# Space in a file's header for its metadata, except the names of unreached layers.
METADATA_BYTES = 1024
# Bytes of running sums in a pass with calibration.offload=disk; a larger layer gets its own pass.
OFFLOADED_SUM_BYTES = 64 * 2**20


@dataclass(eq=False)
class Calibration(NetworkStatistics):
    """Statistics on disk; the dictionaries have the names of statistics as keys."""

    identity: str = field(kw_only=True)  # `Network.identity` of the network
    cache_dir: Path = field(kw_only=True)  # root of the caches
    seconds: dict[str, float] = field(init=False, default_factory=dict)  # without the shared forward passes
    forward_s: float = field(init=False, default=0.0)  # of the shared forward passes
    reused: dict[str, bool] = field(init=False, default_factory=dict)  # whether the file existed already
    oom_retries: dict[str, int] = field(init=False, default_factory=dict)  # how often memory ran out
    _paths: dict[Statistic, Path] = field(init=False, default_factory=dict)

    @cached_property
    def _content(self) -> dict[str, Any]:
        """The part of a file's key that all statistics share."""
        return {
            "torch": torch.__version__,
            "device": self.device.type,
            "model": self.identity,
            "architecture": repr(self.module),
            "examples": self.examples.checksum(),
            "layers": [
                (name, kind_of(layer), isinstance(layer, ParameterLayer), list(layer.weight.shape), groups_of(layer))
                for name, layer in self.layers.items()
            ],
            "batch_size": self.batch_size,
        }

    @property
    def _fisher(self) -> dict[str, Any]:
        """The settings in the keys of statistics that need gradients."""
        settings = self.settings
        return {
            "samples": settings.samples,
            "seed": settings.seed,
            "gradient_batches": -(-self.passes.gradient_examples(len(self.examples)) // settings.batch_size),
            "likelihood": settings.likelihood.name,
            "draws": settings.draws,
        }

    def out_of_memory(self) -> int:
        """How often passes over the examples ran out of memory."""
        return sum(self.oom_retries.values())

    def path(self, statistic: Statistic) -> Path:
        """File of one statistic."""
        if statistic not in self._paths:
            kind = {"format": statistic.format, "kind": statistic.name, **statistic.parameters}
            content = {**self._content, **(self._fisher if statistic.backward else {}), **kind, **_source(statistic)}
            key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
            self._paths[statistic] = self.cache_dir / "statistics" / key / f"{statistic.name}.safetensors"
        return self._paths[statistic]

    @property
    def keys(self) -> dict[str, str]:
        """The key of each prepared statistic's file, by name."""
        return {name: self.path(one).parent.name for name, one in sorted(self.statistics.items())}

    def prepare(self, statistics: Iterable[Statistic]) -> None:
        """Compute the statistics, and those they require, whose file is missing or corrupt.

        Another process that needs the same file waits for it.

        Raises:
            ValueError: two different statistics have the same name.
        """
        needed = families(statistics)
        self.statistics = with_required([*self.statistics.values(), *(one for family in needed for one in family)])
        for family in needed:
            with ExitStack() as locks:
                # every process locks in the order of `family`, which prevents deadlocks
                for statistic in family:
                    locks.enter_context(lock(self.path(statistic)))
                missing = [statistic for statistic in family if not self._check(statistic)]
                if missing:
                    self._compute(missing)

    def missing(self, statistics: Iterable[Statistic]) -> list[Statistic]:
        """The statistics, and those they require, whose file is missing."""
        return [one for family in families(statistics) for one in family if not self.path(one).exists()]

    @property
    def total_s(self) -> float:
        """Seconds that the prepared statistics would take without a cache."""
        return self.forward_s + sum(self.seconds.values())

    def load(self, layer: str, statistic: Statistic) -> Tensor:
        """One layer's statistic, read from disk."""
        with safe_open(self.path(statistic), framework="pt") as file:
            return cast(Tensor, file.get_tensor(layer))

    def _check(self, statistic: Statistic) -> bool:
        try:
            self._note(statistic, verify(self.path(statistic)), reused=True)
        except FileNotFoundError:
            return False
        except CorruptFile as error:
            log.warning("calibration cache: %s; computing it again", error)
            return False
        return True

    def _note(self, statistic: Statistic, metadata: Mapping[str, str], reused: bool) -> None:
        name = statistic.name
        self.seconds[name] = float(metadata["seconds"])
        self.forward_s = max(self.forward_s, float(metadata["forward_s"]))
        self.unseen |= set(json.loads(metadata["unseen"]))
        self.reused[name] = reused
        self.oom_retries[name] = int(metadata["oom_retries"])

    def _compute(self, statistics: Sequence[Statistic]) -> None:
        """Compute statistics of one family together and write their files."""
        start = time.perf_counter()
        first = statistics[0]
        with ExitStack() as files:
            room = len(json.dumps(json.dumps(list(self.layers)))) + METADATA_BYTES
            writers = {
                one: files.enter_context(tensor_writer(self.path(one), self._shapes(one), room)) for one in statistics
            }
            report, retries = self.compute(statistics, lambda layer, one, tensor: writers[one].write(layer, tensor))
            # Statistics that require no others can share one forward pass, so its time is counted once.
            total = time.perf_counter() - start
            shared = not first.requires and not first.alone
            forward = total - report.backward_s if shared else 0.0
            charged = [one for one in statistics if not (shared and one.source is Source.INPUTS)]
            for statistic, writer in writers.items():
                backward = statistic.source in (Source.OUTPUT_GRADIENTS, Source.WEIGHT_GRADIENTS)
                metadata = {
                    "seconds": f"{(total - forward) / len(charged) if statistic in charged else 0.0:.3f}",
                    "forward_s": f"{forward:.3f}",
                    "unseen": json.dumps(report.unseen),
                    "examples": str(report.gradient_examples if backward else len(self.examples)),
                    "oom_retries": str(retries if statistic == first else 0),  # counted once per pass
                }
                writer.finish(metadata)
                self._note(statistic, metadata, reused=False)

    def _shapes(self, statistic: Statistic) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            name: (torch.float32, statistic.shape(*weight_to_matrix(layer).shape))
            for name, layer in self.layers.items()
        }


def _source(statistic: Statistic) -> dict[str, Any]:
    """Class and source files of a user's statistic, which may change under one name; nothing for those of the suite."""
    kind = type(statistic)
    package = kind.__module__.partition(".")[0]
    if package in code_digest.OURS:
        return {}
    files = {Path(inspect.getfile(kind)), *code_digest.sources(package)}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "source": [file_sha256(file) for file in sorted(files)]}
