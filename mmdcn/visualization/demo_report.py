"""The demo's report: its table, its words, and where its pictures stand."""

from __future__ import annotations

from mmdcn import timing
from mmdcn.datasets import warped_shapes
from mmdcn.markdown import table

#: The columns of the table, and what mmdet's CocoMetric calls them.
METRICS = {
    "AP": "bbox_mAP",
    "AP50": "bbox_mAP_50",
    "APs": "bbox_mAP_s",
    "APm": "bbox_mAP_m",
    "APl": "bbox_mAP_l",
}

#: What is said of a report that `--quick` made.
QUICK_NOTE = """
**A quick look: so few iterations on so few images show that it works, and nothing of which model
is better.** The same command without `--quick` trains ten times as long.
"""


def text(report: dict) -> str:
    """The report as Markdown."""
    models = report["models"]
    any_model = next(iter(models.values()))
    data = report["data"]
    versions = ", ".join(f"{name} {version}" for name, version in any_model["versions"].items())
    header, *rows = table_rows(models)
    return f"""# Faster R-CNN on warped shapes: plain, DCN and DCNv2
{QUICK_NOTE if report["quick"] else ""}
{chr(10).join(table(header, rows))}

Tested on {data["val_images"]} images that no model has seen, by mmdet's CocoMetric. Each model
trained from scratch on {data["train_images"]} images with the same schedule and the same seed
({data["seed"]}): {any_model["iterations"]} iterations of {any_model["batch_size"]} images.
Time per training iteration is the median, on {any_model["machine"]}; {versions}.
{scatter_note(models)}
## Detections

![detections](detections.png)

## Sampling points of the last deformable layer

The green cross is the output position nearest to the object's centre, the rings are the points
of a plain 3×3 convolution there, and the dots are where the layer samples instead; in DCNv2
their colour is the modulation.

![sampling points](sampling_points.png)

## Data

![contact sheet](data/{warped_shapes.CONTACT_SHEET})
"""


def scatters(result: dict) -> bool:
    """Whether the times of iterations scatter so much that they do not compare."""
    lower, upper = result["seconds_per_iteration_quartiles"]
    return timing.scatters(lower, result["seconds_per_iteration"], upper)


def scatter_note(models: dict[str, dict]) -> str:
    """What a mark at a time means, where there is one."""
    if not any(map(scatters, models.values())):
        return ""
    return (
        f"{timing.SCATTER_MARK} half of the iterations spread over more than {timing.SCATTER:.0%} "
        "of the median, "
        "as beside other work: these times do not compare.\n"
    )


def table_rows(models: dict[str, dict]) -> list[list[str]]:
    """The header and one row per model."""
    rows = [["model", *METRICS, "params", "ms / iter"]]
    for name, result in models.items():
        # CocoMetric says -1 where there is no object of that size.
        metrics = [f"{result[m]:.3f}" if result[m] >= 0 else "–" for m in METRICS]
        milliseconds = f"{timing.SCATTER_MARK * scatters(result)}"
        milliseconds += f"{result['seconds_per_iteration'] * 1000:.0f}"
        rows.append([name, *metrics, f"{result['parameters'] / 1e6:.2f} M", milliseconds])
    return rows
