"""Lines for long steps, on a real pseudo-terminal; and what goes to the log file alone."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from bayesq.progress import TICK_S, elapsed

ROOT = Path(__file__).resolve().parents[1]
STEPS = """
import logging, sys, time
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from bayesq.progress import elapsed
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with logging_redirect_tqdm():
    with elapsed("short"):
        pass
    with elapsed("outer"):
        time.sleep(1.3)
        logging.info("said meanwhile")
        for _ in tqdm(range(3), desc="inner", disable=None, leave=False):
            time.sleep(0.4)
    logging.info("after")
"""


def python(script: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, **options)


def on_a_terminal(script: str) -> str:
    """All that a script writes to its terminal."""
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (40, 160))
    with python(script, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        written = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux says that the last writer has gone
                break
            if not chunk:
                break
            written += chunk
        os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def test_a_long_step_shows_its_name_and_its_seconds_and_log_lines_stay_whole():
    written = on_a_terminal(STEPS)
    assert "short" not in written
    assert re.search(r"outer: 00:01", written) and re.search(r"outer: 00:02", written)
    assert "inner:  33%" in written
    lines = re.split(r"[\r\n]+|\x1b\[A", written)
    assert "said meanwhile" in lines and "after" in lines
    assert written.rstrip().endswith("after")


def test_without_a_terminal_nothing_is_written():
    with python(STEPS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate()
    assert (out, err) == ("said meanwhile\nafter\n", "")


def test_an_error_of_the_step_passes():
    began = time.perf_counter()
    try:
        with elapsed("step"):
            raise ValueError("of the step")
    except ValueError as error:
        assert str(error) == "of the step"
    assert time.perf_counter() - began < 10 * TICK_S


def test_details_go_to_the_log_file_only(tmp_path):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["hydra.job.name=bayesq"], return_hydra_config=True)
    OmegaConf.set_readonly(cfg, False)
    cfg.hydra.runtime.output_dir = str(tmp_path)
    script = """
import json, logging.config, sys
logging.config.dictConfig(json.loads(sys.argv[1]))
logging.getLogger("bayesq.details").info("sizes")
logging.getLogger("bayesq.suite.runner").info("decided")
"""
    settings = json.dumps(OmegaConf.to_container(cfg.hydra.job_logging, resolve=True))
    done = subprocess.run([sys.executable, "-c", script, settings], capture_output=True, text=True, check=True)
    assert done.stdout == "decided\n" and done.stderr == ""
    kept = (tmp_path / "run.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in kept] == [
        "bayesq.details INFO sizes",
        "bayesq.suite.runner INFO decided",
    ]
    assert logging.getLogger("bayesq.details").propagate  # nothing of this changed the present process
