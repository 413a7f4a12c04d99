"""Slow, readable truth for the engine: formats, layout, GEMMs and the layer in NumPy and float64, and the harness around it."""
