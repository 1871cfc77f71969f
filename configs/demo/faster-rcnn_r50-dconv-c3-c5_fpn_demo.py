_base_ = "./faster-rcnn_r50_fpn_demo.py"
model = dict(
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))
