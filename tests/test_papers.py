"""The papers keep their word: twins agree, named files exist, commands' flags exist."""

import contextlib
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from stage import STAGES, load

ROOT = Path(__file__).resolve().parent.parent
TWINS = [(en, en.with_name(en.stem + "_zh.md")) for en in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
TWINS = [(en, zh) for en, zh in TWINS if zh.exists()]


def blocks(text: str) -> list[str]:
    """Code blocks without their comments."""
    found = re.findall(r"```.*?\n(.*?)```", text, re.S)
    return [re.sub(r"\s+#.*", "", block) for block in found]


def numbers_of_tables(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [re.findall(r"\d[\d,.]*", re.sub(r"`[^`]*`", "", row)) for row in rows]


@pytest.mark.parametrize(("en", "zh"), TWINS, ids=lambda p: p.name)
def test_twins_have_the_same_headings_commands_and_figures(en, zh):
    one, two = en.read_text(encoding="utf-8"), zh.read_text(encoding="utf-8")
    levels = [re.findall(r"^#+", text, re.M) for text in (one, two)]
    assert levels[0] == levels[1]
    assert blocks(one) == blocks(two)
    tables = [len(rows) for rows in (numbers_of_tables(one), numbers_of_tables(two))]
    assert tables[0] == tables[1]


def test_readmes_tables_hold_the_same_code_spans():
    spans = [
        re.findall(r"^\|.*", (ROOT / name).read_text(encoding="utf-8"), re.M) for name in ("README.md", "README_zh.md")
    ]
    for one, two in zip(*spans, strict=True):
        assert sorted(re.findall(r"`[^`]+`", one)) == sorted(re.findall(r"`[^`]+`", two)), one


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_parameter_counts_in_the_table_are_the_presets(name):
    from model.LMConfig import LMConfig

    for preset, count in re.findall(r"^\| ([\w-]+) \| ([\d,]+) \|", (ROOT / name).read_text(encoding="utf-8"), re.M):
        assert LMConfig.from_preset(preset).parameter_count() == int(count.replace(",", ""))


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_what_the_presets_cost_is_what_the_formulas_and_the_measurements_say(name, monkeypatch):
    import torch

    from model.LMConfig import LMConfig
    from trainer.duration import REACHED, operations
    from trainer.log import GPU_TFLOPS
    from trainer.memory import GB, training_bytes
    from trainer.world import World

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))  # an RTX 3090's
    speed, tokens, yuan = REACHED["cuda"] * GPU_TFLOPS["RTX 3090"] * 1e12, 0.9e9, 1.3
    args = SimpleNamespace(seq_len=512, optimizer="muon", gradient_checkpointing=False)
    measured = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    rows = re.findall(r"^\| (minimind\S+) \| [\d,]+ \| (.*) \|$", (ROOT / name).read_text("utf-8"), re.M)
    assert len(rows) == 8
    for preset, figures in rows:
        config = LMConfig.from_preset(preset)
        hours = operations(config, args, tokens) / speed / 3600
        gpu = training_bytes(
            config, args, World(0, 1, torch.device("cuda"), torch.bfloat16), 32, config.parameter_count()
        )
        (cpu,) = re.findall(rf"^\| {preset} \| pretrain \| [\d.]+ \| ([\d.]+) \|", measured, re.M)
        wanted = (hours, hours * yuan, gpu / GB, float(cpu))
        for figure, value in zip(map(float, figures.split(" | ")), wanted, strict=True):
            assert figure == pytest.approx(value, abs=0.0501), preset


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_what_the_demo_knows_is_what_was_measured(name):
    """The five figures of the demo, in their order, are those of docs/benchmarks.md."""
    known = re.findall(r"^\| .*\D \| (\d+\.\d%) \|$", (ROOT / name).read_text("utf-8"), re.M)
    table = (ROOT / "docs" / "benchmarks.md").read_text("utf-8").split("## The sample")[1].split("\n## ")[0]
    assert len(known) == 5
    assert known == re.findall(r"\| (\d+\.\d%)(?: \([^)]*\))? \|$", table, re.M)[:5]


PAPERS = ["README.md", "README_zh.md"] + [f"docs/{stem}{end}.md" for stem in ("data", "devices")
                                          for end in ("", "_zh")]  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_commands_that_train_name_their_data(name):
    """Else they would take MiniMind's gigabytes as soon as those are there. ("..." stands for flags given before.)"""
    text = re.sub(r"\\\n", " ", (ROOT / name).read_text("utf-8"))
    commands = [line for line in text.splitlines() for script in STAGES.values() if f"{script} " in line + " "]
    commands = [line for line in commands if line.startswith(("python ", "torchrun ", "deepspeed "))]
    assert commands and not [line for line in commands if "--data_path" not in line and " ... " not in line]


def test_flags_of_the_commands_exist(monkeypatch):
    """Every --flag written after a script of ours is one that its --help knows; the log's commands are of their day."""
    monkeypatch.chdir(ROOT)
    papers = (ROOT / "README.md", *(path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in papers)
    wanted = {}
    for script, rest in re.findall(r"([\w/-]+\.py)((?: [^`\n#]*)?)", text):
        if (ROOT / script).is_file():
            subcommand = rest.split()[:1] if script in ("data_process.py", "scripts/benchmark.py") else []
            own = rest.split(" -- ")[0]  # what stands after the dashes is handed on to a stage
            wanted.setdefault((script, *subcommand), set()).update(re.findall(r"(--\w+)", own))
    for command, flags in wanted.items():
        if flags:
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
                load(command[0]).main([*command[1:], "--help"])
            assert not [flag for flag in flags if flag not in shown.getvalue()], command
