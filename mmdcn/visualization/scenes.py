"""Pictures of what several detectors do on the validation images of warped shapes."""

import json
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import torch
from matplotlib.figure import Figure
from mmdet.apis import inference_detector
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from mmdcn.files import read_image

from .detections import draw_instances, image_grid
from .sampling import draw_sampling_points, points_in_image, record_sampling


def load_scenes(data_dir: Path) -> list[DetDataSample]:
    """Path and ground truth of every validation image of a folder that warped_shapes made."""
    coco = json.loads((data_dir / "annotations" / "val.json").read_text())
    annotations = defaultdict(list)
    for annotation in coco["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    scenes = []
    for image in coco["images"]:
        objects = annotations[image["id"]]
        boxes = torch.tensor([a["bbox"] for a in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] - 1 for a in objects], dtype=torch.long)
        scene = DetDataSample(metainfo={"img_path": str(data_dir / "val" / image["file_name"])})
        scene.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        scenes.append(scene)
    return scenes


def detection_figure(
    detectors: dict[str, nn.Module], scenes: list[DetDataSample], count: int = 4
) -> Figure:
    """Ground truth and what each model detects, for the fullest of the first scenes."""
    chosen = sorted(scenes[: 6 * count], key=lambda s: -len(s.gt_instances))[:count]
    rows = []
    for scene in chosen:
        found = [inference_detector(d, scene.img_path).pred_instances for d in detectors.values()]
        image = read_rgb(scene.img_path)
        meta = next(iter(detectors.values())).dataset_meta
        rows.append(
            [
                draw_instances(image, instances, meta["classes"], meta["palette"])
                for instances in (scene.gt_instances, *found)
            ]
        )
    return image_grid(rows, ["ground truth", *detectors])


def large_objects_figure(
    detectors: dict[str, nn.Module], scenes: list[DetDataSample], count: int = 6
) -> Figure:
    """What the last deformable layer of each model samples at the centres of large objects."""
    figure = Figure(figsize=(2.8 * count, 2.9 * len(detectors) + 0.4), layout="constrained")
    axes = figure.subplots(len(detectors), count, squeeze=False)
    colors = None
    for axes_row, (name, detector) in zip(axes, detectors.items()):
        axes_row[0].set_ylabel(name)
        for ax, (scene, box, label) in zip(axes_row, large_objects(scenes, count)):
            image = read_rgb(scene.img_path)
            with record_sampling(detector) as recorded:
                sample = inference_detector(detector, scene.img_path)
            center = ((box[:2] + box[2:]) / 2).tolist()
            last_layer = list(recorded.values())[-1]
            points = points_in_image(last_layer, center, sample.batch_input_shape)
            height, width = image.shape[:2]
            ax.imshow(image, extent=(0, width, height, 0))
            colors = draw_sampling_points(ax, points)
            margin = 0.2 * width  # some points lie outside the image
            ax.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin))
            ax.set(xticks=[], yticks=[], title=detector.dataset_meta["classes"][label])
            ax.set_facecolor("0.4")
    figure.colorbar(colors, ax=axes, label="modulation", shrink=0.8)
    return figure


def large_objects(
    scenes: list[DetDataSample], count: int, max_side: float = 80.0
) -> list[tuple[DetDataSample, torch.Tensor, int]]:
    """Scene, box and label of the largest object of each class, in the order of labels.

    Of those whose longest side is at most ``max_side`` pixels: less than half an image, so that
    there is something around the object that the layer could sample.
    """
    largest = {}
    for scene in scenes:
        for box, label in zip(scene.gt_instances.bboxes, scene.gt_instances.labels.tolist()):
            size = box[2:] - box[:2]
            if size.max() <= max_side and size.prod() > largest.get(label, (0,))[0]:
                largest[label] = size.prod(), scene, box
    return [(scene, box, label) for label, (_, scene, box) in sorted(largest.items())][:count]


def read_rgb(path: str) -> np.ndarray:
    return cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)
