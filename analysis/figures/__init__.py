"""Figures, one module each: `data` makes tidy frames of what is drawn, `draw` draws them.

Frames have one row per drawn point; a point that no run gives is a row of NaN, where lines break.
"""
