"""VK tiles, written from the index formulas alone.

    offset(c, k) = (c/32) * stride + (k/step) * 2 tiles + ((c%32)/16) tiles
                   + ((k%step)/word) * 16 words + (c%16) words + k%word

in elements; c is the panel column. A plain matrix has row n in panel column n; a paired one has gate row n in panel
column 32 * (n/16) + n%16 and up row n 16 columns further on. fp32 scales, one per panel column, follow the panels.
"""

import numpy as np

from .formats import ORACLES, FormatOracle

TILE_BYTES = 1024
PANEL = 32


def n_panels(rows: int, paired: bool) -> int:
    return -(-rows // (16 if paired else PANEL))


def panel_stride(fmt: str, k: int) -> int:
    """Bytes from a panel to the next: one k-step more where the panels would all meet in the same sets of the L2."""
    stride = -(-k // ORACLES[fmt].k_step) * 2 * TILE_BYTES
    return stride + 2 * TILE_BYTES if stride % (32 * 1024) == 0 else stride


def packed_bytes(fmt: str, panels: int, k: int) -> int:
    return panels * panel_stride(fmt, k) + (panels * PANEL * 4 if ORACLES[fmt].scaled else 0)


def panel_columns(rows: int, paired: bool, up: bool = False) -> np.ndarray:
    n = np.arange(rows)
    return n // 16 * PANEL + n % 16 + 16 * up if paired else n


def offsets(fmt: str, columns: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Element offsets of panel columns x k."""
    f, c, j = ORACLES[fmt], columns[:, None], k[None, :]
    tile = 256 * f.per_word
    stride = panel_stride(fmt, len(k)) // np.dtype(f.element).itemsize
    return (
        c // PANEL * stride
        + j // f.k_step * 2 * tile
        + c % PANEL // 16 * tile
        + j % f.k_step // f.per_word * 16 * f.per_word
        + c % 16 * f.per_word
        + j % f.per_word
    )


def pack(fmt: str, w: np.ndarray, up: np.ndarray | None = None) -> np.ndarray:
    """The packed bytes of fp32 matrices [n, k]; everything that is padding is zero."""
    f: FormatOracle = ORACLES[fmt]
    rows, k = w.shape
    panels = n_panels(rows, up is not None)
    out = np.zeros(packed_bytes(fmt, panels, k), np.uint8)
    scales = np.zeros(panels * PANEL, np.float32)
    elements = out[: panels * panel_stride(fmt, k)].view(f.element)
    for matrix, is_up in ((w, False), (up, True)):
        if matrix is None:
            continue
        columns = panel_columns(rows, up is not None, is_up)
        q, scale = f.quantize(matrix)
        elements[offsets(fmt, columns, np.arange(k))] = q
        scales[columns] = scale
    if f.scaled:
        out[panels * panel_stride(fmt, k) :] = scales.view(np.uint8)
    return out


def unpack(fmt: str, packed: np.ndarray, panels: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Stored elements [32 * panels, k] in panel order and their scales [32 * panels]."""
    f = ORACLES[fmt]
    end = panels * panel_stride(fmt, k)
    elements = packed[:end].view(f.element)[offsets(fmt, np.arange(panels * PANEL), np.arange(k))]
    scales = packed[end:].view(np.float32) if f.scaled else np.ones(panels * PANEL, np.float32)
    return elements, scales


def gap_mask(fmt: str, panels: int, k: int) -> np.ndarray:
    """True for the bytes that belong to no tile: what the longer stride leaves between panels."""
    used = -(-k // ORACLES[fmt].k_step) * 2 * TILE_BYTES
    mask = np.zeros(packed_bytes(fmt, panels, k), bool)
    mask[: panels * panel_stride(fmt, k)].reshape(panels, -1)[:, used:] = True
    return mask
