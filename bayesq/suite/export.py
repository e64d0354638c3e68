"""Write the network of a finished run for other programs.

python -m bayesq.suite.export results/<run_id> --to dequantized   plain fp16 weights, for timm and transformers
python -m bayesq.suite.export results/<run_id> --to packed        the whole network in one file, for load_quantized
python -m bayesq.suite.export results/<run_id> --to gptq          uniform 2, 3, 4 and 8 bit layers, for GPTQ tools
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import bayesq
from bayesq.errors import Refused
from bayesq.files import atomic_path
from bayesq.suite.arguments import module_parser
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError
from bayesq.suite.results import QUANTIZED_FILE, finished_result, write_json
from bayesq.suite.weight_files import (
    WEIGHTS_FILE,
    architecture,
    converted,
    new_folder,
    save,
    transformers_part,
    write_beside,
)

if TYPE_CHECKING:
    from bayesq.quant.file import Packed
    from bayesq.suite.models.base import Network

# What is written, and its name in the run's folder where no other place is given.
TARGETS = {"dequantized": "dequantized", "packed": "packed.safetensors", "gptq": "gptq"}
DTYPES = ("float16", "float32")
# Layers named one by one in a message; of more only the number is told.
SHOWN = 4


def load_run(folder: Path, settings: Mapping[str, Any], trusted: Sequence[str]) -> "tuple[Packed, Network]":
    """What a run packed, and its network with the quantized weights in it.

    Relative paths of the run's settings begin in the folder it was started in.

    Raises:
        UserError: it holds no finished run, its packed file is damaged, or its full-precision weights are gone or have
            changed.
    """
    result = finished_result(folder)
    if result is None:
        raise UserError(f"{folder}: there is no result of a finished run: give a folder results/<run_id>")
    from bayesq.quant.file import fill_from
    from bayesq.suite.loading import base_network
    from bayesq.suite.packed import read_run
    from bayesq.tensor_file import CorruptFile

    file = folder.absolute() / QUANTIZED_FILE
    directory = Path(result.get("host", {}).get("directory", "."))
    try:
        packed = read_run(file)
        if packed.run and packed.run["run_id"] != result.get("run_id"):
            raise UserError(f"{file} is of run {packed.run['run_id']}, not of {result.get('run_id')}")
        with chdir(directory) if directory.is_dir() else nullcontext():
            network = base_network(packed, file, settings, result["config"].get("cache_dir"), trusted)
        fill_from(network.module, packed, file)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or file}: there is no such file") from error
    except CorruptFile as error:
        raise UserError(str(error)) from error
    return packed, network


def write_dequantized(packed: "Packed", network: "Network", folder: Path, dtype: str) -> list[str]:
    """Plain weights: model.safetensors, for transformers config.json and the tokenizer, and a head of our own apart."""
    part = transformers_part(network.module)
    weights = converted(part.module.state_dict(), dtype)
    save(weights, folder / WEIGHTS_FILE)
    lines = [f"{WEIGHTS_FILE}: {len(weights)} tensors of {architecture(part, network)}"]
    return lines + write_beside(part, network, folder, {"dtype": dtype})


def write_gptq(packed: "Packed", network: "Network", folder: Path, dtype: str, checkpoint_format: str) -> list[str]:
    """Linear layers in the layout of GPTQ tools, all else as plain weights.

    Convolutions, embeddings and layers that do not come in whole blocks stay plain; quantize_config.json says so.

    Raises:
        UserError: a layer's grid has no place in the layout, or none is left for it.
    """
    from torch import nn

    from bayesq.quant.gptq_layout import BLOCK, fits_blocks, gptq_buffers
    from bayesq.quant.layers import find_layer, kind_of

    part = transformers_part(network.module)
    layers = {name: layer for name, layer in part.module.named_modules() if isinstance(layer, nn.Linear)}
    plain, buffers, widths = dict(part.module.state_dict()), {}, {}
    kinds = Counter(kind_of(find_layer(network.module, name)) for name in packed.tensors)
    for name in layers:
        tensor = packed.tensors.get(part.prefix + name)
        if tensor is None or not fits_blocks(tensor):
            continue
        try:
            packed_layer = gptq_buffers(tensor, checkpoint_format)
        except Refused as error:
            raise UserError(f"--to gptq cannot hold layer {part.prefix}{name}: {error}") from error
        del plain[f"{name}.weight"]
        buffers.update({f"{name}.{key}": value for key, value in packed_layer.items()})
        widths[name] = int(tensor.width[0])
    if not widths:
        raise UserError(
            f"--to gptq holds Linear layers whose inputs and outputs are multiples of {BLOCK}, and this network has "
            "none that is quantized: use --to dequantized"
        )
    group_sizes = {packed.tensors[part.prefix + name].group_size for name in widths}
    quantization = quantize_config(widths, list(layers), group_sizes.pop(), checkpoint_format)
    weights = converted(plain, dtype)
    save(weights | buffers, folder / WEIGHTS_FILE)
    write_json(folder / "quantize_config.json", quantization)
    plain_kinds = kinds - Counter(Linear=len(widths))
    bits = ", ".join(f"{count} of {width} bits" for width, count in sorted(Counter(widths.values()).items()))
    lines = [f"{WEIGHTS_FILE}: {len(widths)} layers as GPTQ ({bits}) of {architecture(part, network)}"]
    if plain_kinds:
        small = [name for name in layers if name not in widths]
        named = f" (of them Linear: {', '.join(small[:SHOWN])}{', ...' if len(small) > SHOWN else ''})" if small else ""
        counted = ", ".join(f"{count} {kind}" for kind, count in plain_kinds.items())
        lines.append(f"left as {dtype} weights, because the layout has no place for them: {counted}{named}")
    return lines + write_beside(part, network, folder, {"dtype": dtype, "quantization_config": quantization})


def quantize_config(
    widths: Mapping[str, int], layers: Sequence[str], group_size: int | None, checkpoint_format: str
) -> dict[str, Any]:
    """Content of quantize_config.json.

    Args:
        widths: of the layers in the layout, by name.
        layers: names of all Linear layers.
        group_size: inputs that share a scale; None = all of a layer.
        checkpoint_format: a key of gptq_layout.FORMATS.
    """
    (bits, _), *others = sorted(Counter(widths.values()).items(), key=lambda item: (-item[1], item[0]))
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in layers if name not in widths}
    if others:
        dynamic |= {f"+:^{re.escape(name)}$": {"bits": width} for name, width in widths.items() if width != bits}
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint_format,
        "bits": bits,
        "group_size": -1 if group_size is None else group_size,
        "desc_act": False,  # columns are stored in their own order, whatever order they were rounded in
        "sym": False,
        "lm_head": False,
        "true_sequential": False,
        "pack_dtype": "int32",
        "dynamic": dynamic,
        "meta": {"quantizer": [f"bayesq:{bayesq.__version__}"]},
    }


def write_self_contained(packed: "Packed", network: "Network", file: Path) -> list[str]:
    """The whole network in our own format; the file is loaded again before it gets its name.

    Raises:
        UserError: the kind of model cannot be built from a file alone.
    """
    import torch

    from bayesq.quant.file import Packed, write_packed
    from bayesq.quant.layers import weight_keys
    from bayesq.suite.loading import self_contained
    from bayesq.suite.packed import read_run

    expected = network.module.state_dict()
    quantized = weight_keys(network.module, packed.tensors)
    state = {name: value for name, value in expected.items() if name not in quantized}
    record = {**packed.run, "network": {**packed.run["network"], "blueprint": network.blueprint}}
    with atomic_path(file) as temporary:
        sizes = write_packed(temporary, Packed(packed.tensors, state=state, run=record))
        written = self_contained(read_run(temporary), file, trusted=[_package(record)]).state_dict()
        if any(not torch.equal(value, written[name]) for name, value in expected.items()):
            raise UserError(f"{file}: what was written is not the run's network, which is a defect of the exporter")
    total = file.stat().st_size
    return [f"{file.name}: {total:,} bytes, of them {sizes.packed:,} for {len(packed.tensors)} quantized layers"]


def _package(record: Mapping[str, Any]) -> str:
    """The package of a run's model: whoever exports a run has trusted it already."""
    return str(record["config"]["model"]["_target_"]).partition(".")[0]


