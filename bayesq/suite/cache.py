"""The cache folder."""

import os
from pathlib import Path

import platformdirs


def resolve_cache_dir(cache_dir: str | None) -> Path:
    """Absolute cache folder: `cache_dir`, else the variable BAYESQ_CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("BAYESQ_CACHE_DIR") or platformdirs.user_cache_dir("bayesq")
    return Path(chosen).expanduser().absolute()
