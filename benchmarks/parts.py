"""A measurement in parts, for a machine that is lent for minutes: what is measured is kept, and not measured again.

A part is a list of cases. The figures of each go to a file of JSON lines as soon as they are there, so the same command
goes on where it ended, however it ended. A case that failed is kept as well, and tried again after all others.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import UserError
from common.files import replaced
from export.counterpart import transformers_config
from model.LMConfig import LMConfig

Case = tuple[str, ...]


# ------------------------------------------------------------------------------------------ what every measurement uses
def spread(values) -> dict[str, float]:
    """{"median", "min", "max", "n"} of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def counterpart(config: LMConfig):
    """transformers' model of the same mathematics (Llama, Qwen3, GraniteMoeShared or Qwen3Moe), random weights."""
    fields = transformers_config(config, "float32") | {"use_cache": False}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


# ------------------------------------------------------------------------------------------------ parts and their file


@dataclass(frozen=True)
class Part:
    """about: what its table shows. cases(args): what there is to measure. measure(args, *case) -> figures, as JSON has
    them; "error" among them: what went wrong, in words. named: the headings of a case's words. columns: the further
    headings, and what stands under them for a case's figures."""

    about: str
    cases: Callable[..., list[Case]]
    measure: Callable[..., dict]
    named: Case
    columns: dict[str, Callable[[dict], str]]


class Results:
    """The figures found so far, by part and case, and their file."""

    def __init__(self, path: Path, machine: dict):
        """machine: what all figures of the file have in common; UserError where those in it are of another one."""
        self.path, self.machine = path, machine
        self.found: dict[tuple[str, Case], dict] = {}
        if not path.exists():
            return
        first, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        differ = [f"{k} {first.get(k)!r} is now {machine.get(k)!r}" for k in machine if first.get(k) != machine.get(k)]
        if differ:
            raise UserError(f"{path} holds figures of other settings ({', '.join(differ)}); use --out_dir, or "
                            "--overwrite to begin anew")  # fmt: skip
        self.found = {(line.pop("part"), tuple(line.pop("case"))): line for line in lines}

    def add(self, part: str, case: Case, figures: dict) -> None:
        self.found[part, case] = figures
        with replaced(self.path, text=True) as file:
            for line in (self.machine, *({"part": p, "case": c, **f} for (p, c), f in self.found.items())):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def left(self, wanted: list[tuple[str, Case]]) -> list[tuple[str, Case]]:
        """Of these (part, case) what is not measured: first what was never tried, then what failed."""
        return [key for key in wanted if key not in self.found] + [key for key in wanted if key in self.failed()]

    def failed(self) -> dict[tuple[str, Case], str]:
        return {key: figures["error"] for key, figures in self.found.items() if "error" in figures}


def tables(parts: dict[str, Part], results: Results) -> str:
    """Markdown: a table for each part that has figures, and under it what failed."""
    blocks = []
    for name, part in parts.items():
        rows = {case: figures for (p, case), figures in results.found.items() if p == name}
        if rows:
            lines = [row((*part.named, *part.columns)), row(["---"] * len(part.named) + ["---:"] * len(part.columns))]
            for case, figures in rows.items():
                lines.append(row((*case, *(cell(of, figures) for of in part.columns.values()))))
            blocks += [f"**{name}**: {part.about}", "\n".join(lines)]
        if failed := [
            f"- {' '.join(case)}: {figures['error']}" for case, figures in rows.items() if "error" in figures
        ]:
            blocks.append("\n".join(failed))
    return "\n\n".join(blocks)


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(of: Callable[[dict], str], figures: dict) -> str:
    """A dash where a case that failed, or has nothing to measure, lacks the figure."""
    try:
        return of(figures)
    except (KeyError, TypeError):
        return "–"
