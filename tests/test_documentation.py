"""Links, names, files, figures and code in README and docs: all lead somewhere, and hold.

`make docs` checks more, with tools of its own; this is what can be checked in a second.
"""

import ast
import re
import string
from pathlib import Path

import pytest
import yaml

from mmdcn.version import __version__
from tests.test_examples import _MODULES, _public_names

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "README.md").is_file():
    pytest.skip("the tests are alone here, without a checkout", allow_module_level=True)

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(path: Path) -> set[str]:
    """The anchors that the site's builder, and GitHub alike, make of the headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
        found.add(re.sub(r"[\s]+", "-", plain))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        target, _, anchor = link.partition("#")
        if target.startswith("https://"):
            continue
        where = (path.parent / target).resolve() if target else path
        assert where.is_file(), f"{name(path)}: no {link}"
        if anchor:
            assert anchor in anchors(where), f"{name(path)}: no heading for {link}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_named_files_exist(path):
    """Of what stands in backticks and looks like a path of this repository; NAME stands for any."""
    begin = r"(?:mmdcn|tests|tools|docs|configs)"
    for named in re.findall(rf"`({begin}/[\w./*-]+)`", path.read_text()):
        named = named.replace("NAME", "*")
        assert list(ROOT.glob(named.rstrip("/"))), f"{name(path)}: no {named}"


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_named_tests_exist(path):
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    for named in re.findall(r"`(test_\w+)`", path.read_text()):
        assert f"def {named}(" in tests, f"{name(path)}: no {named}"


def test_readme_fits_one_reading():
    assert len(README.splitlines()) <= 120


def test_every_page_is_in_the_menu_and_every_entry_is_a_page():
    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [file for part in parts for file in files(part)]

    menu = files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


def test_every_public_name_is_in_the_reference():
    shown = [
        entry
        for path in (DOCS / "reference").glob("*.md")
        for entry in re.findall(r"^::: (\S+)$", path.read_text(), re.MULTILINE)
    ]
    assert len(set(shown)) == len(shown)
    public = {f"{module}.{each}" for module in _MODULES for each in _public_names(module)}
    assert public <= set(shown)


def messages_of_the_package() -> str:
    """Every string of the sources, one a line, with … for what is filled in."""
    lines = []
    for path in [*(ROOT / "mmdcn").rglob("*.py"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "…") for part in node.values]
                lines.append("".join(p if isinstance(p, str) else "…" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                lines.append(node.value)
    return "\n".join(lines)


#: What other programs say, or mmdcn says only with what is filled in.
OTHERS = (
    *("is not a supported wheel", "pkg_resources", "mmcv._ext", "is not in the", "Weights only"),
    *("does not support to load", "Not implemented yet", "source state_dict", "no kernel image"),
    *(
        "NOT_IMPLEMENTED",
        "Unknown builtin op",
        "Unknown type name",
        "expected dtype float16",
        "The loss is NaN",
    ),
    "in_channels: expected a multiple",
    "offset.shape[1] is not valid",
)


def test_messages_to_search_for_are_messages():
    headings = re.findall(r"^\*\*(.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 20
    said = messages_of_the_package()
    ours = 0
    for heading in headings:
        if any(part in heading for part in OTHERS):
            continue
        for fragment in re.split(r"…", re.search(r"`([^`]*)`", heading).group(1)):
            fragment = fragment.strip(string.punctuation.replace("'", "") + " ")
            if len(fragment) > 10:
                ours += 1
                assert fragment in said, f"nothing says {fragment!r}"
    assert ours >= 12


def readme_ratios() -> dict[str, list[float]]:
    """The columns of the generated table, but for the row of the detector."""
    block = README[README.index("<!-- benchmark -->") :]
    header, _, *rows = [line for line in block.splitlines() if line.startswith("| ")][:8]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    values = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    shapes = [row for row in values if re.match(r"\d", row[0])]
    return {
        column: [float(row[index].rstrip("×")) for row in shapes]
        for index, column in enumerate(names)
        if index and all(row[index].endswith("×") for row in shapes)
    }


def test_readme_quotes_the_generated_table():
    """Whoever measures anew, rewrites the row of reasons."""

    def span(column: str) -> str:
        values = readme_ratios()[column]
        return f"{min(values):.3g}–{max(values):.3g}×"

    (row,) = [line for line in README.splitlines() if "beside a dense convolution" in line]
    for column in ("mmcv, forward", "mmcv, forward + backward"):
        assert span(column) in row
    for column in ("mmdcn, forward", "mmdcn, forward + backward"):
        assert span(column) in row


def test_results_in_the_readme_are_those_of_the_evidence():
    def rows(text: str) -> tuple[list[str], dict[str, list[str]]]:
        header, _, *lines = (
            [c.strip() for c in line.split("|")[1:-1]] for line in text.split("\n")
        )
        return header, {cells[0]: cells for cells in lines}

    header, own = rows(re.search(r"^\| accuracy, %(?:.*\n)+?(?=\n)", README, re.M)[0].strip())
    page = (DOCS / "evidence.md").read_text()
    names, measured = rows(
        re.search(r"^\| arm \| parameters(?:.*\n)+?(?=\n)", page, re.M)[0].strip()
    )
    assert len(own) == 4
    for arm, cells in own.items():
        for name, cell in list(zip(header, cells, strict=True))[1:]:
            assert cell == measured[arm][names.index(name)], (arm, name)
    (seeds,) = {measured[arm][names.index("seeds")] for arm in own}
    assert f"Means of {seeds} seeds" in README


def test_costs_of_layers_are_those_of_the_benchmark():
    page = (DOCS / "which-layer.md").read_text()
    measured = (DOCS / "benchmarks/cpu.md").read_text()
    costs = page[page.index("## What it costs") :]
    figures = re.findall(r"\d+\.\d+", "".join(re.findall(r"^\| .*$", costs, re.M)))
    figures += re.findall(r"(\d+\.\d+)(?: M|,| and|\))", costs[costs.index("Parameters") :])
    assert len(figures) > 20
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", measured), figure


def test_citation_and_changelog_know_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert [reference["url"].rpartition("/")[2] for reference in citation["references"]] == [
        *("1703.06211", "1811.11168", "2211.05778", "2401.06197")
    ]
    assert f"\n## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/get-started.md"])
def test_the_whole_config_is_one(page, tmp_path):
    pytest.importorskip("mmdet")
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from mmdcn import layers

    blocks = re.findall(r"```python\n(_base_.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (text,) = blocks
    (tmp_path / "config.py").write_text(text)
    config = Config.fromfile(tmp_path / "config.py")
    init_default_scope(config.default_scope)
    with torch.device("meta"):
        model = MODELS.build(config.model)
    kinds = [type(m) for m in model.modules() if isinstance(m, layers.ModulatedDeformConv2dPack)]
    assert len(kinds) == 13
