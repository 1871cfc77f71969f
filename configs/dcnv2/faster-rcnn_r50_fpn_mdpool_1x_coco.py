_base_ = "mmdet::dcnv2/faster-rcnn_r50_fpn_mdpool_1x_coco.py"

custom_imports = dict(imports=["mmdcn"], allow_failed_imports=False)
