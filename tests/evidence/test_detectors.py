"""Detectors on warped shapes: their grid, a small run of each kind, and the part of the page."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

import torch

from mmdcn.evidence import detector_grid, detector_report, detectors, report, training
from mmdcn.evidence.detector_grid import ARMS, DetectorRun
from mmdcn.evidence.detector_report import DetectorResults
from mmdcn.evidence.jobs import detector_jobs
from mmdcn.evidence.runner import result_file

ITERATIONS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Few images, and a plain detector trained on those that are not warped."""
    folder = tmp_path_factory.mktemp("detectors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "TRAIN_IMAGES", 16)
        patch.setattr(detectors, "VAL_IMAGES", 2)
        patch.setattr(detectors, "STRENGTHS", (0.0, 3.0))
        detectors.make_data(folder, seeds=1)
        detectors.train(run("detectors-upright", "plain"), folder)
        yield folder


def run(kind: str, arm: str) -> DetectorRun:
    return DetectorRun(kind, arm, ITERATIONS, seed=0, test_images=1)


def weights(kind: str, arm: str, folder) -> dict:
    return training.read_weights(training.weights_file(run(kind, arm), folder))


def test_a_run_from_scratch(folder):
    told = []
    result = detectors.train(run("detectors", "dcnv2"), folder, told.append)
    assert told == sorted(told) and told[-1] == 1.0
    assert result["run"] == run("detectors", "dcnv2").settings()
    assert set(result["ap"]) == {"0.0", "3.0"}
    assert all(0 <= ap <= 100 for ap in result["ap"].values())
    assert [point["iteration"] for point in result["curve"]] == [1, 2]
    assert len(result["offsets"]) == 4 + 6
    assert {name.split(".")[1] for name in result["offsets"]} == {"layer2", "layer3"}
    assert all(0 < mean <= largest for mean, largest, _ in result["offsets"].values())
    json.dumps(result)


def test_arms_of_a_seed_begin_with_the_weights_of_the_plain_one(folder):
    first = detectors._common_weights(run("detectors", "plain"), folder)
    again = detectors._common_weights(run("detectors", "dcn"), folder)
    assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("arm", ["dcn", "norm"])
def test_what_is_frozen_stays(folder, arm):
    detectors.train(run("detectors-frozen", arm), folder)
    before = weights("detectors-upright", "plain", folder)
    after = weights("detectors-frozen", arm, folder)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    learned = [name for name in before if not name.endswith(statistics)]
    assert all(torch.equal(before[name], after[name]) for name in learned)
    assert not torch.equal(before["backbone.bn1.running_mean"], after["backbone.bn1.running_mean"])
    added = [value for name, value in after.items() if "conv_offset" in name]
    assert len(added) == (2 * 10 if arm == "dcn" else 0)
    assert all(value.abs().max() > 0 for value in added)


def test_the_widened_detector_is_of_the_size_of_dcnv2():
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()

    def size(arm: str) -> int:
        built = MODELS.build(detectors.config(run("detectors", arm), Path()).model)
        return sum(p.numel() for p in built.parameters())

    assert 1 <= size("plain-size") / size("dcnv2") < 1.03


def test_the_grid_has_each_base_before_and_fits_into_hours():
    found = detector_grid.runs()
    assert len(set(found)) == len(found)
    for one in found:
        if one.base is not None:
            assert found.index(one.base) < found.index(one)
    for part, hours in (("detectors", 2.75), ("detectors-long", 1.2)):
        assert sum(map(detector_grid.seconds, detector_grid.runs([part]))) < 2 * hours * 3600
    assert {one.arm for one in detector_grid.runs(arms=["dcn"])} == {"dcn", "plain"}
    assert detector_grid.runs(arms=["dilated"]) == []


def test_longer_runs_are_a_part_of_their_own():
    assert all(job.part != "detectors-long" for job in detector_jobs(["detectors"]))
    longer = detector_jobs(["detectors-long", "scratch"], ["dcn"], seeds=2)
    assert [(job.part, job.run.arm, job.run.iterations, job.run.seed) for job in longer] == [
        ("detectors-long", "dcn", detector_grid.LONG_ITERATIONS, 0),
        ("detectors-long", "dcn", detector_grid.LONG_ITERATIONS, 1),
    ]
    whole = [job.run.seed for job in detector_jobs(["detectors-long"])]
    assert whole == sorted(whole), "a seed that is interrupted leaves those before it complete"


def result(one: DetectorRun, ap: float) -> dict:
    return {
        "run": one.settings(),
        "parameters": 1000,
        "ap": {str(strength): ap for strength in detector_grid.STRENGTHS},
        "offsets": {"backbone.layer2.0.conv2": [0.5, 2.0, 0.01]} if "dcn" in one.arm else {},
        "curve": [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "loss": 1.5}],
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "1", "mmdcn": "2", "python": "3"},
    }


def test_the_part_of_the_page(tmp_path):
    jobs = detector_jobs(["detectors", "detectors-long"])
    assert detector_report.section(DetectorResults.read(jobs, tmp_path), "page") == []
    for job in jobs:
        if job.run.arm != "dcnv4":
            ap = 50 + 4 * (job.run.arm == "dcn") + 0.5 * job.run.seed
            ap += 0.2 * (job.part == "detectors-long")
            text = json.dumps(result(job.run, ap))
            result_file(job, tmp_path).write_text(text)
    written = report.write([], tmp_path, tmp_path / "out" / "page", detectors=jobs)
    page = written[-1].read_text()
    assert tmp_path / "out" / "page" / detector_report.PICTURE in written
    assert f"](page/{detector_report.PICTURE})" in page
    assert "| plain | 1,000 | 3 | 50.5 ± 1.2 |" in page
    assert (
        "In twice as many iterations, the AP of *plain, parameters of DCNv2* at strength 1 changes "
        "by +0.2 ± 0.0 points (3 seeds)." in page
    )
    assert "| DCN | 3 | +4.0 ± 0.0 |" in page
    assert "DCN has an AP of 54.5 %, *plain, parameters of DCNv2* 50.5 %: +4.0 ± 0.0 points" in page
    assert "*norm statistics only* 50.5 %: +0.0 ± 0.0 points (3 seeds: no difference" in page
    assert "| detectors | DCN | backbone.layer2.0.conv2 | 0.50 | 2.0 | 1.0 |" in page
    assert "**Not finished: 3 runs** (arm/seed): detectors: dcnv4/0, dcnv4/1, dcnv4/2." in page
    kept = json.loads((tmp_path / "out/page/runs.json").read_text())["detectors"]
    assert len(kept) == len(jobs) - 3


def test_every_arm_has_a_config():
    assert {arm for part in detector_grid.PARTS.values() for _, arm in part} == set(ARMS)
