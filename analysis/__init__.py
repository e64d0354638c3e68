"""From runs to tables and figures: results as data frames, statistics, and files for a paper."""

from analysis.loading import example_frame, layer_frame, load_runs

__all__ = ["example_frame", "layer_frame", "load_runs"]
