"""What all tests of the checks share: annotation files, and the message of a check that fails."""

import json

import pytest

from mmdcn.engine import preflight
from mmdcn.engine.preflight import ConfigError


def write_annotations(path, images, categories=("cat", "dog"), **layout):
    content = {
        # The lists that are read also appear in places where they must be passed over.
        "info": {"description": 'has "categories": [{"name": "none"}]', "categories": []},
        "images": [
            {"id": i, "file_name": n, "width": 8, "height": 8} for i, n in enumerate(images)
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "note": '"images": ['}
            | {"bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(categories)],
    }
    path.write_text(json.dumps(content, **layout))


def message_of(config, stages=("train",)):
    with pytest.raises(ConfigError) as error:
        preflight.check(config, stages)
    return str(error.value)


def dataset_of(config):
    return config.train_dataloader.dataset


def warnings_of(config, stages=("train",)):
    return preflight.check(config, stages)
