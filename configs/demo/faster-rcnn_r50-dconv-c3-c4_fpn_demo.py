_base_ = "./faster-rcnn_r50_fpn_demo.py"
model = dict(
    backbone=dict(
        dcn=dict(type="DCN", deform_groups=1, fallback_on_stride=False),
        # Not the last stage: a kernel covers most of its 6 × 6 positions as it is.
        stage_with_dcn=(False, True, True, False),
    )
)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))
