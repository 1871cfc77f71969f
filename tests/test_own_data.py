"""The page on training with one's own data: its config and its commands, on a tiny data set."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mmdet")

import mmdcn
from tests import small_detector
from tests.programs import REPOSITORY, Program
from tests.tools import project

PAGE = REPOSITORY / "docs" / "own-data.md"
if not PAGE.is_file():
    pytest.skip("the tests are alone here, without the documentation", allow_module_level=True)
TOOLS = Path(mmdcn.__file__).parent / ".mim" / "tools"

# Nothing is downloaded, the network is narrow, and images stay as small as they are.
SMALLER = f"""
_base_ = './mine.py'
load_from = None
{small_detector.MODEL}
model['backbone'].update(frozen_stages=-1, init_cfg=None)
{project.CONFIG[project.CONFIG.index("train_pipeline") : project.CONFIG.index("data_root")]}
loading = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loading, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(**loading, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
"""


def commands(page: str) -> list[list[str]]:
    """The arguments of the page's commands, each a tool and its own."""
    return [line.split()[1:] for line in re.findall(r"^python \$TOOLS/.*$", page, re.MULTILINE)]


def test_the_whole_walk(tmp_path):
    page = PAGE.read_text()
    project.make(tmp_path)
    (config,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.py").write_text(config)
    # What the page calls mine.py is the smaller one here; where it works is the same.
    (tmp_path / "smaller.py").write_text(SMALLER + "work_dir = 'work_dirs/mine'\n")
    used = commands(page)
    assert [command[0] for command in used] == [
        f"$TOOLS/{tool}.py" for tool in ("train", "test", "image_demo", "visualize_sampling")
    ]
    renamed = {
        "mine.py": "smaller.py",
        "work_dirs/mine/epoch_12.pth": "work_dirs/mine/epoch_1.pth",
        "data/images": "data/images/val1.png",
        "data/images/a.jpg": "data/images/val1.png",
    }
    for tool, *arguments in used:
        command = [TOOLS / tool.removeprefix("$TOOLS/"), *(renamed.get(a, a) for a in arguments)]
        done = Program(command, tmp_path, project.environment(tmp_path)).finish()
        assert done.returncode == 0, done.stdout
    assert list((tmp_path / "work_dirs/mine").glob("best_coco_bbox_mAP_epoch_*.pth"))
    assert list((tmp_path / "work_dirs/mine").rglob("pictures/*.png"))
    assert (tmp_path / "outputs/vis/val1.png").is_file()
    assert (tmp_path / "outputs/preds/val1.json").is_file()
    assert list(tmp_path.glob("*sampling*.html"))


def test_the_folder_of_the_tools(capsys):
    (code,) = re.findall(r"^TOOLS=\$\(python -c '(.*)'\)/\.mim/tools$", PAGE.read_text(), re.M)
    exec(code, {})
    assert Path(capsys.readouterr().out.strip(), ".mim", "tools") == TOOLS
