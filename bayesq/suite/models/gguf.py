"""GGUF files, converted once by transformers' reader to folders that transformers loads, and cached."""

import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bayesq.files import file_sha256, lock
from bayesq.progress import elapsed
from bayesq.suite.errors import UserError
from bayesq.suite.models.checkpoint import reading
from bayesq.suite.models.transformers_model import quiet_transformers

log = logging.getLogger(__name__)

GGUF = ".gguf"
# Packages that transformers' reader needs.
NEEDED = ("gguf", "accelerate")
# Written last: a folder without it is incomplete.
MANIFEST = "converted.json"
UNQUANTIZED = ("F64", "F32", "F16", "BF16")


def converted(file: Path, key: str, cache_dir: Path) -> tuple[Path, dict[str, object]]:
    """A folder with config.json, model.safetensors (float32) and tokenizer, and the file's description for the result.

    Damaged files in the cache are replaced. `key` is the setting that names the file, for messages.

    Raises:
        UserError: the file is missing or cannot be read, or a package is missing.
    """
    if not file.is_file():
        raise UserError(f"{key}: there is no such file")
    absent = [package for package in NEEDED if find_spec(package) is None]
    if absent:
        raise UserError(f"{key}: reading a GGUF file needs {' and '.join(absent)}: run `python -m pip install '.[lm]'`")
    sha256 = file_sha256(file)
    recipe = {"format": 1, "gguf": sha256, "transformers": metadata.version("transformers")}
    folder = cache_dir / "models" / f"gguf-{sha256[:16]}-{recipe['transformers']}"
    with lock(folder):
        manifest = _manifest(folder)
        if manifest is None or manifest["recipe"] != recipe:
            with elapsed(f"convert {file.name}"):
                manifest = reading(key, lambda: _convert(file, folder, recipe))
    described = {"fp_source": str(file), "gguf_sha256": sha256, "gguf_tensors": manifest["tensors"]}
    lossy = [kind for kind in manifest["tensors"] if kind not in UNQUANTIZED]
    if lossy:
        described["note"] = f"full precision here means the dequantized weights of a file in {', '.join(lossy)}"
        log.info(f"{key}: {described['note']}")
    return folder, described


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder whose files have the checksums in it; None otherwise."""
    try:
        content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = all(file_sha256(folder / name) == sha256 for name, sha256 in content["files"].items())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError):
        intact = False
    if not intact:
        log.warning("%s is damaged; converting the file again", folder)
        return None
    return content


def _convert(file: Path, folder: Path, recipe: dict[str, object]) -> dict[str, Any]:
    """Read the file with transformers' reader and write the folder; returns the manifest."""
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain float32 now
    # `lock` made the parent folder
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as outer:
        made = Path(outer) / folder.name
        model.config.save_pretrained(made)
        tokenizer.save_pretrained(made)
        weights = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
        save_file(weights, made / "model.safetensors", {"format": "pt"})  # each shared tensor once
        files = {path.name: file_sha256(path) for path in sorted(made.iterdir())}
        manifest = {"recipe": recipe, "tensors": dict(sorted(tensors.items())), "files": files}
        (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return manifest
