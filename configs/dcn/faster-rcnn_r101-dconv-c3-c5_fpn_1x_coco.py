_base_ = "mmdet::dcn/faster-rcnn_r101-dconv-c3-c5_fpn_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
default_hooks = dict(offsets=dict(type="OffsetStatisticsHook"))
