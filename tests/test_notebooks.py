"""The notebooks: twins with the same code, commands that the programs take, and a whole run of few steps."""

import json
import re

import pytest
from stage import ROOT

from course.checks import of_command

NOTEBOOKS = {language: ROOT / "notebooks" / f"{name}.ipynb" for language, name in
             (("en", "minimind"), ("zh", "minimind_zh"))}  # fmt: skip
SETTINGS = 'PRETRAIN_STEPS, SFT_STEPS = 3, 3\nOUT = "{}"'


def cells(language: str, kind: str) -> list[dict]:
    notebook = json.loads(NOTEBOOKS[language].read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_the_twins_have_the_same_code_and_no_outputs():
    assert [source(cell) for cell in cells("en", "code")] == [source(cell) for cell in cells("zh", "code")]
    assert all(cell["outputs"] == [] for language in NOTEBOOKS for cell in cells(language, "code"))
    headings = [[line for cell in cells(language, "markdown") for line in re.findall(r"^#+ \d*", source(cell), re.M)]
                for language in NOTEBOOKS]  # fmt: skip
    assert headings[0] == headings[1] and len(headings[0]) > 5


@pytest.mark.parametrize("language", NOTEBOOKS)
def test_links_lead_to_files(language):
    text = "".join(source(cell) for cell in cells(language, "markdown"))
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (NOTEBOOKS[language].parent / target).is_file(), target


def test_the_programs_take_the_commands():
    values = {"OUT": "out/notebook", "DTYPE": "float32", "PRETRAIN_STEPS": "1", "SFT_STEPS": "1"}
    code = "\n".join(source(cell) for cell in cells("en", "code")).replace("\\\n", "")
    commands = re.findall(r"^!(python .+)$", code, re.M)
    assert len(commands) >= 5
    for command in commands:
        assert of_command(re.sub(r"\{(\w+)\}", lambda name: values[name[1]], command)) is None


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path):
    """All cells but the one that installs, with three steps a stage."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOKS["en"], as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", ())]
    (settings,) = (cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", ()))
    settings.source = SETTINGS.format(tmp_path)
    path = {"metadata": {"path": str(ROOT / "notebooks")}}  # as a notebook opened in the repository is started
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=path).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "error:" not in printed and "Traceback" not in printed, printed
    assert printed.count('"stage": ') >= 2
    for name in ("pretrain_160.pth", "full_sft_160.pth", "my-model/model.safetensors", "my-model.zip"):
        assert (tmp_path / name).is_file(), name
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "中国的首都是哪里？" in printed
