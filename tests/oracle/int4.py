"""The int4 format read and searched in NumPy, from the words of csrc/format/int4.h."""

import numpy as np

TILE = 9 * 64  # bytes: a row of block codes, eight rows of nibbles
STEP, BLOCK = 64, 16


def offset(m: np.ndarray | int, z: np.ndarray | int) -> np.ndarray:
    return np.asarray((15 + z) * m // 3)


def unpack(packed: np.ndarray, panels: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """int levels [32 * panels, k] and fp32 scales [32 * panels]."""
    steps = -(-k // STEP)
    stride = 2 * steps * TILE
    stride += 2048 if stride % (32 * 1024) == 0 else 0
    end = panels * stride
    tiles = packed[:end].reshape(panels, stride)[:, : 2 * steps * TILE].reshape(panels, steps, 2, 9, 16, 4)
    levels = np.zeros((panels, 2, 16, steps, STEP), np.int64)
    for j in range(STEP):
        block, quad, byte = j // BLOCK, j % BLOCK // 4, j % 4
        code = tiles[..., 0, :, block].astype(np.int64)  # [panel, step, tile, column]
        nibbles = tiles[..., 1 + 4 * (block // 2) + quad, :, byte].astype(np.int64)
        m, z = (code & 15) + 1, code >> 4
        levels[..., j] = np.moveaxis(m * (nibbles >> 4 * (block % 2) & 15) - offset(m, z), 1, -1)
    return levels.reshape(32 * panels, -1)[:, :k], packed[end:].view(np.float32)


def best_error(w: np.ndarray) -> float:
    """Least sum of squared errors of any choice of m, z and q, at the scale max|w| / 127 of each row."""
    rows, k = w.shape
    padded = np.zeros((rows, -(-k // BLOCK) * BLOCK))
    padded[:, :k] = w
    scale = np.abs(w).max(axis=1) / 127
    x = padded.reshape(rows, -1, BLOCK) / scale[:, None, None]
    best = np.full(x.shape[:2], np.inf)
    for m in range(1, 17):
        for z in range(16):
            o = int(offset(m, z))
            q = np.clip(np.rint((x + o) / m), max(0, -((127 - o) // m)), min(15, (127 + o) // m))
            best = np.minimum(best, ((m * q - o - x) ** 2).sum(axis=2))
    return float((best * scale[:, None] ** 2).sum())


def row_scaled_error(w: np.ndarray) -> float:
    """Sum of squared errors of the plain scheme: one scale per row, max / 7."""
    scale = np.abs(w).max(axis=1, keepdims=True) / 7
    return float(((np.clip(np.rint(w / scale), -8, 7) * scale - w) ** 2).sum())
