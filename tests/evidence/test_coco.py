"""The table of what others published: mmdet's figures, and models of the same keys and shapes."""

import pytest
import torch

pytest.importorskip("mmdet")

from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmdcn import plugin, zoo
from mmdcn.evidence import coco

OURS = [
    config
    for configs in coco.ROWS.values()
    for config in configs
    if (coco.CONFIGS / config).is_file()
]


def shapes(config: Config) -> dict[str, torch.Size]:
    init_default_scope("mmdet")
    with torch.device("meta"):
        state = MODELS.build(config.model).state_dict()
    return {key: value.shape for key, value in state.items()}


def test_figures_are_those_of_the_metafiles():
    assert coco.published("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py") == coco.Published(
        37.4, None, 4.0, 46.73
    )
    assert coco.published("dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py") == coco.Published(
        41.8, 37.4, 4.5, 64.94
    )
    text = "\n".join(coco.section())
    assert "**Nothing in this table was measured here.**" in text
    row = "| Faster R-CNN R-50 | DCN | 41.3 (+3.9) |  | 4.0 | 17.8 |"
    assert row in text
    first, _, second = text.partition("arXiv 1703.06211")
    assert first.count("\n| ") == sum(map(len, coco.ROWS.values())) + 2
    assert second.count("\n| ") == 2 * len(coco.BY_THE_AUTHORS) + 2


def test_every_deformable_row_has_a_config_of_ours():
    deformable = [c for configs in coco.ROWS.values() for c in configs if c.startswith("dcn")]
    assert set(deformable) <= set(OURS)


@pytest.mark.parametrize("config", [c for c in OURS if c.startswith("dcn")])
def test_keys_and_shapes_are_those_of_mmdet_with_mmcvs_layers(config):
    import mmcv.ops

    plugin.uninstall()
    try:
        theirs = Config.fromfile(zoo.FOLDER / config)
        expected = shapes(theirs)
        assert mmcv.ops.DeformConv2dPack.__module__.startswith("mmcv.")
    finally:
        plugin.install()
    ours = shapes(Config.fromfile(coco.CONFIGS / config))
    assert ours == expected
    assert sum("conv_offset.weight" in key for key in ours) in (13, 30)
