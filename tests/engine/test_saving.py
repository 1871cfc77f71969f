"""Checkpoints are whole or not there, and one is deleted only when the next one is there."""

import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub
from mmengine.runner import checkpoint as toolbox
from mmengine.runner import runner as runner_module

from mmdcn.engine import checkpoint, saving

pytestmark = pytest.mark.usefixtures("safe_checkpoints")


def save(path):
    toolbox.save_checkpoint({"state_dict": {"weight": torch.ones(1000)}}, str(path))


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "epoch_1.pth"
    save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["epoch_1.pth"]


def test_a_link_is_followed_and_a_device_is_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "epoch_1.pth"
    link.symlink_to(tmp_path / "there" / "a.pth")
    save(link)
    assert link.is_symlink() and saving.is_complete(tmp_path / "there" / "a.pth")
    get_file_backend("/dev/null").put(b"text", "/dev/null")
    assert not os.path.isfile("/dev/null")


# ------------------------------------------------------------------------------ the hook


class FakeRunner(SimpleNamespace):
    """As much of a runner as the hook asks for; `events`: what was in the folder at each save."""

    def __init__(self, work_dir):
        super().__init__(work_dir=str(work_dir), epoch=0, iter=0, events=[])
        self.message_hub = MessageHub.get_instance(f"hub {work_dir}")
        self.logger = SimpleNamespace(info=lambda *_: None, warning=lambda *_: None)

    def save_checkpoint(self, out_dir, filename, *_, **__):
        self.events.append(sorted(n for n in os.listdir(out_dir) if n.endswith(".pth")))
        save(f"{out_dir}/{filename}")

    def checkpoints(self):
        return sorted(n for n in os.listdir(self.work_dir) if n.endswith(".pth"))


@pytest.mark.parametrize("kept", [1, 2])
def test_the_former_checkpoint_is_there_until_the_next_is(tmp_path, kept):
    runner = FakeRunner(tmp_path)
    hook = CheckpointHook(interval=1, max_keep_ckpts=kept)
    hook.before_train(runner)
    for epoch in range(4):
        runner.epoch = epoch
        hook._save_checkpoint(runner)
        last = [f"epoch_{n}.pth" for n in range(max(1, epoch + 2 - kept), epoch + 2)]
        assert runner.checkpoints() == last
        assert runner.message_hub.get_info("keep_ckpt_ids") == [int(n[6:-4]) for n in last]
    assert [len(names) for names in runner.events] == [min(n, kept) for n in range(4)]


@pytest.mark.parametrize("indicators", ["a", ["a", "b"]])
def test_the_former_best_one_is_there_until_there_is_a_better_one(tmp_path, indicators):
    runner = FakeRunner(tmp_path)
    hook = CheckpointHook(interval=1, max_keep_ckpts=1, save_best=indicators, rule="greater")
    hook.before_train(runner)
    for epoch, score in enumerate((0.1, 0.2, 0.15), start=1):
        runner.epoch = epoch
        hook._save_best_checkpoint(runner, {"a": score, "b": 1 - score})
    best = ["best_a_epoch_2.pth"] + ["best_b_epoch_1.pth"] * (indicators != "a")
    assert runner.checkpoints() == best
    # When the better one was saved, the former one was still there.
    assert [names for names in runner.events if "best_a_epoch_1.pth" in names]
    assert not [n for n in runner.events[1:] if not any("best_a" in name for name in n)]


# ------------------------------------------------------------------------------ resuming


def in_folder(folder, *names, record=None, cut=()):
    """Checkpoints, one younger than the other, some of them cut short."""
    for age, name in enumerate(names):
        save(folder / name)
        if name in cut:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[: len(content) // 2])
        os.utime(folder / name, (age, age))
    if record is not None:
        (folder / "last_checkpoint").write_text(record)


@pytest.mark.parametrize(
    ("names", "record", "cut", "expected"),
    [
        (["epoch_1.pth", "epoch_2.pth"], "epoch_1.pth", [], "epoch_1.pth"),
        # Of a longer run before this one, whose numbers are higher.
        (["epoch_9.pth", "epoch_1.pth"], "epoch_1.pth", [], "epoch_1.pth"),
        (["epoch_1.pth", "epoch_2.pth"], "epoch_2.pth", ["epoch_2.pth"], "epoch_1.pth"),
        (["epoch_9.pth", "epoch_1.pth"], "", [], "epoch_1.pth"),
        (["iter_10.pth", "iter_20.pth"], "iter_30.pth", [], "iter_20.pth"),
        (["epoch_1.pth", "best_a_epoch_1.pth"], None, [], "epoch_1.pth"),
        (["epoch_1.pth"], "epoch_1.pth", ["epoch_1.pth"], None),
        ([], "epoch_1.pth", [], None),
        ([], None, [], None),
    ],
)
def test_the_checkpoint_to_go_on_from(tmp_path, names, record, cut, expected):
    record = record and str(tmp_path / record)
    in_folder(tmp_path, *names, record=record, cut=cut)
    found = runner_module.find_latest_checkpoint(str(tmp_path))
    assert found == (expected and str(tmp_path / expected))


def test_an_address_is_taken_as_it_is(tmp_path):
    in_folder(tmp_path, "epoch_1.pth", record="s3://bucket/epoch_7.pth")
    assert saving.find_latest_checkpoint(str(tmp_path)) == "s3://bucket/epoch_7.pth"


def test_files_of_torchs_former_format_are_complete(tmp_path):
    torch.save({"a": 1}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert saving.is_complete(tmp_path / "a.pth")
    (tmp_path / "b.pth").touch()
    assert not saving.is_complete(tmp_path / "b.pth")


def test_install_can_be_undone():
    ours = CheckpointHook._save_checkpoint_with_step
    checkpoint.uninstall()
    assert CheckpointHook._save_checkpoint_with_step is not ours
    assert toolbox.find_latest_checkpoint is not saving.find_latest_checkpoint
    assert runner_module.find_latest_checkpoint is toolbox.find_latest_checkpoint
    checkpoint.install()
    checkpoint.install()
    assert runner_module.find_latest_checkpoint is saving.find_latest_checkpoint
    assert CheckpointHook._save_checkpoint_with_step is ours
