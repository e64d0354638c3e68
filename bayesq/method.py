"""BayesQ from statistics to codes, in the order of the paper: widths, round, refit, round again."""

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.codebook import (
    Atoms,
    LevelSums,
    expected_lloyd,
    expected_uniform,
    level_unit,
    normal_distortion,
    start_levels,
    table_bits,
    table_price,
    table_widths,
)
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.entropy import full_width
from bayesq.entropy_rounding import CodedRounds
from bayesq.errors import Refused
from bayesq.posterior import WhiteningStore
from bayesq.quant.codes import Codebook, shared_code
from bayesq.quant.codes.trellis import POLYNOMIALS, uniform_levels
from bayesq.quant.grids import CLIP_STEPS, FP16_TINY, mse_grid, zero_code
from bayesq.quant.tensor import QuantizedTensor
from bayesq.quant.trellis import LEAST_TRELLIS_ROWS, trellis_distortion
from bayesq.rounding import Rounded, first_rows, refit_rows, round_layer, rounding_curvature
from bayesq.whitening import Whitening

# logs to the run's log file only, see hydra.job_logging in conf/config.yaml
details = logging.getLogger("bayesq.details")

LEVELS = ("trellis", "lloyd", "uniform")
ROUNDINGS = ("feedback", "nearest")
LARGEST_TRELLIS = max(POLYNOMIALS)
# All roundings but the last only serve the refits: a short trellis gives them nearly the same values as a long one for
# an eighth of the search, and a coarse scan is enough for the first ranges of affine rows.
REFIT_STATES = 8
FIRST_GRID_STEPS = 20
# Rows of fewer bits start on an affine grid, even if they use a table later. With designed first levels, 2-bit rows
# reach nearly the same risk (SST-2, seed 0: 1.04 times) but far more divergence (.148 against .056 nats).
LEAST_DESIGNED_START = 3


