"""Figures, one module each: `data` makes tidy frames of the points, `draw` draws them.

Frames have one row per point; a point without a run is a row of NaN, where lines break.
"""
