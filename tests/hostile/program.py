"""The real program in children of one process that has imported what a run needs, which saves each the seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]

SERVER = r"""
import json, os, resource, signal, sys
import bayesq.suite.runner, sklearn.datasets, timm, wandb  # what the children need
from bayesq.suite import cli

def begin(arguments, log, largest):
    child = os.fork()
    if child:
        return child
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.argv = ["run.py", *arguments]
    code = 99
    try:
        cli.main()
    except SystemExit as left:
        code = left.code or 0
    sys.stdout.flush()
    os._exit(code)

for line in sys.stdin:
    what, *rest = json.loads(line)
    answer = begin(*rest) if what == "begin" else os.waitstatus_to_exitcode(os.waitpid(rest[0], 0)[1])
    print(answer, flush=True)
"""


class Program:
    """Starts commands in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # a W&B service of the tests' own process would be shared by all commands, dead or alive
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, *question: object) -> int:
        given, answers = self.process.stdin, self.process.stdout
        assert given is not None and answers is not None
        given.write(json.dumps(question) + "\n")
        given.flush()
        return int(answers.readline())

    def begin(self, arguments: list[str], log: str, largest: int | None = None) -> int:
        """Start a command; returns the id of its process, which leads a group of its own.

        Args:
            largest: bytes that no file may exceed; None: as many as there is room for.
        """
        return self._ask("begin", arguments, str(self.folder / log), largest)

    def wait(self, process: int) -> int:
        """Exit code, or minus the signal."""
        return self._ask("wait", process)

    def run(self, arguments: list[str], log: str, largest: int | None = None) -> tuple[int, str]:
        """Exit code and output of a command."""
        code = self.wait(self.begin(arguments, log, largest))
        return code, (self.folder / log).read_text()

    def close(self) -> None:
        pipes: list[IO[str]] = [pipe for pipe in (self.process.stdin, self.process.stdout) if pipe is not None]
        pipes[0].close()
        self.process.wait(60)
        pipes[1].close()
