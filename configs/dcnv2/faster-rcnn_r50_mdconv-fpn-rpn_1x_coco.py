# A plain backbone under a deformable neck and RPN head, for which mmdet has no dcn=.
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))

model = dict(
    type="mmdcn.Deformable",
    model_type="FasterRCNN",
    convert=dict(
        dcn=dict(type="DCNv2", deform_groups=1),
        select=["neck.fpn_convs.*.conv", "rpn_head.rpn_conv"],
    ),
)
