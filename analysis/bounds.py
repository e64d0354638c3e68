"""How many bits finished runs are above the Gaussian rate-distortion bound, by layer (`analysis.rate_distortion`).

python -m analysis.bounds results      writes results/<run_id>/bounds.csv for runs without one

All methods are compared by the risk under the posterior of their configuration (K-FAC by default), also methods without
a posterior. Codes come from the packed file. Statistics come from the cache or are computed again.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from analysis.rate_distortion import layer_rates, risk_components
from bayesq.contract import LayerProblem
from bayesq.errors import Refused
from bayesq.pipeline import layer_order, layer_problems, refuse_unseen
from bayesq.posterior import WhiteningStore
from bayesq.quant.accounting import code_bits
from bayesq.quant.file import read_packed
from bayesq.suite.arguments import module_parser
from bayesq.suite.config import one_line, resolve_cache_dir
from bayesq.suite.errors import UserError
from bayesq.suite.plan import build, load_workload, open_statistics
from bayesq.suite.reproduce import recorded_config
from bayesq.suite.results import QUANTIZED_FILE, RESULT_FILE, finished_result, write_csv
from bayesq.tensor_file import CorruptFile

BOUNDS_FILE = "bounds.csv"
# Parts of a configuration that determine network, calibration examples and posterior.
SHARED = ("model", "dataset", "posterior", "calibration", "layers", "seed", "device", "cache_dir")


@dataclass
class Judge:
    """Statistics and posterior that runs of one network, calibration set and posterior share.

    Attributes:
        problems: the layers, in forward order.
        whitenings: fit q(w) of a layer.
        components: variances of each layer's risk components.
    """

    problems: list[LayerProblem]
    whitenings: WhiteningStore
    components: list[Tensor]

    @classmethod
    def of(cls, cfg: DictConfig) -> "Judge":
        """Load network and statistics.

        Raises:
            UserError: network or statistics cannot be loaded, or the posterior has no closed bound.
            Refused: no calibration example reaches some layer, or the posterior cannot be fitted.
        """
        cache_dir = resolve_cache_dir(cfg.cache_dir)
        whitenings = WhiteningStore(build(cfg.posterior))
        work = load_workload(cfg, cache_dir)
        statistics = open_statistics(cfg, whitenings, work, cache_dir)
        statistics.prepare(whitenings.statistics)
        refuse_unseen(statistics)
        problems = layer_problems(work.subject, statistics, layer_order(work.subject))
        whitenings.prepare(problems)
        try:
            components = [risk_components(whitenings.fit(problem), problem.weight) for problem in problems]
        except TypeError as error:
            raise UserError(f"posterior={cfg.posterior.name}: {error}; use kfac or diag") from error
        return cls(problems, whitenings, components)

    def rows(self, folder: Path) -> list[dict[str, Any]]:
        """The rows of bounds.csv for one run; risk in nats, all bits per weight of the layer.

        `bound_bits` is the bound of the layer at its risk. `shared_bound_bits` is its share of the bound of the whole
        network at the sum of all risks, with one water level.

        Raises:
            CorruptFile, OSError: the packed file cannot be read.
        """
        tensors = read_packed(folder / QUANTIZED_FILE).tensors
        errors = [tensors[problem.name].dequantize() - problem.weight for problem in self.problems]
        risks = [
            float(self.whitenings.fit(problem).risk(error).sum())
            for problem, error in zip(self.problems, errors, strict=True)
        ]
        separate, shared = layer_rates(self.components, risks)
        rows = []
        for problem, risk, bound, common in zip(self.problems, risks, separate, shared, strict=True):
            weights = problem.weight.numel()
            rows.append(
                {
                    "name": problem.name,
                    "weights": weights,
                    "bits/code": code_bits(tensors[problem.name]) / weights,
                    "risk": risk,
                    "bound_bits": bound / weights,
                    "shared_bound_bits": common / weights,
                }
            )
        return rows


def write_bounds(results_dir: Path, force: bool = False) -> list[str]:
    """Write bounds.csv for every finished run below `results_dir` without one.

    Network and statistics are loaded once for all runs that share them.

    Args:
        results_dir: folder of the runs.
        force: also replace an existing bounds.csv.

    Returns:
        one line for each run that was left out, with the reason.
    """
    start = Path.cwd()
    groups: dict[str, list[tuple[Path, Mapping[str, Any]]]] = {}
    for path in sorted(results_dir.absolute().glob(f"*/{RESULT_FILE}")):
        result = finished_result(path.parent)
        if result is None or ((path.parent / BOUNDS_FILE).is_file() and not force):
            continue
        groups.setdefault(_group(result), []).append((path.parent, result))
    left: list[str] = []
    for members in groups.values():
        try:
            left += _judge(members, start)
        except (UserError, Refused) as error:
            left += [f"{folder.name}: {one_line(str(error))}" for folder, _ in members]
        finally:
            os.chdir(start)
    return left


def _group(result: Mapping[str, Any]) -> str:
    shared = {key: result["config"].get(key) for key in SHARED}
    return json.dumps([shared, result["host"].get("directory"), result["source"]["weights"]], sort_keys=True)


def _judge(members: Sequence[tuple[Path, Mapping[str, Any]]], start: Path) -> list[str]:
    """Write the bounds of runs that share a judge; paths in their configuration are relative to their start folder."""
    _, result = members[0]
    config = recorded_config(result)
    directory = Path(result["host"].get("directory", start))
    if directory.is_dir():
        os.chdir(directory)
    judge = Judge.of(OmegaConf.create(config))
    left = []
    for folder, _ in members:
        try:
            write_csv(folder / BOUNDS_FILE, judge.rows(folder))
        except (CorruptFile, Refused, OSError) as error:
            left.append(f"{folder.name}: {one_line(str(error))}")
    return left


def main() -> None:
    """Write missing bounds; exit code 1 if a run was left out."""
    parser = module_parser("bounds", __doc__)
    parser.prog = "python -m analysis.bounds"
    parser.add_argument("results_dir", type=Path, help="a results folder, such as results")
    parser.add_argument("--force", action="store_true", help="also replace an existing bounds.csv")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments.results_dir.is_dir():
        sys.exit(f"error: {arguments.results_dir}: there is no such folder")
    left = write_bounds(arguments.results_dir, arguments.force)
    print("\n".join(left), end="\n" if left else "")
    written = len(list(arguments.results_dir.glob(f"*/{BOUNDS_FILE}")))
    print(f"{written} runs have a {BOUNDS_FILE}, {len(left)} were left out")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
