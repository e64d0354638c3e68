"""Peak memory of a language model's run: that of one block's inputs and statistics, whatever the number of blocks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_lm import prose, tiny_lm

ROOT = Path(__file__).parents[2]
WIDTH, WINDOW, EXAMPLES = 64, 128, 256
HIDDEN_STATES = 4 * WIDTH * WINDOW * EXAMPLES  # of the calibration set at one block, in one network


def peak(place: Path, blocks: int) -> tuple[int, int]:
    """Bytes that a run adds to what its process holds with model and data, and bytes of the weights."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 4}
    folder = tiny_lm(place / f"llama{blocks}", num_hidden_layers=blocks, max_position_embeddings=WINDOW, **sizes)
    (place / "prose.txt").write_text(prose(90_000), encoding="utf-8")
    overrides = [
        *("model=causal_lm", f"model.checkpoint={folder}", "dataset=text", f"dataset.path={place}/prose.txt", "bits=4"),
        *(f"dataset.window={WINDOW}", "dataset.limit=4", f"calibration.examples={EXAMPLES}", "wandb.mode=disabled"),
        *("method=gptq", "inputs=paired", "correction=moments", "calibration.batch_size=4", "device=cpu"),
        *(f"results_dir={place / f'results{blocks}'}", f"cache_dir={place / 'cache'}"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *overrides]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    assert ended.returncode == 0, ended.stderr
    (file,) = (place / f"results{blocks}").glob("*/result.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    return result["memory/peak_rss_bytes"], 4 * result["source"]["model"]["parameters"]


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    """Six more blocks add a few copies of their weights, and no hidden states and no statistics."""
    (few, weights), (many, more_weights) = peak(tmp_path, 2), peak(tmp_path, 8)
    assert many - few < 6 * (more_weights - weights) + 2 * HIDDEN_STATES
