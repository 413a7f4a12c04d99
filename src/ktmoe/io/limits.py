"""Bounds on what a weight file may declare. Beyond them a file is refused, before memory is spent on it."""

MAX_HEADER_BYTES = 100_000_000
"""Header of one safetensors file; the official reader has the same bound."""
MAX_TENSORS = 1_000_000
"""Tensors of one file, and of one folder."""
MAX_INDEX_BYTES = 64 * 2**20
"""Size of an index.json."""
MAX_SHARDS = 10_000
MAX_NAME_CHARS = 1_024
"""Length of a tensor name."""
MAX_OPEN_SHARDS = 8
"""File descriptors that one reader holds at a time."""
