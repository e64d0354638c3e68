"""The READMEs: their examples run, their commands compose, their links lead somewhere."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from bayesq.suite.composition import preflight

ROOT = Path(__file__).resolve().parents[1]
READMES = sorted([ROOT / "README.md", *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("tests/*/README.md")])
# words in place of which a reader puts something
WORDS = {"WORKLOAD": "model=minilm", "METHOD": "gptq", "ID": "name", "NAME": "full"}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", readme.read_text()):
        assert (readme.parent / link).exists(), link


def commands() -> list[str]:
    """The arguments of each `run.py` in a block, without comments and the shell's variables."""
    found = []
    for readme in READMES:
        for block in blocks(readme.read_text(), "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                _, run, arguments = line.split(" #")[0].partition("python run.py ")
                if run and "$" not in arguments:
                    found.append(" ".join(arguments.split()))
    return found


@pytest.mark.parametrize("arguments", commands(), ids=str)
def test_commands_compose(arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "launcher=ray" in arguments:
        pytest.importorskip("ray")
    if "launcher=submitit_slurm" in arguments and not shutil.which("sbatch"):
        pytest.skip("needs Slurm's sbatch")
    for word, value in WORDS.items():
        arguments = re.sub(rf"\b{word}\b", value, arguments)
    jobs = preflight(shlex.split(arguments))
    assert jobs is None or len(jobs) >= 1


def test_the_examples_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (example,), (reading,) = (blocks((ROOT / name).read_text(), "python") for name in ("README.md", "bayesq/README.md"))
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make("test_resnet", pretrained=False))
    torch.manual_seed(0)
    space: dict[str, Any] = {}
    exec(example.replace("224", "32"), space)
    exec(reading, space)
    loaded, quantized = space["network"].state_dict(), space["quantized"].state_dict()
    assert all(torch.equal(loaded[name], quantized[name]) for name in quantized)


@pytest.mark.slow  # reads all of torch
def test_the_examples_have_right_types(tmp_path: Path) -> None:
    library, reading, extension = (
        blocks((ROOT / name).read_text(), "python")[0] for name in ("README.md", "bayesq/README.md", "conf/README.md")
    )
    (tmp_path / "library.py").write_text(library + reading)
    (tmp_path / "mine.py").write_text(extension)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--allow-untyped-defs"]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--cache-dir", str(ROOT / ".mypy_cache"), "library.py", "mine.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_a_method_a_data_set_and_a_model(tmp_path: Path) -> None:
    text = (ROOT / "conf" / "README.md").read_text()
    files = [("mine.py", blocks(text, "python"))]
    names = re.findall(r"`(conf/(?:method|dataset|model)/\w+\.yaml)`", text)
    files += [(name, [block]) for name, block in zip(names, blocks(text, "yaml"), strict=True)]
    for name, (content,) in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    lines = blocks(text, "bash")[-1].replace("bayesq-run", f"python {ROOT / 'run.py'}")
    script = lines.replace("$PWD", f"$PWD:{ROOT}").replace("python ", f"{sys.executable} ")
    environment = os.environ | {"BAYESQ_CACHE_DIR": str(tmp_path / "cache"), "WANDB_MODE": "disabled"}
    done = subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(\w+) +3 +\d+\.\d\d ", done.stdout, re.MULTILINE) == ["mine", "gptq", "bayesq"]