class BayesQ:
    """Posterior-weighted quantization.

    With codec=entropy `bayesq.entropy_rounding` does all of it but the posterior.

    Args:
        whitenings: fit q(w) of a layer and whiten by it; see `bayesq.posterior`.
        levels: "trellis" lets each column's codes choose among twice as many levels along a trellis, with one table
            of levels per width shared by the whole model (`bayesq.quant.trellis`); "lloyd" designs non-uniform levels
            for scalar codes, shared in the same way; "uniform" designs step sizes only.
        states: of the trellis; read by levels=trellis.
        posterior_noise: design scalar levels for weights drawn from the posterior rather than for its mean. The risk
            of deploying w_hat is 1/2 (mu - w_hat)T P (mu - w_hat) + const, so codes chosen for the mean already
            minimise the posterior-expected distortion; levels for draws measured worse (bayesq/README.md).
            On a trellis the codes fix the level of each weight, so noise moves no level.
        rounding: "feedback" or "nearest".
        refits: how often grids are refitted to the rounding targets, and the layers rounded again; 0 keeps each
            row's first affine grid.
        damping: fraction of the mean diagonal added to the input moment before it is factored.
    """

    entropy = True

    def __init__(
        self,
        whitenings: WhiteningStore,
        levels: str,
        states: int,
        posterior_noise: bool,
        rounding: str,
        refits: int,
        damping: float,
    ) -> None:
        for key, value, choices in (("levels", levels, LEVELS), ("rounding", rounding, ROUNDINGS)):
            if value not in choices:
                raise Refused(f"method.{key}={value}: choose one of {', '.join(choices)}")
        if states not in POLYNOMIALS:
            raise Refused(f"method.states={states}: choose one of {', '.join(map(str, POLYNOMIALS))}")
        if refits < 0 or int(refits) != refits:
            raise Refused(f"method.refits={refits}: needs a whole number of at least 0")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        if levels == "trellis" and posterior_noise:
            raise Refused(
                "method.posterior_noise=true: needs scalar levels, method.levels=lloyd or method.levels=uniform"
            )
        self.whitenings, self.levels, self.posterior_noise = whitenings, levels, posterior_noise
        self.states = states if levels == "trellis" else None
        self.rounding, self.refits = rounding, int(refits)
        self.damping = damping
        self.statistics = whitenings.statistics
        self._coded: CodedRounds | None = None

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose widths, first grids and tables of levels; round all layers `refits` times to refit both."""
        if context.stream is not None:
            self._coded = CodedRounds(context.stream, self.states, REFIT_STATES, LEAST_TRELLIS_ROWS)
            self._coded.prepare(layers, context, self.refits, self._whitening)
            return {layer.name: full_width(layer.rows) for layer in layers}
        for layer in layers:
            check_finite(layer)

        # Posterior, whitening and closed-form risk decide the widths before the first rounding: `bayesq.allocation`.
        self.tables = self._table_widths(layers)
        widths = allocate(layers, table_bits(self.tables, self.states), self.distortion)

        self._levels = {w: self._start(w) for w in self.tables}
        self._grids = {
            layer.name: self._first_grid(layer, widths[layer.name]) for layer in context.progress(layers, "first grids")
        }
        for refit in range(self.refits):
            rounds = context.progress(layers, f"round {refit + 1} of {self.refits + 1}")
            last = refit + 1 == self.refits
            self._refit(rounds, widths, last)
        return widths

    def _refit(self, layers: Iterable[LayerProblem], widths: Mapping[str, Tensor], report: bool) -> None:
        """Round all layers once, and refit grids and tables to the rounding targets: weights plus feedback."""
        seen: dict[int, LevelSums | Atoms] = {}
        single: list[tuple[int, LevelSums]] = []
        rounded_layers = []
        for layer in layers:
            rounded_layers.append(layer)
            width = widths[layer.name]
            rounded, whitening, _ = self._round(layer, self._grids[layer.name], width, REFIT_STATES)
            curvature = rounding_curvature(whitening, layer.weight.shape[1])
            self._grids[layer.name] = refit_rows(rounded, curvature)
            cost = curvature * stack_groups(whitening.row_curvature)[:, None]
            for w, new in self._collect(layer, rounded, self._grids[layer.name], cost).items():
                seen[w] = seen[w].add(new) if w in seen else new  # type: ignore[arg-type]
                if isinstance(new, LevelSums):
                    single.append((w, new))
            del rounded, whitening  # two wide layers would not fit in memory
        self._levels = {w: self._design(w, weights, self._levels.get(w, _codes(w))) for w, weights in seen.items()}
        for layer in rounded_layers:
            self._grids[layer.name] = self._fold_steps(*self._grids[layer.name], widths[layer.name], self._levels)
        if report:
            self._report_tables(rounded_layers, single, self._levels)

    def quantize_layer(self, layer: LayerProblem, width: Tensor, context: Context) -> QuantizedTensor:
        """The layer's last rounding, on the grid and with the tables of `prepare`."""
        whitening = None
        if layer.prefix_statistic is not None and INPUT_MOMENT in self.statistics:
            moment = layer.input_statistic(INPUT_MOMENT.name)
            whitening = self.whitenings.behind_prefix(layer, self.rounding != "nearest", self.damping, moment)
        if self._coded is not None:
            whitening = self._whitening(layer) if whitening is None else whitening
            layer.count("damping_retries", whitening.retries)
            return self._coded.last(layer, whitening)
        rounded, whitening, tables = self._round(layer, self._grids.pop(layer.name), width, whitening=whitening)
        layer.count("damping_retries", whitening.retries)
        return self._tensor(layer, rounded, width, tables)

    def distortion(self, layer: LayerProblem, width: int) -> float:
        """Expected squared error T_b of a code of `width` bits in this layer, for weights of unit variance."""
        states = self._trellis(layer)
        if states is not None:
            return trellis_distortion(width, states, width in self.tables)
        return normal_distortion("lloyd" if self._has_table(layer, width) else "uniform", width)

    def _table_widths(self, layers: Sequence[LayerProblem]) -> tuple[int, ...]:
        """Widths whose levels are stored as a table."""
        if self.refits == 0 or self.levels == "uniform":
            return ()
        return table_widths(sum(layer.weight.numel() for layer in layers), self.states)

    def _trellis(self, layer: LayerProblem) -> int | None:
        """States of the trellis a layer's codes run along; None: scalar codes."""
        return self.states if layer.weight.shape[1] >= LEAST_TRELLIS_ROWS else None

    def _has_table(self, layer: LayerProblem, width: int) -> bool:
        # Tables of a trellis have twice as many levels as a layer of scalar codes can name.
        return width in self.tables and (self.levels != "trellis" or self._trellis(layer) is not None)

    def _whitening(self, layer: LayerProblem) -> Whitening:
        return self.whitenings.whitening(layer, self.rounding != "nearest", self.damping)

    def _start(self, width: int) -> Tensor:
        """Levels of a table before the first rounding, in level units."""
        if width < LEAST_DESIGNED_START:
            return _codes(width) if self.states is None else uniform_levels(width)
        centre = (2**width - 1) / 2
        levels: Tensor = start_levels(width, self.states) / level_unit(width) + centre
        return levels

    def _first_grid(self, layer: LayerProblem, width: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R] of each row before the first rounding.

        A table need not contain zero, and a trellis may not reach it. So a row of zeros gets the smallest fp16 step,
        and its values differ from zero by less than that step.
        """
        weight = stack_groups(layer.weight).to(torch.float64)
        scale, zero = torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0])
        tables = [w for w in _used(width) if w >= LEAST_DESIGNED_START and self._has_table(layer, w)]
        affine = torch.isin(width, torch.tensor(tables, dtype=width.dtype), invert=True)
        if bool(affine.any()):
            steps = FIRST_GRID_STEPS if self.refits else CLIP_STEPS
            scale[affine], zero[affine] = mse_grid(weight[affine], width[affine], steps=steps)
            scale[affine] = scale[affine].masked_fill((weight[affine] == 0).all(1), FP16_TINY)
        if tables:
            curvature = rounding_curvature(self._whitening(layer), layer.weight.shape[1])
            scale[~affine], zero[~affine] = first_rows(weight[~affine], curvature[~affine], width[~affine])
        return scale, zero

    def _round(
        self,
        layer: LayerProblem,
        grid: tuple[Tensor, Tensor],
        width: Tensor,
        most_states: int = LARGEST_TRELLIS,
        whitening: Whitening | None = None,
    ) -> tuple[Rounded, Whitening, dict[int, Codebook]]:
        """One rounding of a layer, its whitening, and the tables it used."""
        whitening = self._whitening(layer) if whitening is None else whitening
        kind = "trellis" if self.levels == "trellis" else "lloyd"
        tables = {
            w: Codebook(f"{kind}/{w}", self._levels[w].to(torch.float16))
            for w in _used(width)
            if w in self._levels and self._has_table(layer, w)
        }
        books = {w: book.levels.to(torch.float64) for w, book in tables.items()}
        states = self._trellis(layer)
        states = min(states, most_states) if states is not None else None
        return round_layer(layer.weight, whitening, *grid, width, books, states), whitening, tables

    def _collect(
        self, layer: LayerProblem, rounded: Rounded, grid: tuple[Tensor, Tensor], curvature: Tensor
    ) -> dict[int, LevelSums | Atoms]:
        """Rounding targets of the rows of each width, in level units, weighted by the curvature [R, C]."""
        by_width: dict[int, LevelSums | Atoms] = {}
        scale, zero = (part[:, None] for part in grid)
        units, curvature = rounded.target / scale + zero, curvature * scale.square()
        widths, index = rounded.width, rounded.index()
        for w in _used(widths):
            rows = widths == w
            if self.levels == "trellis":
                if not self._has_table(layer, w):
                    continue
                by_width[w] = LevelSums.of(index[rows], units[rows], curvature[rows], 2 ** (w + 1))
            else:
                variance = torch.zeros_like(curvature[rows])
                if self.posterior_noise:
                    variance = stack_groups(self.whitenings.fit(layer).variance())[rows] / scale[rows].square()
                by_width[w] = Atoms.of(units[rows], variance, curvature[rows], w)
        return by_width

    def _report_tables(
        self, layers: Sequence[LayerProblem], single: Sequence[tuple[int, LevelSums]], levels: Mapping[int, Tensor]
    ) -> None:
        """Log how much risk separate tables for each layer would save at equal stored bits."""
        risk = sum(layer.notes.get("predicted_risk", 0.0) for layer in layers)
        if not single or risk == 0:
            return
        weights = sum(layer.weight.numel() for layer in layers)
        savings = [sums.excess(levels[w]) / risk - table_price(w, self.states, weights) for w, sums in single]
        paying = [saving for saving in savings if saving > 0]
        details.info(
            f"one table of levels per width: one per layer would pay in {len(paying)} of {len(savings)} cases and save "
            f"{100 * sum(paying):.2g} % of the predicted risk"
        )

    def _design(self, width: int, weights: LevelSums | Atoms, start: Tensor) -> Tensor:
        """Levels with least posterior-expected distortion for the rounding targets, in level units."""
        if isinstance(weights, LevelSums):
            return weights.centroids(start)
        mean, std, precision = weights.gaussians()
        if not len(mean):  # errors in these rows cost nothing, so all levels are equally good
            return start
        if width in self.tables:
            return expected_lloyd(mean, std, precision, start)
        centre = (2**width - 1) / 2
        levels: Tensor = expected_uniform(mean - centre, std, precision, width) + centre
        return levels

    def _fold_steps(
        self, scale: Tensor, zero: Tensor, width: Tensor, levels: Mapping[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Put the designed step of uniform levels, centre + (k - centre) h, into scale and zero: no table is stored."""
        scale, zero = scale.clone(), zero.clone()
        for w in _used(width):
            if w in levels and w not in self.tables:
                rows, step, centre = width == w, float(levels[w][1] - levels[w][0]), (2**w - 1) / 2
                scale[rows] *= step
                zero[rows] = centre + (zero[rows] - centre) / step
        return scale, zero

    def _tensor(
        self, layer: LayerProblem, rounded: Rounded, width: Tensor, tables: dict[int, Codebook]
    ) -> QuantizedTensor:
        return QuantizedTensor(
            codes=rounded.codes,
            width=width,
            scale=rounded.scale[:, None].to(torch.float16),
            zero=zero_code(rounded.zero, width)[:, None],
            groups=layer.weight.shape[0],
            code=shared_code(tables, self._trellis(layer)),
        )


def _codes(width: int) -> Tensor:
    """The levels of an affine code."""
    return torch.arange(2**width, dtype=torch.float64)


def _used(width: Tensor) -> list[int]:
    """The different widths of a layer's rows."""
    return [int(w) for w in torch.unique(width)]
