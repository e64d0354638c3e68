"""What a run on a large language model will need, from its configuration alone: memory by part, work by part.

The network is on the meta device, so nothing is downloaded or allocated. Memory on the host is that of `preflight`.

python -m bayesq.suite.outlook llama-1b llama-8b
python -m bayesq.suite.outlook DIR/config.json --set method=gptq --set bits=4 --teraflops 100
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import Tensor, nn

from bayesq.batches import TensorExamples
from bayesq.calibration.memory import InMemoryStatistics, NetworkStatistics
from bayesq.calibration.passes import SUM_BYTES, CalibrationSettings, sum_bytes
from bayesq.calibration.statistic import Statistic, families
from bayesq.likelihood import TOKENS, Tokens
from bayesq.quant.blocks import find_blocks
from bayesq.quant.layers import MASK, Layer, quantizable_layers, weight_to_matrix
from bayesq.quant.usage import Usage
from bayesq.recipe import Recipe, Subject
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.composition import Preflight
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError
from bayesq.suite.models.causal_lm import LM_OPTIONS, NextTokens
from bayesq.suite.plan import make_recipe
from bayesq.suite.preflight import GIB, activations, estimate
from bayesq.walker import STORED_BYTES

# Published shapes of Llama 3.2 1B and Llama 3.1 8B, as in their config.json.
LLAMA = {
    **{"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072},
    **{"num_attention_heads": 32, "num_key_value_heads": 8},
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "llama-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
FLOAT = 4  # bytes


def subject_of(config: Mapping[str, Any], examples: int, window: int) -> Subject:
    """A language model of the transformers library on the meta device, whose blocks would be quantized on a GPU.

    `config` is the content of its config.json; there are `examples` calibration windows of `window` tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), **LM_OPTIONS)
        module = NextTokens(model).eval()
        tokens = torch.zeros(examples, window, dtype=torch.int64)
    head = [f"model.{name}" for name, child in model.named_modules() if child is model.get_output_embeddings()]
    layers = quantizable_layers(module, head)
    usage = Usage(layers, dict.fromkeys(layers, 1), (), ())
    data = TensorExamples({TOKENS: tokens}, torch.zeros(examples))
    return Subject(module, usage, data, Tokens(), torch.device("cuda"), blocks=find_blocks(module))


def matrices(subject: Subject) -> list[tuple[int, int]]:
    """Rows and columns of the quantized layers."""
    return [(r, c) for _, r, c in (weight_to_matrix(layer).shape for layer in subject.layers.values())]


def network_bytes(subject: Subject) -> int:
    """The parameters in float32."""
    return sum(x.nbytes for x in subject.module.parameters())


def hidden_bytes(subject: Subject) -> int:
    """Inputs of one block for all calibration windows, in one network."""
    model: Any = subject.module.model
    return FLOAT * _tokens(subject).numel() * int(model.config.get_text_config().hidden_size)


def _tokens(subject: Subject) -> Tensor:
    assert isinstance(subject.examples, TensorExamples)
    return subject.examples.inputs[TOKENS]


def statistics_of(subject: Subject, seed: int, batch_size: int, room: int) -> NetworkStatistics:
    """The statistics of a run, not computed; `room` as in `Passes`."""
    settings = CalibrationSettings(batch_size, None, seed, likelihood=subject.likelihood)
    return InMemoryStatistics(subject.module, subject.layers, subject.examples, settings, subject.device, room)


def passes_of(recipe: Recipe, statistics: NetworkStatistics) -> list[tuple[dict[str, Layer], list[Statistic]]]:
    """The passes that the statistics of full-precision inputs and gradients take."""
    return [one for family in families(recipe.statistics) for one in statistics.passes.plan(family)]


def memory(subject: Subject, recipe: Recipe, statistics: NetworkStatistics) -> dict[str, int]:
    """Bytes by part: what the GPU holds at once, what `preflight` expects of the host, and files."""
    window = _tokens(subject)[:1]
    # transformers reads the entries of a mask of two axes, which a meta tensor does not have
    mask = window.new_ones((1, 1, *2 * window.shape[1:]), dtype=torch.bool)
    one = activations(subject.module, {TOKENS: window, MASK: mask})
    weights, hidden = network_bytes(subject), hidden_bytes(subject)
    planned = passes_of(recipe, statistics)
    gpu = {
        "statistics": {
            "weights": weights,
            "one batch, forward and backward": statistics.batch_size * one.total,
            "sums of one pass": max(sum(sum_bytes(x, used) for x in layers.values()) for layers, used in planned),
        }
    }
    if recipe.inputs != "full":
        gpu["prefix"] = {
            "weights of both networks": 2 * weights,
            "inputs and outputs in one block": 2 * STORED_BYTES,
            "one batch, forward": 2 * statistics.batch_size * one.largest,
            "sums of the widest layer": 4 * FLOAT * max(c for _, c in matrices(subject)) ** 2,
        }
    missing = [one for family in families(recipe.statistics) for one in family]
    host = estimate(recipe, subject, statistics, missing, one, statistics.batch_size * one.largest, 0, True, 0)
    files = {
        "statistics": host.disk["cache_dir"],
        "factors": sum(recipe.whitenings.posterior.whitening_bytes((1, r, c)) for r, c in matrices(subject))
        if recipe.whitenings
        else 0,
        "inputs of two blocks": 4 * hidden if "prefix" in gpu and hidden > STORED_BYTES else 0,
    }
    return {
        **{f"GPU, {stage}: {part}": size for stage, parts in gpu.items() for part, size in parts.items()},
        **{f"GPU, {stage}: sum": sum(parts.values()) for stage, parts in gpu.items()},
        **{f"host: {stage}": size for stage, size in host.stages.items()},
        **{f"disk: {part}": size for part, size in files.items()},
    }


