"""Checks of a config before anything is built from it, so that a mistake costs a second.

Each check finds what the toolbox would report late, deep inside a traceback, or never: missing
files, class lists that do not fit the annotations, layer types that nobody registered.
"""

from __future__ import annotations

import difflib
import json
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmdcn.errors import InputError

__all__ = ["ConfigError", "check"]

# How many of the listed images are looked for: one may be missing, all means a wrong folder.
_IMAGES_LOOKED_FOR = 20


class ConfigError(InputError, ValueError):
    """The config, or what it points to, cannot work. The message lists each problem on a line."""


def check(cfg: Config, stages: tuple[str, ...]) -> None:
    """Check what `cfg` refers to, without building anything.

    Args:
        cfg: a detector's config.
        stages: the parts that will run, of ``"train"``, ``"val"`` and ``"test"``. The first must be
            there; others are skipped where the config leaves them out.

    Raises:
        ConfigError: an annotation file, image folder or checkpoint is missing; a class list names
            classes that the annotations lack, or more than a head can predict; a type in the model
            is registered nowhere.
    """
    # Names in a config resolve in the toolbox's registries, which fill when it is imported.
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    places: dict[str, list[str]] = {}
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
        for where, problem in _problems(cfg, stages):
            places.setdefault(problem, []).append(where)
    if places:
        listing = "".join(f"\n  - {problem} ({', '.join(p)})" for problem, p in places.items())
        raise ConfigError(f"the config {cfg.filename} cannot run:{listing}")


# What follows yields pairs: the place in the config, and what is wrong there.
Problems = Iterator[tuple[str, str]]


def _problems(cfg: Config, stages: tuple[str, ...]) -> Problems:
    absent = [key for key in ("model", f"{stages[0]}_dataloader") if key not in cfg]
    if absent:
        yield from ((key, "it has no such entry") for key in absent)
        return
    yield from _missing_types(cfg.model, "model")
    checkpoints = [("load_from", cfg.get("load_from"))]
    if "train" in stages:
        checkpoints += _pretrained(cfg.model, "model")
    for where, path in checkpoints:
        if isinstance(path, str) and "://" not in path:
            yield from _missing_file(path, where)
    absent_roots = set()
    for stage in stages:
        loader = cfg.get(f"{stage}_dataloader")
        if loader is None or cfg.get(f"{stage}_cfg") is None:
            continue
        for dataset, where in _datasets(loader.get("dataset"), f"{stage}_dataloader.dataset"):
            root = dataset.get("data_root")
            if (
                root
                and _is_local(dataset, root)
                and _uses_root(dataset)
                and not Path(root).exists()
            ):
                absent_roots.add(root)
                yield (
                    f"{where}.data_root",
                    f"no folder {root!r}: put or link the data there, or change data_root and the "
                    "ann_file of the evaluators",
                )
            else:
                yield from _dataset_problems(dataset, where, cfg.model)
        for metric, where in _each(cfg.get(f"{stage}_evaluator"), f"{stage}_evaluator"):
            ann_file = metric.get("ann_file")
            if (
                isinstance(ann_file, str)
                and _is_local(metric, ann_file)
                and not any(ann_file.startswith(root) for root in absent_roots)
            ):
                yield from _missing_file(ann_file, f"{where}.ann_file")


# ---------------------------------------------------------------------------------------------
# The model


def _missing_types(node: Any, where: str) -> Problems:
    """Types that no registry knows, at the keys whose values are certainly built from one."""
    name = node.get("type") if isinstance(node, Mapping) else None
    scoped = isinstance(name, str) and "." in name
    scope = name.partition(".")[0] if scoped else name and node.get("_scope_", "mmdet")
    if scope in (None, "mmdet", "mmengine", "mmcv", "mmdcn"):
        # The parts of another project's module resolve in that project's registries.
        for key, child in _children(node):
            yield from _missing_types(child, _join(where, key))
    key = re.sub(r"\[\d+\]$", "", where.rpartition(".")[-1])
    built = re.fullmatch(r"model|backbone|neck|\w*head|dcn|\w*(conv|norm|act)_cfg", key)
    if not built or not isinstance(name, str):
        return

    from mmdet.registry import MODELS

    # A scope in the name wins over the default scope, as in the toolbox's own builders.
    with MODELS.switch_scope_and_registry(None) as registry:
        if registry.get(name) is not None:
            return
        known = set(registry.module_dict) | set(MODELS.module_dict) | set(MODELS.parent.module_dict)
    kind = {"dcn": "convolution", "conv_cfg": "convolution"}.get(key, "module")
    close = difflib.get_close_matches(name, known)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    yield (
        f"{where}.type",
        f"no {kind} named {name!r} is registered{hint} (a module of yours must be imported through "
        "custom_imports)",
    )