def export(
    run: Path,
    target: str,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    checkpoint_format: str | None = None,
    force: bool = False,
    settings: Mapping[str, Any] | None = None,
    trusted: Sequence[str] = (),
) -> tuple[Path, list[str]]:
    """Write the network of a finished run; returns where, and what there is to know, line by line.

    Args:
        run: results/<run_id>.
        target: a key of TARGETS.
        output: a file for packed, else a folder; None: in the run's folder.
        dtype: of plain weights; None: float16.
        checkpoint_format: of gptq: "gptq" (None), or "gptq_v2": fewer tools read it, but it holds every zero point.
        force: replace what is there.
        settings, trusted: as of `load_quantized`.

    Raises:
        UserError: the request or the run does not allow it; nothing is written then.
    """
    output = _checked(run, target, output, dtype, checkpoint_format, force).absolute()
    packed, network = load_run(run, settings or {}, trusted)
    if target == "packed":
        return output, write_self_contained(packed, network, output)
    with new_folder(output) as folder:
        if target == "gptq":
            return output, write_gptq(packed, network, folder, dtype or "float16", checkpoint_format or "gptq")
        return output, write_dequantized(packed, network, folder, dtype or "float16")


def _checked(
    run: Path, target: str, output: Path | None, dtype: str | None, checkpoint_format: str | None, force: bool
) -> Path:
    """Where to write.

    Raises:
        UserError: an argument is not one of its values, does not belong to the target, or the place is taken.
    """
    from bayesq.quant.gptq_layout import FORMATS

    if target not in TARGETS:
        raise UserError(f"--to {target}: choose {', '.join(TARGETS)}")
    for option, value, values, targets in (
        ("--dtype", dtype, DTYPES, ("dequantized", "gptq")),
        ("--format", checkpoint_format, tuple(FORMATS), ("gptq",)),
    ):
        if value is not None and target not in targets:
            raise UserError(f"{option} {value}: belongs to --to {' or '.join(targets)}")
        if value is not None and value not in values:
            raise UserError(f"{option} {value}: choose {', '.join(values)}")
    if finished_result(run) is None:
        raise UserError(f"{run}: there is no result of a finished run: give a folder results/<run_id>")
    output = run / TARGETS[target] if output is None else output
    if output.exists() and output.is_dir() == (target == "packed"):
        raise UserError(f"--output {output}: {'a folder' if output.is_dir() else 'a file'} is in the way")
    if output.exists() and not force and (target == "packed" or any(output.iterdir())):
        raise UserError(f"--output {output}: is there already; --force replaces it")
    return output


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """Keys and values of `key=value`.

    Raises:
        UserError: one is not of this form.
    """
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: {one_line(str(error))}") from error
        if not equals:
            raise UserError(f"--set {text}: needs KEY=VALUE, such as model.checkpoint=/new/place")
    return settings


