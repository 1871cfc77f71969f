"""The published page of a GPU: of one report or several, and refusals."""

import json

import pytest

from mmdcn.benchmark import BenchmarkError, cli
from mmdcn.benchmark.gpu import page


def report(path, sections: dict, device: str = "cuda"):
    cases = {
        name: {
            "status": "passed",
            "seconds": 1.0,
            "total": 1,
            "cases": [{"number": 0, "case": name, "status": "passed", "result": result}],
        }
        for name, result in sections.items()
    }
    path.write_text(json.dumps({"part": "fast", "device": device, "sections": cases}))
    return path


def row(stage: str, ours: float) -> dict:
    taken = {"mmdcn": ours, "dense": 1.0, "torchvision": 2.0 * ours}
    facts = {"stage": stage, "batch": 2, "arithmetic": "float16", "layout": "nchw"}
    both = {"forward": taken, "forward_backward": taken}
    return facts | {"milliseconds": both, "extra_mb": {name: {} for name in both}}


FACTS = {"gpu": "A GPU", "torch": "2.11.0", "mmdcn's folder": "/somewhere", "ncu": "/elsewhere"}


def test_the_page_has_the_last_of_each_section(tmp_path):
    first = report(tmp_path / "a.json", {"environment": FACTS, "convolution": row("c3", 1.5)})
    second = report(tmp_path / "b.json", {"convolution": row("c4", 1.25)})
    assert cli.main(["gpu", str(first), str(second), "--out", str(tmp_path / "gpu")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    assert "gpu A GPU, torch 2.11.0" in text and "where" not in text
    assert "| c4 | 2 | float16 | nchw | 1.250 | 1.000 | 2.500 | 1.25× | 2.00× |" in text
    assert "c3" not in text
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    # Its own JSON makes the same page anew.
    assert page.merge([tmp_path / "gpu.json"])["sections"].keys() == {"environment", "convolution"}


@pytest.mark.parametrize(
    "change,said",
    [
        ({"gpu": "Another"}, "is of another machine or version: gpu"),
        ({"torch": "2.12.0", "cuDNN": "9"}, "is of another machine or version: cuDNN, torch"),
    ],
)
def test_reports_of_different_machines_are_refused(tmp_path, change, said):
    runs = [
        report(tmp_path / "a.json", {"environment": FACTS}),
        report(tmp_path / "b.json", {"environment": FACTS | change}),
    ]
    with pytest.raises(BenchmarkError, match=said):
        page.merge(runs)


def test_what_is_no_report_of_a_gpu_is_refused(tmp_path, capsys):
    rehearsal = report(tmp_path / "a.json", {}, device="cpu")
    other = tmp_path / "b.json"
    other.write_text("[]")
    for path, said in (
        (rehearsal, "is of a rehearsal without a GPU"),
        (other, "is not what tools/gpu_check.sh writes"),
        (tmp_path / "missing.json", "cannot read"),
    ):
        assert cli.main(["gpu", str(path), "--out", str(tmp_path / "gpu")]) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "gpu.md").exists()
