"""Reading files that nobody vouches for. Nothing outside this folder parses bytes from disk."""