def _pretrained(node: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping) and node.get("type") == "Pretrained":
        yield f"{where}.checkpoint", node.get("checkpoint")
    for key, child in _children(node):
        yield from _pretrained(child, _join(where, key))


def _class_counts(node: Any, where: str) -> Iterator[tuple[str, int]]:
    """The place and value of `num_classes` in every box and mask head."""
    if isinstance(node, Mapping) and re.search(r"(bbox|mask)_head(\[\d+\])?$", where):
        count = node.get("num_classes")
        if isinstance(count, int):
            yield f"{where}.num_classes", count
    for key, child in _children(node):
        yield from _class_counts(child, _join(where, key))


# ---------------------------------------------------------------------------------------------
# The data


def _datasets(node: Any, where: str) -> Iterator[tuple[Mapping, str]]:
    """The datasets that read files, at the bottom of wrappers that repeat, balance or join them."""
    if not isinstance(node, Mapping):
        return
    inner = [key for key in ("dataset", "datasets") if key in node]
    for key in inner:
        for child, place in _each(node[key], f"{where}.{key}"):
            yield from _datasets(child, place)
    if not inner:
        yield node, where


def _uses_root(dataset: Mapping) -> bool:
    """Whether a path of the dataset is relative, hence joined to its data_root."""
    paths = [dataset.get("ann_file"), *(dataset.get("data_prefix") or {}).values()]
    return any(isinstance(path, str) and not os.path.isabs(path) for path in paths)


def _dataset_problems(dataset: Mapping, where: str, model: Mapping) -> Problems:
    from mmdet.registry import DATASETS

    kind = dataset.get("type")
    if isinstance(kind, str):
        name, kind = kind, DATASETS.get(kind)
        if kind is None:
            yield f"{where}.type", f"no dataset named {name!r} is registered"
            return
    root = dataset.get("data_root") or ""
    ann_file = dataset.get("ann_file") or ""
    if ann_file and _is_local(dataset, root, ann_file):
        ann_file = os.path.join(root, ann_file)
        yield from _missing_file(ann_file, f"{where}.ann_file")
    images = None
    for key, prefix in (dataset.get("data_prefix") or {}).items():
        if not (isinstance(prefix, str) and _is_local(dataset, root, prefix)):
            continue
        folder = os.path.join(root, prefix)
        if folder and not os.path.isdir(folder):
            yield f"{where}.data_prefix.{key}", f"no folder {folder!r}"
        elif key == "img":
            images = folder
    if os.path.isfile(ann_file) and _is_local(dataset, root) and _reads_coco_json(kind):
        yield from _annotation_problems(dataset, where, kind, ann_file, images, model)


def _reads_coco_json(kind: type) -> bool:
    """Whether a dataset matches its classes with a COCO file's category names, as CocoDataset."""
    from mmdet.datasets import CocoDataset

    return getattr(kind, "load_data_list", None) is CocoDataset.load_data_list


