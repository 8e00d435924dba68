"""What a page of the course must keep besides agreeing with the code: sections, twins, commands, links, pictures.

Called by `python scripts/make_docs.py --check`.
"""

import argparse
import contextlib
import html
import importlib.util
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path

from course.pages import COURSE, ROOT, chapters, language_of, pages, twin
from course.runs import commands
from figures.canvas import LANGUAGES, texts
from figures.catalogue import FOLDER, figures, path_of
from figures.records import RECORDS

SECTIONS = {  # in this order; others may stand between them
    "en": ("The question", "Intuition", "Formula", "Code", "Try it", "What you should see",
           "If you see something else", "Exercises"),
    "zh": ("这一章回答什么", "直觉", "公式", "代码", "动手", "你应该看到", "如果看到的不一样", "练习"),
}  # fmt: skip
CONTENTS = {  # what a chapter has at least so many of
    "a displayed formula": (r"^\$\$", 2),
    "a quote of the code": (r"^<!-- code ", 1),
    "a recorded command": (r"^<!-- run ", 1),
    "its output": (r"^<!-- output ", 1),
    "a picture": (r"^!\[", 1),
    "two exercises with folded answers": (r"^<details>", 2),
}
PICTURE_BYTES, ALL_PICTURES_BYTES = 150_000, 5_000_000


def faults() -> list[str]:
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        found += [f"{page.name}: {fault}" for fault in of_page(page, text)]
    for language in LANGUAGES:
        for chapter in chapters(language):
            found += [f"{chapter.name}: {fault}" for fault in of_chapter(chapter.read_text(encoding="utf-8"), language)]
    used = {name for page in pages() for name in pictures(page.read_text(encoding="utf-8"))}
    found += [
        f"{path.name}: no command has this record" for path in RECORDS.glob("*.json") if path.stem not in commands()
    ]
    return found + of_pictures(used)


def of_page(page: Path, text: str) -> list[str]:
    found = []
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        if not (page.parent / target).exists():
            found.append(f"no file {target}")
    language = language_of(page)
    found += [
        f"{name} is not the picture of this language"
        for name in pictures(text)
        if not name.endswith(f"_{language}.svg")
    ]
    for block in re.findall(r"```bash\n(.*?)\n```", text, re.S):
        found += [f"`{line}`: {fault}" for line in block.splitlines() if (fault := of_command(line))]
    if not twin(page).exists():
        found.append(f"has no twin {twin(page).name}")
    elif language == "en":
        one, two = skeleton(text), skeleton(twin(page).read_text(encoding="utf-8"))
        found += [
            f"other {part} than in {twin(page).name}: {differing(one[part], two[part])}"
            for part in one
            if one[part] != two[part]
        ]
    return found


def pictures(text: str) -> list[str]:
    return re.findall(r"^!\[[^\]]*\]\(images/([^)]+)\)", text, re.M)


def skeleton(text: str) -> dict[str, list[str]]:
    """What a page has in common with its twin."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return {
        "headings": re.findall(r"^#+(?= )", outside, re.M),
        "directives": re.findall(r"<!-- (.+?) -->", text),
        "commands": re.findall(r"```bash\n(.*?)\n```", text, re.S),
        "formulas": [re.sub(r"\\text\{.*?\}", "", formula) for formula in re.findall(r"\$\$(.*?)\$\$", text, re.S)],
        "pictures": [re.sub(r"_(en|zh)\.svg$", "", name) for name in pictures(text)],
        "folded answers": re.findall(r"^<details>", text, re.M),
    }


def differing(one: list[str], two: list[str]) -> str:
    pairs = zip([*one, *[""] * len(two)], [*two, *[""] * len(one)], strict=False)
    return next(f"{a.strip()!r}, {b.strip()!r}" for a, b in pairs if a != b)


def of_chapter(text: str, language: str) -> list[str]:
    headings = iter(re.findall(r"^## (.+)$", text, re.M))
    found = [f"no section {name!r} in its place" for name in SECTIONS[language] if name not in headings]
    return found + [
        f"has not {what}" for what, (pattern, n) in CONTENTS.items() if len(re.findall(pattern, text, re.M)) < n
    ]


# ---------------------------------------------------------------------------------------------------------- commands
class Parsed(BaseException):
    """Carries what a program's parser made of its arguments, past all that the program does with them."""


def of_command(line: str) -> str | None:
    """What is wrong with a command of this project: no such script, flags its own parser refuses, data not named."""
    words = shlex.split(line)
    scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
    if words[:2] == ["python", "-m"]:
        room, *file = words[2].split(".")
        ours = file and (ROOT / room).is_dir()
        return f"no module {words[2]}" if ours and not (ROOT / room / f"{'/'.join(file)}.py").is_file() else None
    if not scripts:
        return None
    script, argv = words[scripts[0]], words[scripts[0] + 1 :]
    if not (ROOT / script).is_file():
        return f"no file {script}"
    args = parse(script, tuple(argv))
    if isinstance(args, str):
        return args
    return "names no data (--data_path)" if getattr(args, "data_path", "") is None else None


@cache
def parse(script: str, argv: tuple[str, ...]):
    """The arguments as the script's own parser reads them, or its complaint; nothing else of the script is run."""
    original, complaint = argparse.ArgumentParser.parse_args, io.StringIO()

    def parse_and_stop(self, args=None, namespace=None):
        raise Parsed(original(self, args, namespace))

    argparse.ArgumentParser.parse_args = parse_and_stop
    try:
        with contextlib.redirect_stderr(complaint):
            load(script).main(list(argv))
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        return complaint.getvalue().strip()
    finally:
        argparse.ArgumentParser.parse_args = original
    return "its main() parses no arguments"


@cache
def load(script: str):
    """The module of a script, whose name need not be one that can be imported."""
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", script), ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------- pictures
def of_pictures(used: set[str]) -> list[str]:
    """A picture is shown somewhere, small enough, and says in words what `draw` says today."""
    found, drawn = [], set()
    for name, draw in figures().items():
        for language in LANGUAGES:
            path = path_of(name, language)
            drawn.add(path.name)
            if not path.is_file():
                found.append(f"no {path.name}: python scripts/figures.py {name}")
                continue
            written = html.unescape(path.read_text(encoding="utf-8"))
            lost = sorted(text for text in texts(draw(language)) if text not in written)
            found += [f"{path.name} does not say {lost[0]!r}: python scripts/figures.py {name}"] if lost else []
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    found += [
        f"{name}: {size} bytes, more than {PICTURE_BYTES}" for name, size in files.items() if size > PICTURE_BYTES
    ]
    if sum(files.values()) > ALL_PICTURES_BYTES:
        found.append(f"the pictures of {COURSE.name} have more than {ALL_PICTURES_BYTES} bytes")
    found += [f"{name} is shown on no page" for name in sorted(files.keys() - used)]
    return found + [f"{name} is drawn by no file of figures/" for name in sorted(files.keys() - drawn)]
