"""Write the network of a finished run for other programs.

python -m bayesq.suite.export results/<run_id> --to dequantized   plain fp16 weights, for timm and transformers
python -m bayesq.suite.export results/<run_id> --to packed        the whole network in one file, for load_quantized
python -m bayesq.suite.export results/<run_id> --to gptq          uniform 2, 3, 4 and 8 bit layers, for GPTQ tools
python -m bayesq.suite.export results/<run_id> --to compressed-tensors    uniform 4 and 8 bits, for vLLM and others
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from bayesq.errors import Refused
from bayesq.export import write_dequantized, write_layout
from bayesq.files import atomic_path
from bayesq.quant.compressed_layout import CompressedLayout
from bayesq.quant.file import Packed, fill_from, write_packed
from bayesq.quant.gptq_layout import FORMATS, GPTQLayout
from bayesq.quant.layers import weight_keys
from bayesq.quant.layout import Layout
from bayesq.suite.arguments import exit_with, module_parser
from bayesq.suite.config import one_line
from bayesq.suite.errors import UserError
from bayesq.suite.loading import base_network, self_contained
from bayesq.suite.models.base import Network
from bayesq.suite.packed import read_run
from bayesq.suite.results import QUANTIZED_FILE, recorded_result
from bayesq.tensor_file import CorruptFile

# What each --to writes by default in the run's folder.
TARGETS = {
    "dequantized": "dequantized",
    "packed": "packed.safetensors",
    "gptq": "gptq",
    "compressed-tensors": "compressed-tensors",
}
DTYPES = ("float16", "float32")


def load_run(folder: Path, settings: Mapping[str, Any], trusted: Sequence[str]) -> tuple[Packed, Network]:
    """The packed file of a run, and its network with the quantized weights.

    Relative paths in the run's settings start at the folder in which the run was started. Raises UserError if there is
    no finished run, its packed file is damaged, or its full-precision weights are missing or have changed.
    """
    result = recorded_result(folder)
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


def write_self_contained(packed: Packed, network: Network, file: Path) -> list[str]:
    """Write the whole network in our format; the file is loaded and compared before it gets its name.

    Raises UserError if this kind of model cannot be built from a file alone.
    """
    expected = network.module.state_dict()
    quantized = weight_keys(network.module, packed.tensors)
    state = {name: value for name, value in expected.items() if name not in quantized}
    record = {**packed.run, "network": {**packed.run["network"], "blueprint": network.blueprint}}
    with atomic_path(file) as temporary:
        sizes = write_packed(temporary, Packed(packed.tensors, state=state, run=record))
        package = str(record["config"]["model"]["_target_"]).partition(".")[0]  # trusted when the run was loaded
        written = self_contained(read_run(temporary), file, trusted=[package]).state_dict()
        if any(not torch.equal(value, written[name]) for name, value in expected.items()):
            raise UserError(f"{file}: the written network differs from the run's network: a defect of the exporter")
    total = file.stat().st_size
    return [f"{file.name}: {total:,} bytes, of them {sizes.packed:,} for {len(packed.tensors)} quantized layers"]


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
    """Write the network of a finished run; returns the path, and lines about what was written.

    Args:
        output: a file for packed, else a folder; None: in the folder of the `run`, results/<run_id>.
        dtype: of plain weights and of the scales of compressed-tensors, one of DTYPES; None: float16.
        checkpoint_format: of gptq: "gptq" (None), or "gptq_v2": fewer tools read it, but it holds every zero point.
        settings, trusted: as in `load_quantized`.

    Raises:
        UserError: an argument or the run cannot be used; nothing is written.
    """
    _check_options(target, dtype, checkpoint_format)
    output = _place(target, run / TARGETS[target] if output is None else output, force).absolute()
    packed, network = load_run(run, settings or {}, trusted)
    if target == "packed":
        return output, write_self_contained(packed, network, output)
    about: dict[str, Any] = {
        "dtype": dtype or "float16",
        "tokenizer": getattr(network.encode, "tokenizer", None),
        "architecture": str(network.description.get("architecture")),
    }
    try:
        if target == "dequantized":
            return output, write_dequantized(network.module, output, **about)
        layout: Layout = GPTQLayout(checkpoint_format or "gptq")
        if target == "compressed-tensors":
            layout = CompressedLayout.of(packed.tensors.values(), about["dtype"])
        return output, write_layout(network.module, packed.tensors, output, layout, **about)
    except Refused as error:
        method = packed.run["config"]["method"]["name"]
        raise UserError(f"--to {target} of method={method}: {error}") from error


def _check_options(target: str, dtype: str | None, checkpoint_format: str | None) -> None:
    """Raise UserError if an option has an unknown value or does not belong to the target."""
    if target not in TARGETS:
        raise UserError(f"--to {target}: choose {', '.join(TARGETS)}")
    for option, value, values, targets in (
        ("--dtype", dtype, DTYPES, ("dequantized", "gptq", "compressed-tensors")),
        ("--format", checkpoint_format, tuple(FORMATS), ("gptq",)),
    ):
        if value is not None and target not in targets:
            raise UserError(f"{option} {value}: belongs to --to {', '.join(targets)}")
        if value is not None and value not in values:
            raise UserError(f"{option} {value}: choose {', '.join(values)}")


def _place(target: str, output: Path, force: bool) -> Path:
    """`output`; raises UserError if it exists already and cannot be replaced."""
    if output.exists() and output.is_dir() == (target == "packed"):
        raise UserError(f"--output {output}: {'a folder' if output.is_dir() else 'a file'} is in the way")
    if output.exists() and not force and (target == "packed" or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; --force replaces it")
    return output


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: needs KEY=VALUE, such as model.checkpoint=/new/place")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: {one_line(str(error))}") from error
    return settings


def main() -> None:
    """Export and print what was written; on an error, print one line and exit with code 1."""
    parser = module_parser("export", __doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run: results/<run_id>")
    parser.add_argument("--to", dest="target", required=True, help=", ".join(TARGETS))
    parser.add_argument("--output", type=Path, help="file (packed) or folder; default: in the run's folder")
    exact = "of plain weights and of compressed-tensors' scales: float16 (default) or float32, which changes nothing"
    parser.add_argument("--dtype", help=exact)
    formats = "of gptq: gptq (default), or gptq_v2, which holds zero points of 0 as well"
    parser.add_argument("--format", dest="checkpoint_format", help=formats)
    parser.add_argument("--force", action="store_true", help="replace what is there")
    lists: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--set", dest="settings", help="KEY=VALUE: a setting of the run, such as a moved path", **lists)
    parser.add_argument("--trust", dest="trusted", help="package of a model or data set of your own", **lists)
    given = parser.parse_args()
    try:
        given.settings = _settings(given.settings)
        output, lines = export(**vars(given))
    except OSError as error:
        sys.exit(f"error: {error.filename or given.output}: {error.strerror or error}")
    except UserError as error:
        exit_with(error)
    print("\n".join([f"{output}", *(f"  {line}" for line in lines)]))


if __name__ == "__main__":
    main()
