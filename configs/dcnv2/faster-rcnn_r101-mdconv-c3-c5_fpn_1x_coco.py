_base_ = "mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))

model = dict(
    backbone=dict(
        dcn=dict(type="DCNv2", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
