"""Boxes on images, and images side by side."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

ZOOMED_SIZE = 480  # pixels; small images are enlarged to it, so that labels fit beside the objects


def draw_instances(
    image: np.ndarray,
    instances: InstanceData,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    min_score: float = 0.4,
) -> np.ndarray:
    """Draw boxes with their classes and, where there are any, their scores.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: ``bboxes`` (n, 4) as x1, y1, x2, y2 in pixels, ``labels`` (n,); ``scores`` (n,)
            of detections, none of ground truth.
        classes: names of the labels.
        palette: RGB colours of the labels.
        min_score: detections below are left out.

    Returns:
        The picture, (H', W', 3) uint8, RGB, enlarged to ``ZOOMED_SIZE`` where it was smaller.

    Example:
        >>> boxes, labels = torch.tensor([[2.0, 4.0, 10.0, 8.0]]), torch.tensor([0])
        >>> instances = InstanceData(bboxes=boxes, labels=labels)
        >>> draw_instances(np.zeros((16, 16, 3), np.uint8), instances, ["cat"], [(255, 0, 0)]).shape
        (480, 480, 3)
    """
    zoom = max(1.0, ZOOMED_SIZE / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
    instances = instances.cpu()
    height, width = image.shape[:2]
    limit = torch.tensor([width, height, width, height]) - 1
    instances.bboxes = (instances.bboxes * zoom).clamp(torch.zeros(4), limit)
    is_prediction = "scores" in instances
    sample = DetDataSample()
    setattr(sample, "pred_instances" if is_prediction else "gt_instances", instances)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = {"classes": tuple(classes), "palette": list(palette)}
    visualizer.add_datasample(
        "instances",
        image,
        sample,
        draw_gt=not is_prediction,
        draw_pred=is_prediction,
        pred_score_thr=min_score,
    )
    return visualizer.get_image()


def image_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Images in rows, one title above each column.

    Example:
        >>> image = np.zeros((16, 16, 3), np.uint8)
        >>> len(image_grid([[image, image]], ["before", "after"]).axes)
        2
    """
    figure = Figure(figsize=(4.4 * len(titles), 4.4 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for axes_row, images in zip(axes, rows):
        for ax, image in zip(axes_row, images):
            ax.imshow(image)
            ax.set_axis_off()
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
    return figure
