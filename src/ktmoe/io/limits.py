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
MAX_GGUF_HEADER_BYTES = 256 * 2**20
"""Metadata and tensor table of one GGUF file; a tokenizer of 262,144 tokens takes about 10 MB."""
MAX_GGUF_KEYS = 65_536
MAX_GGUF_STRING_BYTES = 64 * 2**20
MAX_GGUF_STRINGS = 4 * 2**20
"""Strings in the arrays of one file: they have to be walked one by one, in about a microsecond each."""
MAX_GGUF_ALIGNMENT = 2**20
