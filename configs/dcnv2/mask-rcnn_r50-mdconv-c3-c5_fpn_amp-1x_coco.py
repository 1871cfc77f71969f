_base_ = "mmdet::dcnv2/mask-rcnn_r50-mdconv-c3-c5_fpn_amp-1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))