def work(subject: Subject, recipe: Recipe, statistics: NetworkStatistics, backward: int | None) -> dict[str, float]:
    """Floating-point operations by part, without those of attention (a few per cent).

    The gradients are of `backward` windows; None = all.
    """
    tokens, shapes = _tokens(subject).numel(), matrices(subject)
    share = 1.0 if backward is None else min(1.0, backward / len(subject.examples))
    forward = 2.0 * tokens * sum(x.weight.numel() for x in subject.module.modules() if isinstance(x, nn.Linear))
    taken = passes_of(recipe, statistics)
    gradients = [any(statistic.backward for statistic in used) for _, used in taken]
    passes = sum(forward * (3 * share if backwards else 1) for backwards in gradients)
    sums = sum(
        2.0 * tokens * (share * r * r if statistic.backward else c * c)
        for layers, used in taken
        for r, c in (weight_to_matrix(layer).shape[1:] for layer in layers.values())
        for statistic in used
    )
    groups = 4  # different inputs in a Llama's block: both networks run once for each; the prefix once more to go on
    prefix = (
        (2 * groups + 1) * forward + 2 * sum(2.0 * tokens * c * c for _, c in shapes)
        if recipe.inputs != "full"
        else 0.0
    )
    cubes = 2 if recipe.inputs != "full" else 1  # the factors for allocation, and those behind the prefix
    return {
        "GPU: statistics": passes + sums,
        "GPU: inputs behind the prefix": prefix * (cubes - 1),
        "host: factors, float64": sum(cubes * 8 / 3 * c**3 + r**3 / 3 for r, c in shapes),
        "host: feedback": sum(2 * 2.0 * r * c * c for r, c in shapes),
    }


def report(
    config: Mapping[str, Any], cfg: DictConfig, gpu: float, host: float, rounding: float, gpu_memory: int
) -> tuple[list[Any], ...]:
    """Rows (part, GiB) and (part, hours) of a network.

    Args:
        gpu, host: operations per second.
        rounding: seconds per weight of the search for codes.
        gpu_memory: bytes; a quarter of what the network leaves is for the sums of one pass, as in a run.
    """
    subject = subject_of(config, int(cfg.calibration.examples), int(cfg.dataset.window))
    room = max(SUM_BYTES, (gpu_memory - network_bytes(subject)) // 4)
    recipe = make_recipe(cfg)
    statistics = statistics_of(subject, recipe.seed, int(cfg.calibration.batch_size), room)
    backward = recipe.whitenings.posterior.examples if recipe.whitenings else None
    hours = [
        (part, count / (gpu if part.startswith("GPU") else host) / 3600)
        for part, count in work(subject, recipe, statistics, backward).items()
    ]
    hours.append(("host: search for codes", rounding * sum(r * c for r, c in matrices(subject)) / 3600))
    sizes = [(part, size / GIB) for part, size in memory(subject, recipe, statistics).items()]
    passes = float(len(passes_of(recipe, statistics)))
    return sizes, [*hours, ("sum", sum(hour for _, hour in hours)), ("(number of passes for statistics)", passes)]


def _config(name: str) -> Mapping[str, Any]:
    if name in SHAPES:
        return SHAPES[name]
    try:
        content: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: is neither {' nor '.join(SHAPES)} nor a config.json that can be read") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{name}: has no model_type: give the config.json of a causal language model of transformers")
    return content


def _report(name: str, config: Mapping[str, Any], cfg: DictConfig, *rates: Any) -> tuple[list[Any], ...]:
    try:
        return report(config, cfg, *rates)
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds of errors for sizes that do not fit
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        remedy = "give the config.json of a causal language model of transformers"
        raise UserError(f"{name}: no such network can be made ({reason}): {remedy}") from error


def main() -> None:
    """Print the tables; on an error, print one line and exit with code 1."""
    parser = module_parser("outlook", __doc__)
    parser.add_argument("networks", nargs="+", help=f"{', '.join(SHAPES)}, or a config.json of transformers")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="KEY=VALUE of the run")
    parser.add_argument("--teraflops", type=float, default=40.0, help="of the GPU in float32 (default 40)")
    parser.add_argument("--host-teraflops", type=float, default=0.5, help="of the host in float64 (default 0.5)")
    parser.add_argument("--rounding", type=float, default=0.5e-6, help="seconds per weight of the search for codes")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of the GPU (default 80)")
    given = parser.parse_args()
    needed = ["experiment=llama_wikitext", "dataset.root=.", "calibration.source=.", "method=bayesq", "bits=3"]
    try:
        for name in ("teraflops", "host_teraflops", "rounding", "gpu_memory"):
            if not 0 < getattr(given, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {getattr(given, name)}: choose a number above 0")
        configs = {name: _config(name) for name in given.networks}
        cfg = OmegaConf.create(Preflight().check([*needed, *given.overrides]).config)
        rates = 1e12 * given.teraflops, 1e12 * given.host_teraflops, given.rounding, int(GIB * given.gpu_memory)
        reports = [_report(name, config, cfg, *rates) for name, config in configs.items()]
    except UserError as error:
        exit_with(error)
    for title, tables in zip(("GiB", "hours"), zip(*reports, strict=True), strict=True):
        parts = list(dict.fromkeys(part for table in tables for part, _ in table))
        rows = [[part, *(dict(table).get(part) for table in tables)] for part in parts]
        print(tabulate(rows, [title, *given.networks], tablefmt="github", floatfmt=".2f"), end="\n\n")


if __name__ == "__main__":
    main()
