"""All pictures by name. A picture is a file of this folder with a function draw(language); its name is the file's."""

import importlib
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "docs" / "course" / "images"


def figures() -> dict:
    """name -> draw."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("__init__", "catalogue"))
    modules = {name: importlib.import_module(f"figures.{name}") for name in names}
    return {name: module.draw for name, module in modules.items() if hasattr(module, "draw")}


def path_of(name: str, language: str) -> Path:
    return FOLDER / f"{name}_{language}.svg"
