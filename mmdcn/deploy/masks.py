"""Masks of whole images from the masks within boxes that an exported file gives.

This module needs NumPy alone: who runs a file without PyTorch can copy it.
"""

from __future__ import annotations

import numpy as np

__all__ = ["paste_masks"]


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, height: int, width: int, threshold: float = 0.5
) -> np.ndarray:
    """Put masks into images, as ``FCNMaskHead`` does.

    Args:
        masks: (K, h, w), probabilities within each box.
        boxes: (K, 4), left, top, right, bottom in pixels of the image. For the image as it was
            before it was scaled for the network, divide the file's boxes by the scale.
        height, width: of the image.
        threshold: a pixel belongs to an object from this probability on. It is `mask_thr_binary` in
            the file's metadata.

    Returns:
        (K, height, width) in bool.

    Example:
        >>> import numpy as np
        >>> masks = paste_masks(np.ones((1, 28, 28)), np.array([[2.0, 1.0, 6.0, 4.0]]), 5, 8)
        >>> masks[0].astype(int)
        array([[0, 0, 0, 0, 0, 0, 0, 0],
               [0, 0, 1, 1, 1, 1, 0, 0],
               [0, 0, 1, 1, 1, 1, 0, 0],
               [0, 0, 1, 1, 1, 1, 0, 0],
               [0, 0, 0, 0, 0, 0, 0, 0]])
    """
    pasted = np.zeros((len(masks), height, width), dtype=bool)
    for image, mask, (left, top, right, bottom) in zip(pasted, masks, boxes):
        # Farther out, nothing is sampled.
        rows = np.arange(max(int(top) - 1, 0), min(int(np.ceil(bottom)) + 1, height))
        columns = np.arange(max(int(left) - 1, 0), min(int(np.ceil(right)) + 1, width))
        if right <= left or bottom <= top or not len(rows) or not len(columns):
            continue
        vertical = _weights(rows, top, bottom, mask.shape[0])
        horizontal = _weights(columns, left, right, mask.shape[1])
        sampled = vertical @ mask.astype(np.float32) @ horizontal.T
        image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = sampled >= threshold
    return pasted


def _weights(pixels: np.ndarray, start: float, end: float, size: int) -> np.ndarray:
    """Bilinear weights (pixels, size) of a mask's elements at the centres of an image's pixels."""
    positions = (pixels + 0.5 - start) / (end - start) * size - 0.5
    distances = np.abs(positions[:, None] - np.arange(size))
    return np.maximum(0, 1 - distances).astype(np.float32)
