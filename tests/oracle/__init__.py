"""Slow, readable truth for the engine: formats, layout and layer in NumPy and float64, and the harness around it."""