def _annotation_problems(
    dataset: Mapping, where: str, kind: type, ann_file: str, folder: str | None, model: Mapping
) -> Problems:
    try:
        categories, images = _read_coco(ann_file)
    except ValueError as error:
        yield f"{where}.ann_file", f"{ann_file!r} is not a COCO annotation file: {error}"
        return
    if folder and images and not any(os.path.exists(os.path.join(folder, i)) for i in images):
        yield (
            f"{where}.data_prefix.img",
            f"the folder {folder!r} has none of the first {len(images)} images of {ann_file!r}, "
            f"such as {images[0]!r}",
        )

    place = f"{where}.metainfo.classes"
    classes = (dataset.get("metainfo") or {}).get("classes", kind.METAINFO.get("classes"))
    if isinstance(classes, str):
        if not os.path.exists(classes):
            yield (
                place,
                "expected a tuple of names or a file that lists them, got the string "
                f"{classes!r} (a tuple of one name needs a comma: ({classes!r},))",
            )
            return
        classes = Path(classes).read_text().split("\n")
        classes = [name for name in classes if name]
    if classes is None:
        return
    unknown = [name for name in classes if name not in categories]
    if unknown:
        yield (
            place,
            f"{_some(unknown)} not among the categories of {ann_file!r}, which has "
            f"{_some(categories)}; set metainfo=dict(classes=(...)) to names in the file",
        )
        return
    if list(classes) != [name for name in categories if name in set(classes)]:
        # Such a model trains and evaluates correctly, but labels count in the file's order.
        warnings.warn(
            f"{place} are not in the order of {ann_file!r}: pictures and per-class results will "
            "carry the wrong names.",
            stacklevel=2,
        )
    for head, count in _class_counts(model, "model"):
        if count < len(classes):
            yield head, f"{count} classes, but {where} has {len(classes)}"


def _read_coco(path: str) -> tuple[list[str], list[str]]:
    """Category names and the first image file names of a COCO file, in the file's order.

    Annotation files reach gigabytes, and the toolbox will parse this one soon enough: only the two
    lists are looked for.

    Raises:
        ValueError: the file is not JSON, cut short, or has no such lists.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("it is empty")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if text[-64:].rstrip()[-1:] != b"}":
            raise ValueError("it does not end with '}'; is the download complete?")
        categories = list(_json_values(text, "categories", "name"))
        return categories, list(
            islice(_json_values(text, "images", "file_name"), _IMAGES_LOOKED_FOR)
        )


def _json_values(text: mmap.mmap, key: str, field: str) -> Iterator[Any]:
    """The `field` of each object in the list `key` of a COCO file, read one by one."""
    # Other lists may have that name, so take the last one that holds such objects.
    starts = [m.end() for m in re.finditer(rb'"%s"\s*:\s*\[(?=\s*\{)' % key.encode(), text)]
    for start in reversed(starts):
        if field in next(_json_objects(text, start)):
            for entry in _json_objects(text, start):
                if field not in entry:
                    raise ValueError(f"an entry of {key!r} has no {field!r}")
                yield entry[field]
            return
    raise ValueError(f"it has no list {key!r} of objects with a {field!r}")


def _json_objects(text: mmap.mmap, start: int) -> Iterator[dict]:
    """Elements of the list of objects whose opening bracket is just before `start`."""
    decoder = json.JSONDecoder()
    separator = re.compile(rb"[\s,]*")
    while True:
        start = separator.match(text, start).end()
        if text[start : start + 1] == b"]":
            return
        # An object is complete or does not parse: try longer and longer pieces.
        size = 4096
        while True:
            piece = text[start : start + size].decode("utf-8", errors="ignore")
            try:
                element, length = decoder.raw_decode(piece)
            except json.JSONDecodeError:
                if start + size >= len(text):
                    raise
                size *= 4
            else:
                break
        yield element
        start += len(piece[:length].encode())


# ---------------------------------------------------------------------------------------------


def _each(node: Any, where: str) -> Iterator[tuple[Mapping, str]]:
    """The configs at a place that holds one or a list of them."""
    if isinstance(node, Mapping):
        yield node, where
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            if isinstance(child, Mapping):
                yield child, f"{where}.{index}"


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        # `items` of a config with lazy imports builds what it returns.
        yield from node.items()
    elif isinstance(node, (list, tuple)):
        yield from enumerate(node)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}" if isinstance(key, str) else f"{where}[{key}]"


def _is_local(node: Mapping, *paths: str) -> bool:
    backend = (node.get("backend_args") or {}).get("backend", "local")
    return backend == "local" and not any("://" in path for path in paths)


def _missing_file(path: str, where: str) -> Problems:
    if not os.path.isfile(os.path.expanduser(path)):
        yield where, f"no file {path!r}"


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
