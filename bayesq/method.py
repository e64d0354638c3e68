"""BayesQ from calibration statistics to codes, in the order of the paper."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from bayesq.codebook import Atoms, expected_lloyd, expected_uniform, level_kind, lloyd_table_bits
from bayesq.posterior import Posterior
from bayesq.quant.grids import mse_grid, zero_code
from bayesq.quant.method import Allocate, LayerProblem, check_finite, stack_groups
from bayesq.quant.tensor import Codebook, QuantizedTensor
from bayesq.rounding import Rounded, refit_rows, round_layer, rounding_gain
from bayesq.whitening import whitening

LEVELS = ("lloyd", "uniform")
ROUNDINGS = ("feedback", "nearest")


@dataclass
class _Candidate:
    """Best rounding of a layer so far: its rows, their risk, and the codebooks of the widths that have one."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    risk: Tensor
    codebooks: dict[int, Codebook]


class BayesQ:
    """Posterior-weighted quantization.

    Args:
        posterior: fits q(w) of a layer; see `bayesq.posterior`.
        levels: "lloyd" designs non-uniform levels for narrow widths, one table per width shared by the whole model,
            so that its storage vanishes; "uniform" designs step sizes only.
        posterior_noise: design levels for weights drawn from the posterior rather than for its mean. The risk of
            deploying w_hat is 1/2 (mu - w_hat)T P (mu - w_hat) + const, so codes chosen for the mean already minimise
            the posterior-expected distortion; blurring the cells as well measured no better (README).
        rounding: "feedback" or "nearest".
        refits: how often grids are refitted to the values rounding met, and the layers rounded again; 0 keeps each
            row's first affine grid.
        damping: fraction of the mean diagonal added to the input moment before it is factored.
    """

    sequential = False

    def __init__(
        self, posterior: Posterior, levels: str, posterior_noise: bool, rounding: str, refits: int, damping: float
    ) -> None:
        for key, value, choices in (("levels", levels, LEVELS), ("rounding", rounding, ROUNDINGS)):
            if value not in choices:
                raise ValueError(f"method.{key}={value}: choose one of {', '.join(choices)}")
        if refits < 0 or int(refits) != refits:
            raise ValueError(f"method.refits={refits}: needs a whole number of at least 0")
        if not damping >= 0:
            raise ValueError(f"method.damping={damping}: must be 0 or more")
        self.posterior, self.levels, self.posterior_noise = posterior, levels, posterior_noise
        self.rounding, self.refits, self.damping = rounding, int(refits), damping
        self.statistics = posterior.statistics

    def quantize(
        self, layers: Sequence[LayerProblem], allocate: Allocate
    ) -> Iterator[tuple[LayerProblem, QuantizedTensor]]:
        """Round all layers `refits + 1` times and yield each layer's best rounding."""
        for layer in layers:
            check_finite(layer)

        # Posterior, whitening and closed-form risk decide the widths before anything is rounded: `bayesq.allocation`.
        codebook_bits = self.refits * lloyd_table_bits() if self.levels == "lloyd" else 0
        widths = allocate(layers, codebook_bits)

        grids: dict[str, tuple[Tensor, Tensor]] = {}
        found: dict[str, _Candidate] = {}
        levels: dict[int, Tensor] = {}
        for refit in range(self.refits + 1):
            met: dict[int, Atoms] = {}
            bar = f"round {refit + 1} of {self.refits + 1}"
            # The caller sees the last pass layer by layer; the passes before it need a bar of their own.
            for layer in layers if refit == self.refits else tqdm(layers, desc=bar, disable=None, leave=False):
                width = widths[layer.name]
                posterior = self.posterior.fit(layer)
                geometry = whitening(posterior, self.rounding == "feedback", self.damping)

                # Rounding, on each row's own affine grid first and on the designed levels from then on
                if refit == 0:
                    layer.count("damping_retries", geometry.retries)
                    grids[layer.name] = mse_grid(stack_groups(layer.weight).to(torch.float64), width)
                tables = self._tables(levels, width, refit)
                books = {w: book.levels.to(torch.float64) for w, book in tables.items()}
                rounded = round_layer(layer.weight, geometry, *grids[layer.name], width, books)
                risk = stack_groups(posterior.row_risk(rounded.values.reshape(layer.weight.shape) - layer.weight))
                found[layer.name] = _better(found.get(layer.name), rounded, risk, tables, width)
                if refit == self.refits:
                    yield layer, _tensor(layer, found.pop(layer.name), width)
                    continue

                # Codebooks, on the values that rounding met
                gain = rounding_gain(geometry, layer.weight.shape[1])
                scale, zero = grids[layer.name] = refit_rows(rounded, gain)
                level_gain = gain * stack_groups(geometry.row_gain)[:, None] * scale[:, None].square()
                noise = stack_groups(posterior.variance()) if self.posterior_noise else torch.zeros_like(level_gain)
                units = rounded.met / scale[:, None] + zero[:, None]
                for w in _used(width):
                    rows = width == w
                    atoms = Atoms.of(units[rows], noise[rows] / scale[rows, None].square(), level_gain[rows], w)
                    met[w] = met[w].add(atoms) if w in met else atoms
            levels = {w: self._design(w, atoms, levels.get(w)) for w, atoms in met.items()}
            for layer in layers if levels else ():
                grids[layer.name] = self._fold_steps(*grids[layer.name], widths[layer.name], levels)
        # (Distillation and moment correction act on the yielded tensors: "BayesQ in full".)

    def _is_table(self, width: int) -> bool:
        return self.levels == "lloyd" and level_kind(width) == "lloyd"

    def _design(self, width: int, atoms: Atoms, start: Tensor | None) -> Tensor:
        """Levels [2**width] with least posterior-expected distortion for what rounding met, in level units."""
        mean, std, precision = atoms.gaussians()
        if self._is_table(width):
            start = torch.arange(2**width, dtype=torch.float64) if start is None else start
            return expected_lloyd(mean, std, precision, start)
        centre = (2**width - 1) / 2
        levels: Tensor = expected_uniform(mean - centre, std, precision, width) + centre
        return levels

    def _tables(self, levels: dict[int, Tensor], width: Tensor, refit: int) -> dict[int, Codebook]:
        """Codebooks of the widths that occur in a layer, named by width and the refit they come from."""
        return {
            w: Codebook(f"lloyd/{w}/{refit}", levels[w].to(torch.float16))
            for w in _used(width)
            if w in levels and self._is_table(w)
        }

    def _fold_steps(
        self, scale: Tensor, zero: Tensor, width: Tensor, levels: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Put the designed step of uniform levels, centre + (k - centre) h, into scale and zero: no table is stored."""
        scale, zero = scale.clone(), zero.clone()
        for w in _used(width):
            if w in levels and not self._is_table(w):
                rows, step, centre = width == w, float(levels[w][1] - levels[w][0]), (2**w - 1) / 2
                scale[rows] *= step
                zero[rows] = centre + (zero[rows] - centre) / step
        return scale, zero


def _used(width: Tensor) -> list[int]:
    """The different widths of a layer's rows."""
    return [int(w) for w in torch.unique(width)]


def _better(
    best: _Candidate | None, rounded: Rounded, risk: Tensor, tables: dict[int, Codebook], width: Tensor
) -> _Candidate:
    """The better of two roundings for the rows of each width: rows of a width share their codebook."""
    if best is None:
        return _Candidate(rounded.codes, rounded.scale, rounded.zero, risk, dict(tables))
    for w in _used(width):
        rows = width == w
        if float(risk[rows].sum()) < float(best.risk[rows].sum()):
            best.codes[rows], best.risk[rows] = rounded.codes[rows], risk[rows]
            best.scale[rows], best.zero[rows] = rounded.scale[rows], rounded.zero[rows]
            if w in tables:
                best.codebooks[w] = tables[w]
    return best


def _tensor(layer: LayerProblem, best: _Candidate, width: Tensor) -> QuantizedTensor:
    return QuantizedTensor(
        codes=best.codes,
        width=width,
        scale=best.scale[:, None].to(torch.float16),
        zero=zero_code(best.zero, width)[:, None],
        groups=layer.weight.shape[0],
        codebooks=best.codebooks,
    )
