"""Pictures of detections, and grids of them."""

import io

import numpy as np
import torch
from mmengine.structures import InstanceData

from mmdcn.visualization import draw_instances, image_grid

RED, BLUE = (255, 0, 0), (0, 0, 255)


def _draw(**instances):
    image = np.full((120, 160, 3), 128, np.uint8)
    data = InstanceData(**{name: torch.tensor(value) for name, value in instances.items()})
    return draw_instances(image, data, ("disc", "star"), (RED, BLUE))


def _reddish(picture):
    return (picture[..., 0].astype(int) - picture[..., 2] > 60).any()


def _bluish(picture):
    return (picture[..., 2].astype(int) - picture[..., 0] > 60).any()


def test_small_images_are_enlarged_and_boxes_with_them():
    picture = _draw(bboxes=[[20.0, 30.0, 100.0, 90.0]], labels=[1])
    assert picture.shape == (360, 480, 3)
    assert _bluish(picture[92:120, 297:304])  # the right edge, at 3 · 100
    assert _bluish(picture[267:274, 150:250])  # the lower edge, at 3 · 90
    assert not _bluish(picture[:, 310:])
    assert not _reddish(picture)


def test_detections_of_low_score_are_left_out():
    boxes = [[10.0, 10.0, 60.0, 60.0], [80.0, 60.0, 150.0, 110.0]]
    picture = _draw(bboxes=boxes, labels=[0, 1], scores=[0.39, 0.41])
    assert _bluish(picture)
    assert not _reddish(picture)


def test_the_callers_boxes_stay_as_they_were():
    instances = InstanceData(bboxes=torch.tensor([[1.0, 2, 30, 40]]), labels=torch.tensor([0]))
    draw_instances(np.zeros((50, 50, 3), np.uint8), instances, ("disc",), (RED,))
    assert instances.bboxes.tolist() == [[1, 2, 30, 40]]


def test_no_instances_leave_the_image():
    picture = _draw(bboxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, int))
    assert (picture == 128).all()


def test_grid_has_a_title_above_each_column():
    image = np.zeros((10, 10, 3), np.uint8)
    figure = image_grid([[image, image], [image, image]], ["ground truth", "DCN"])
    assert [ax.get_title() for ax in figure.axes] == ["ground truth", "DCN", "", ""]
    figure.savefig(io.BytesIO(), format="png")