def main() -> None:
    """Write, and say what was written; exit code 1 and one line where that is not possible."""
    parser = module_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run: results/<run_id>")
    parser.add_argument("--to", required=True, help=", ".join(TARGETS))
    parser.add_argument("--output", type=Path, help="file (packed) or folder; default: in the run's folder")
    parser.add_argument("--dtype", help="of plain weights: float16 (default) or float32, which changes nothing")
    parser.add_argument("--format", help="of gptq: gptq (default), or gptq_v2, which holds zero points of 0 as well")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    parser.add_argument(
        "--set", action="append", default=[], help="KEY=VALUE: what the run read and lies elsewhere now"
    )
    parser.add_argument("--trust", action="append", default=[], help="package of a model or data set of your own")
    given = parser.parse_args()
    options = {"dtype": given.dtype, "checkpoint_format": given.format, "force": given.force, "trusted": given.trust}
    try:
        output, lines = export(given.run, given.to, given.output, settings=_settings(given.set), **options)
    except OSError as error:
        sys.exit(f"error: {error.filename or given.output}: {error.strerror or error}")
    except UserError as error:
        sys.exit(f"error: {one_line(str(error))}")
    print("\n".join([f"{output}", *(f"  {line}" for line in lines)]))


if __name__ == "__main__":
    main()
