_base_ = "mmdet::dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
