"""BayesQ from statistics to codes, in the order of the paper: widths, round, refit, round again."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bayesq.calibration.inputs import INPUT_MOMENT
from bayesq.codebook import (
    Atoms,
    expected_lloyd,
    expected_uniform,
    level_unit,
    normal_distortion,
    normal_levels,
    table_bits,
    table_widths,
)
from bayesq.contract import Allocate, Context, LayerProblem, check_finite, stack_groups
from bayesq.entropy import full_width
from bayesq.entropy_rounding import CodedRounds
from bayesq.errors import Refused
from bayesq.posterior import WhiteningStore
from bayesq.quant.bitshift import bitshift_distortion
from bayesq.quant.codes import Codebook, Congruential, shared_code
from bayesq.quant.codes.bitshift import MULTIPLIERS, trellis_for
from bayesq.quant.grids import CLIP_STEPS, FP16_TINY, mse_grid, zero_code
from bayesq.quant.tensor import QuantizedTensor
from bayesq.rounding import Rounded, first_rows, refit_rows, round_layer, rounding_curvature
from bayesq.whitening import Whitening

LEVELS = ("trellis", "lloyd", "uniform")
ROUNDINGS = ("feedback", "nearest")
# Roundings before the last one serve only the refits: fewer states lead to nearly the same grids in less time. A coarse
# scan is enough for the first ranges of affine rows.
REFIT_STATES = 256
FIRST_GRID_STEPS = 20
# Rows of fewer bits start on an affine grid, even if they use a table later. With designed first levels, 2-bit rows
# reach nearly the same risk (SST-2, seed 0: 1.04 times) but far more divergence (.148 against .056 nats).
LEAST_DESIGNED_START = 3


class BayesQ:
    """Posterior-weighted quantization.

    With codec=entropy, `bayesq.entropy_rounding` does everything except the posterior.

    Args:
        whitenings: fit q(w) of a layer and whiten by it; see `bayesq.posterior`.
        levels: "trellis" lets the codes of each column choose among many levels along a trellis
            (`bayesq.quant.bitshift`); "lloyd" designs non-uniform levels for scalar codes, one table per width shared
            by the whole model; "uniform" designs step sizes only.
        states: of the trellis; read by levels=trellis. Short columns have fewer, see `trellis_for`.
        posterior_noise: design scalar levels for weights drawn from the posterior rather than for its mean. The risk
            of deploying w_hat is 1/2 (mu - w_hat)T P (mu - w_hat) + const, so codes chosen for the mean already
            minimise the posterior-expected distortion; levels for draws measured worse (bayesq/README.md). On a
            trellis the levels are not designed.
        rounding: "feedback" or "nearest".
        refits: how often grids are refitted to the rounding targets, and the layers rounded again; 0 keeps each
            row's first grid.
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
        if states not in MULTIPLIERS:
            raise Refused(f"method.states={states}: choose one of {', '.join(map(str, MULTIPLIERS))}")
        if refits < 0 or int(refits) != refits:
            raise Refused(f"method.refits={refits}: needs a whole number of at least 0")
        if not damping >= 0:
            raise Refused(f"method.damping={damping}: must be 0 or more")
        if levels == "trellis" and posterior_noise:
            raise Refused(
                "method.posterior_noise=true: needs scalar levels, method.levels=lloyd or method.levels=uniform"
            )
        self.whitenings, self.levels, self.posterior_noise = whitenings, levels, posterior_noise
        self.states = states
        self.rounding, self.refits = rounding, int(refits)
        self.damping = damping
        self.statistics = whitenings.statistics
        self._coded: CodedRounds | None = None

    def prepare(self, layers: Sequence[LayerProblem], allocate: Allocate, context: Context) -> Mapping[str, Tensor]:
        """Choose widths, first grids and tables of levels; round layers `refits` times to refit grids and tables."""
        if context.stream is not None:
            self._coded = CodedRounds(context.stream, self.levels == "trellis")
            self._coded.prepare(layers, context, self.refits, self._whitening)
            return {layer.name: full_width(layer.rows) for layer in layers}
        for layer in layers:
            check_finite(layer)

        # Posterior, whitening and closed-form risk decide the widths before the first rounding: `bayesq.allocation`.
        self.tables = self._table_widths(layers)
        widths = allocate(layers, table_bits(self.tables), self.distortion)

        self._levels = {w: self._start(w) for w in self.tables}
        self._grids = {
            layer.name: self._first_grid(layer, widths[layer.name]) for layer in context.progress(layers, "first grids")
        }
        for refit in range(self.refits):
            self._refit(context.progress(layers, f"round {refit + 1} of {self.refits + 1}"), widths)
        return widths

    def _refit(self, layers: Iterable[LayerProblem], widths: Mapping[str, Tensor]) -> None:
        """Round all layers once, and refit grids and tables to the rounding targets: weights plus feedback."""
        seen: dict[int, Atoms] = {}
        rounded_layers = []
        for layer in layers:
            rounded_layers.append(layer)
            width = widths[layer.name]
            rounded, whitening = self._round(layer, self._grids[layer.name], width, REFIT_STATES)
            curvature = rounding_curvature(whitening, layer.weight.shape[1])
            self._grids[layer.name] = refit_rows(rounded, curvature)
            if self.levels != "trellis":
                cost = curvature * stack_groups(whitening.row_curvature)[:, None]
                for w, new in self._collect(layer, rounded, self._grids[layer.name], cost).items():
                    seen[w] = seen[w].add(new) if w in seen else new
            del rounded, whitening  # two wide layers would not fit in memory
        self._levels = {w: self._design(w, weights, self._levels.get(w, _codes(w))) for w, weights in seen.items()}
        for layer in rounded_layers:
            self._grids[layer.name] = self._fold_steps(*self._grids[layer.name], widths[layer.name], self._levels)

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
        rounded, whitening = self._round(layer, self._grids.pop(layer.name), width, self.states, whitening)
        layer.count("damping_retries", whitening.retries)
        return QuantizedTensor(
            codes=rounded.codes,
            width=width,
            scale=rounded.scale[:, None].to(torch.float16),
            zero=zero_code(rounded.zero, width)[:, None],
            groups=len(layer.weight),
            code=self._trellis(layer, width, self.states) or shared_code(self._books(width)),
        )

    def distortion(self, layer: LayerProblem, width: int) -> float:
        """Expected squared error T_b of a code of `width` bits in this layer, for weights of unit variance."""
        rows = layer.weight.shape[1]
        trellis = trellis_for(rows * width, self.states) if self.levels == "trellis" else None
        if trellis is not None:
            return bitshift_distortion(width, trellis, rows, spread(width) * trellis.unit(width))
        return normal_distortion("lloyd" if width in self.tables else "uniform", width)

    def _table_widths(self, layers: Sequence[LayerProblem]) -> tuple[int, ...]:
        """Widths whose levels are stored as a table."""
        if self.refits == 0 or self.levels != "lloyd":
            return ()
        return table_widths(sum(layer.weight.numel() for layer in layers))

    def _trellis(self, layer: LayerProblem, width: Tensor, most_states: int) -> Congruential | None:
        """The trellis code of a layer with rows of these widths; None: scalar codes."""
        if self.levels != "trellis":
            return None
        return trellis_for(int(width.reshape(len(layer.weight), -1).sum(1).min()), most_states)

    def _whitening(self, layer: LayerProblem) -> Whitening:
        return self.whitenings.whitening(layer, self.rounding != "nearest", self.damping)

    def _start(self, width: int) -> Tensor:
        """Levels of a table before the first rounding, in level units."""
        if width < LEAST_DESIGNED_START:
            return _codes(width)
        levels: Tensor = normal_levels("lloyd", width) / level_unit(width) + (2**width - 1) / 2
        return levels

    def _first_grid(self, layer: LayerProblem, width: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero [R] of each row before the first rounding.

        A table need not contain zero, and a trellis may not reach it. So a row of zeros gets the smallest fp16 step,
        and its values differ from zero by less than that step.
        """
        weight = stack_groups(layer.weight).to(torch.float64)
        trellis = self._trellis(layer, width, self.states)
        if trellis is not None:
            unit, middle = _per_row(lambda w: spread(w) * trellis.unit(w), width), _per_row(trellis.middle, width)
            return first_rows(weight, self._curvature(layer), width, unit, middle)
        scale, zero = torch.empty_like(weight[:, 0]), torch.empty_like(weight[:, 0])
        tables = [w for w in _used(width) if w >= LEAST_DESIGNED_START and w in self.tables]
        affine = torch.isin(width, torch.tensor(tables, dtype=width.dtype), invert=True)
        if bool(affine.any()):
            steps = FIRST_GRID_STEPS if self.refits else CLIP_STEPS
            scale[affine], zero[affine] = mse_grid(weight[affine], width[affine], steps=steps)
            scale[affine] = scale[affine].masked_fill((weight[affine] == 0).all(1), FP16_TINY)
        if tables:
            unit, middle = _per_row(level_unit, width), (2 ** width.double() - 1) / 2
            parts = (part[~affine] for part in (weight, self._curvature(layer), width, unit, middle))
            scale[~affine], zero[~affine] = first_rows(*parts)
        return scale, zero

    def _curvature(self, layer: LayerProblem) -> Tensor:
        return rounding_curvature(self._whitening(layer), layer.weight.shape[1])

    def _round(
        self,
        layer: LayerProblem,
        grid: tuple[Tensor, Tensor],
        width: Tensor,
        most_states: int,
        whitening: Whitening | None = None,
    ) -> tuple[Rounded, Whitening]:
        """One rounding of a layer, and its whitening."""
        whitening = self._whitening(layer) if whitening is None else whitening
        books = {w: book.levels.to(torch.float64) for w, book in self._books(width).items()}
        trellis = self._trellis(layer, width, min(self.states, most_states))
        return round_layer(layer.weight, whitening, *grid, width, books, trellis), whitening

    def _books(self, width: Tensor) -> dict[int, Codebook]:
        """The tables of rows of these widths."""
        used = [w for w in _used(width) if w in self.tables]
        return {w: Codebook(f"lloyd/{w}", self._levels[w].to(torch.float16)) for w in used}

    def _collect(
        self, layer: LayerProblem, rounded: Rounded, grid: tuple[Tensor, Tensor], curvature: Tensor
    ) -> dict[int, Atoms]:
        """Rounding targets of the rows of each width, in level units, weighted by the curvature [R, C]."""
        by_width: dict[int, Atoms] = {}
        scale, zero = (part[:, None] for part in grid)
        units, curvature = rounded.target / scale + zero, curvature * scale.square()
        for w in _used(rounded.width):
            rows = rounded.width == w
            variance = torch.zeros_like(curvature[rows])
            if self.posterior_noise:
                variance = stack_groups(self.whitenings.fit(layer).variance())[rows] / scale[rows].square()
            by_width[w] = Atoms.of(units[rows], variance, curvature[rows], w)
        return by_width

    def _design(self, width: int, weights: Atoms, start: Tensor) -> Tensor:
        """Levels with least posterior-expected distortion for the rounding targets, in level units."""
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


def spread(width: int) -> float:
    """Standard deviation of a trellis' levels in that of the weights: near the best for normal weights."""
    return 1.04 + 0.04 * width


def _per_row(of_width: Callable[[int], float], width: Tensor) -> Tensor:
    """A function of the width for each row, float64 [R]."""
    return torch.tensor([of_width(w) for w in width.tolist()], dtype=torch.float64)


def _codes(width: int) -> Tensor:
    """The levels of an affine code."""
    return torch.arange(2**width, dtype=torch.float64)


def _used(width: Tensor) -> list[int]:
    """The different widths of a layer's rows."""
    return [int(w) for w in torch.unique(width)]
