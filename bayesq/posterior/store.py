"""Whitenings of a network's layers for full-precision inputs, each made once for allocation and rounding."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.calibration.statistic import Statistic
from bayesq.contract import LayerProblem, naming
from bayesq.memory import give_back_freed
from bayesq.posterior.base import LayerPosterior, Posterior
from bayesq.scratch_file import TensorFile
from bayesq.whitening import Whitening

# Larger whitenings go to disk: the work on a wide layer needs the memory, and reading a whitening is much faster than
# making it again. All whitenings of MiniLM fit.
MEMORY_LIMIT = 160 * 2**20


class WhiteningStore:
    """A posterior whose whitenings are made once: their factorization is the most expensive part of a fit.

    A whitening stays in memory up to a limit. Beyond that it goes to the file, if there is one, or is made again at
    each use. A whitening's key has the name and rotation of its layer, so a store serves one network.

    Args:
        posterior: of the run.
        memory_limit: bytes of whitenings in memory.
        folder: existing folder of the file; None = no file.

    Attributes:
        seconds: time spent in `prepare` and in fits.
        key: identifies all that whitenings depend on, except layer and damping; see `take_over`.
        inherited_seconds: time that another store took for the whitenings of `take_over`.
        inherited_bytes: memory of those whitenings.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, posterior: Posterior, memory_limit: int = MEMORY_LIMIT, folder: Path | None = None) -> None:
        self.posterior, self.memory_limit = posterior, memory_limit
        self.seconds = self.inherited_seconds = 0.0
        self.inherited_bytes = 0
        self.key: str | None = None
        self._in_memory: dict[tuple[object, ...], Whitening] = {}
        self._on_disk: dict[tuple[object, ...], Whitening] = {}
        self._notes: dict[str, dict[str, float]] = {}  # what the fit of a layer noted, such as its prior precision
        self._file: TensorFile | None = TensorFile(folder) if folder is not None else None
        self._disk_is_full = False

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The calibration statistics that the posterior reads."""
        return self.posterior.statistics

    @property
    def nbytes(self) -> int:
        """Memory of the whitenings."""
        return sum(whitening.nbytes for whitening in self._in_memory.values())

    def use_disk(self, folder: Path) -> None:
        """Write all further whitenings to a file in `folder`, as long as the disk has space.

        Raises:
            OSError: the folder cannot be written.
        """
        self.release()
        self.memory_limit, self._file = 0, TensorFile(folder)

    def take_over(self, key: str, previous: "WhiteningStore | None") -> None:
        """Use the whitenings that the store of an earlier run has in memory, if its key is the same.

        The earlier store is always emptied: a sweep over seeds must not fill the memory.

        Args:
            key: identifies all that whitenings depend on, except layer and damping.
            previous: the earlier run's store, if any.
        """
        self.key = key
        if previous is None:
            return
        if previous.key == key:
            self._in_memory.update(previous._in_memory)
            self._notes.update(previous._notes)
            self.inherited_seconds = sum(whitening.seconds for whitening in self._in_memory.values())
            self.inherited_bytes = self.nbytes
        previous._in_memory.clear()

    def release(self) -> None:
        """Free the disk space after the last rounding. Whitenings in memory stay for `take_over`."""
        self._on_disk.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def prepare(self, layers: Sequence[LayerProblem]) -> None:
        """The posterior's `prepare`; before the first fit."""
        start = time.perf_counter()
        self.posterior.prepare(layers)
        self.seconds += time.perf_counter() - start

    def fit(self, layer: LayerProblem) -> LayerPosterior:
        """Posterior of one layer.

        Raises:
            Refused: it cannot be fitted; the message names the layer.
        """
        start = time.perf_counter()
        give_back_freed()  # the factors of a wide layer are the largest tensors of a run
        with naming(layer):
            fitted = self.posterior.fit(layer)
        self.seconds += time.perf_counter() - start
        return fitted

    def whitening(self, layer: LayerProblem, feedback: bool, damping: float) -> Whitening:
        """The layer's `LayerPosterior.whitening`, made once for the same arguments.

        Raises:
            Refused: it cannot be made; the message names the layer.
        """
        key = (layer.name, layer.rotation, feedback, damping)
        if key in self._in_memory:
            layer.notes |= {name: value for name, value in self._notes[layer.name].items() if name not in layer.notes}
            return self._in_memory[key]
        if self._file is not None and key in self._on_disk:
            give_back_freed()  # a whitening on disk is large, and so is the work with it
            return self._file.read(self._on_disk[key])
        start, before = time.perf_counter(), set(layer.notes)
        with naming(layer):
            whitening = self.fit(layer).whitening(feedback, damping)
        whitening.seconds = time.perf_counter() - start
        noted = {name: value for name, value in layer.notes.items() if name not in before}
        self._notes[layer.name] = self._notes.get(layer.name, {}) | noted
        self._store(key, whitening)
        return whitening

    def behind_prefix(self, layer: LayerProblem, feedback: bool, damping: float, moment: Tensor) -> Whitening:
        """The layer's whitening with another input moment in place of A; used once and not stored."""
        full = layer.statistic
        with_moment = replace(layer, statistic=lambda kind: moment if kind == INPUT_MOMENT.name else full(kind))
        with naming(layer):
            return self.fit(with_moment).whitening(feedback, damping)

    def _store(self, key: tuple[object, ...], whitening: Whitening) -> None:
        if self.nbytes + whitening.nbytes <= self.memory_limit:
            self._in_memory[key] = whitening
        elif self._file is not None and not self._disk_is_full:
            try:
                self._on_disk[key] = self._file.write(whitening)
            except OSError:  # later whitenings are made again, which only costs time
                self._disk_is_full = True
