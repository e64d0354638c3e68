"""The progress of a sweep: the place of a run in it, and the time that is left."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bayesq.suite.results import FAILURE_FILE, RESULT_FILE, read_result


class Progress:
    """The runs of a command. All processes of a launcher can use it, because it reads only the results folder.

    `runs` has the folder of each run, in the order of the sweep, and whether the run will be computed.
    """

    def __init__(self, runs: Mapping[Path, bool]) -> None:
        self.runs = dict(runs)
        self.start = time.time()

    def place(self, folder: Path) -> str:
        """`k of n`; empty for a single run, and for runs that a sweeper chooses later."""
        if len(self.runs) < 2 or folder not in self.runs:
            return ""
        return f"{list(self.runs).index(folder) + 1} of {len(self.runs)}"

    def left(self) -> str:
        """`about 12 min left`, from the mean time of the runs so far; empty before the first one has ended.

        The mean leaves out preparations that only the first run makes (downloads, training, compilation).
        """
        computed = [folder for folder, computes in self.runs.items() if computes]
        done = [folder for folder in computed if self._done(folder)]
        if not done or len(done) == len(computed):
            return ""
        spent = time.time() - self.start
        prepared = [float((read_result(folder / RESULT_FILE) or {}).get("time/prepare_s", 0.0)) for folder in done]
        once = sum(prepared) - len(done) * (min(prepared) if len(done) > 1 else 0.0)
        spent -= once if once < spent else 0.0  # runs of several processes prepare at the same time
        return f"about {duration(spent / len(done) * (len(computed) - len(done)))} left"

    def _done(self, folder: Path) -> bool:
        """Whether the run has ended, well or not, since the command began."""
        for name in (RESULT_FILE, FAILURE_FILE):
            with suppress(OSError):
                if (folder / name).stat().st_mtime >= self.start:
                    return True
        return False


def duration(seconds: float) -> str:
    """Seconds in a readable unit: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"
