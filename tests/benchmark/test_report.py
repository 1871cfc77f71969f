"""The tables, the page, the picture and README's block, from runs with made-up samples."""

import json
from pathlib import Path

import pytest

from mmdcn.benchmark import BenchmarkError, cases, report, tables

ROOT = Path(__file__).parents[2]


def fields(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of(lines: list[str]) -> list[dict[str, str]]:
    """The rows of a Markdown table, by the names of its columns."""
    header, _, *rows = [fields(line) for line in lines if line.startswith("|")]
    return [dict(zip(header, row)) for row in rows]


def operators_run() -> dict:
    entries = []
    shapes = cases.expand(["design"], ["v1", "v2"], ["nchw"], ["float32"])
    for number, case in enumerate(shapes, 1):
        samples = {"mmdcn": [3.0, 2.0, 99.0], "dense": [2.0, 2.0], "mmcv": [20.0 * number]}
        entry = {**case.describe(), "times": {}, "cannot": {"onnxruntime": "too old"}}
        for direction in ("forward", "forward_backward"):
            entry["times"][direction] = samples
            entry.setdefault("floor_ms", {})[direction] = {"multiply": 2, "move": 1}
        entries.append(entry)
    return {
        "command": "tools/benchmark.py ops",
        "benchmark": "operators",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 8.0, "os": "Some Linux"},
        "versions": {"mmdcn": "1.0", "torch": "2.13"},
        "settings": {"device": "cpu", "threads": 2, "offset_std": 2.0, "seconds_per_call": 1},
        "implementations": ["mmdcn", "dense", "mmcv", "onnxruntime"],
        "left_out": {"torchvision": "torchvision is not installed"},
        "rates": {
            "copy_gb_per_s": 10.0,
            "read_gb_per_s": 12.0,
            "gflop_per_s": {"float32": 100.0},
            "gflop_per_s_from": {"float32": "a matrix product"},
        },
        "cases": entries,
        "complete": True,
    }


def detectors_run() -> dict:
    common = {"parameters": 41_000_000, "flops": 90 * 10**9}
    times = {None: (1000.0, 500.0), "mmdcn": (1500.0, 600.0), "mmcv": (4500.0, 900.0)}
    entries = [
        {
            **common,
            "batch": 2,
            "config": "plain" if kernels is None else "mdconv",
            "kernels": kernels,
            "deformable": kernels is not None,
            "times": {"training": [training, training], "inference": [inference]},
        }
        for kernels, (training, inference) in times.items()
    ]
    run = operators_run()
    settings = {"threads": 2, "size": [320, 240], "batches": [2], "amp": False, "offset_std": 2.0}
    for key in ("rates", "implementations", "left_out"):
        del run[key]
    return run | {"benchmark": "detectors", "settings": settings, "cases": entries}


def test_ratios_are_those_of_the_medians():
    lines = tables.operator_lines(operators_run())
    start = lines.index("Forward, ms (× dense):")
    rows = rows_of(lines[start : lines.index("", start + 2)])
    assert rows[2] == {
        "N, C→Co, H×W": "1, 256→256, 50×68",
        "": "v1",
        "floor": "2.00",
        "dense": "2.00",
        "mmdcn": "3.00 (1.50×)",
        "mmcv": "60.0 (30×)",
        "mmdcn ÷ floor": "1.50×",
    }
    text = "\n".join(lines)
    assert "— onnxruntime: too old." in text
    assert "Left out: torchvision: torchvision is not installed." in text
    assert "100 GFLOP/s in float32 (a matrix product); 10 GB/s copying, 12 GB/s reading" in text


def test_detectors_are_compared_with_the_first():
    lines = tables.detector_lines(detectors_run())
    rows = rows_of(lines)
    assert [list(row.values())[:6] for row in rows] == [
        ["plain", "—", "2.00", "1.00×", "4.00", "1.00×"],
        ["mdconv", "mmdcn", "1.33", "1.50×", "3.33", "1.20×"],
        ["mdconv", "mmcv", "0.44", "4.50×", "2.22", "1.80×"],
    ]
    assert "mmcv ÷ mmdcn, mdconv: training 3.00×, inference 1.50×." in lines


def test_readme_shows_the_four_shapes_and_the_detector():
    block = report.readme_block([detectors_run(), operators_run()], "docs/benchmarks/cpu")
    rows = rows_of(block.splitlines())
    assert [row["time relative to plain"] for row in rows] == [
        "1, 128→128, 40×54",
        "1, 256→256, 50×68",
        "1, 512→512, 25×34",
        "2, 128→128, 100×136",
        "detector mdconv",
    ]
    assert list(rows[1].values())[1:] == ["1.50×", "40×", "1.50×", "40×"]
    assert list(rows[4].values())[1:] == ["1.20×", "1.80×", "1.50×", "4.50×"]
    assert "(docs/benchmarks/cpu.png)" in block and "(docs/benchmarks/cpu.md)" in block
    assert "Some CPU, 2 threads" in block


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- benchmark -->\nold\n<!-- /benchmark -->\nafter\n")
    return path


def test_publishing_again_changes_nothing(tmp_path, readme):
    target = tmp_path / "docs" / "cpu"
    written = report.publish([operators_run(), detectors_run()], target, readme)
    assert [path.name for path in written] == ["cpu.json", "cpu.md", "cpu.png", "README.md"]
    assert {path.name for path in target.parent.iterdir()} == {"cpu.json", "cpu.md", "cpu.png"}
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmark -->\n!")
    assert text.endswith("<!-- /benchmark -->\nafter\n") and "old" not in text
    before = [path.read_bytes() for path in written]
    again = report.publish(report.load_runs([target.with_suffix(".json")]), target, readme)
    assert again == written
    assert [path.read_bytes() for path in written] == before


def test_readme_without_its_markers_is_left_alone(tmp_path, readme):
    readme.write_text("before\n<!-- benchmark -->\n")
    with pytest.raises(BenchmarkError, match=r"--readme: expected .* found only the first"):
        report.publish([operators_run()], tmp_path / "cpu", readme)
    assert readme.read_text() == "before\n<!-- benchmark -->\n"
    assert not (tmp_path / "cpu.json").exists()


def test_only_finished_runs_are_published(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(operators_run() | {"complete": False}))
    with pytest.raises(BenchmarkError, match=r"run.json: .*interrupted"):
        report.load_runs([path])
    for content in ("", "[]", '{"some": "json"}'):
        path.write_text(content)
        with pytest.raises(BenchmarkError, match=r"run.json: expected what tools/benchmark.py"):
            report.load_runs([path])
    with pytest.raises(BenchmarkError, match=r"absent.json: expected what"):
        report.load_runs([tmp_path / "absent.json"])


def test_what_this_repository_publishes_is_what_was_measured():
    target = ROOT / "docs" / "benchmarks" / "cpu"
    runs = report.load_runs([target.with_suffix(".json")])
    assert target.with_suffix(".md").read_text() == report.document(runs, "cpu")
    assert target.with_suffix(".png").is_file()
    assert report.readme_block(runs, "docs/benchmarks/cpu") in (ROOT / "README.md").read_text()
