_base_ = "mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
