"""Runs of a published grid, taken over so that another machine goes on where it ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mmdcn import files
from mmdcn.errors import InputError

from . import layers
from .cost import FILE as COST
from .jobs import DetectorJob, DigitJob
from .runner import result_file


def take_over(path: Path, jobs: Sequence[DigitJob | DetectorJob], folder: Path) -> int:
    """Write the results that a ``runs.json`` has into a work folder, as if they were made there.

    Weights are not published: a run that another, which has no result, starts from is left to be
    made again. What the folder has stays as it is.

    Args:
        path: of the ``runs.json``, see :func:`~.report.write`.
        jobs: of the grid.
        folder: of the results.

    Returns:
        The number of results that were written.

    Raises:
        InputError: there is no such file, or it is none.
    """
    try:
        published = json.loads(path.read_text())
        environments = published["environments"]
        results = {
            json.dumps(entry["run"], sort_keys=True): {
                **{
                    key: value for key, value in entry.items() if key not in ("part", "environment")
                },
                **environments[entry["environment"]],
            }
            for entry in [*published["runs"], *published.get("detectors", [])]
        }
        looked, cost = published.get("layers", []), published.get("cost")
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"--reuse {path}: expected a runs.json that `make evidence` wrote: {error!r}"
        ) from error
    found = {job: results.get(json.dumps(job.settings(), sort_keys=True)) for job in jobs}
    there = {job for job in jobs if result_file(job, folder).is_file()}
    due = [job for job in jobs if found[job] is None and job not in there]
    needed = {name for job in due for name in job.needs}
    taken = [job for job in jobs if found[job] and job not in there and job.name not in needed]
    for job in taken:
        files.write(result_file(job, folder), json.dumps(found[job], indent=1) + "\n")
    layers.remember(looked, folder)
    if cost is not None and not (folder / COST).exists():
        files.write(folder / COST, json.dumps(cost, indent=1) + "\n")
    return len(taken)
