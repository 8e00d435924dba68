"""A page of the course: its directives, and what must stand after each.

scripts/make_docs.py lists the directives. Here the page is text that goes in and text that comes out; nothing is run.
"""

import ast
import difflib
import re
import shlex
import textwrap
from pathlib import Path

from common.errors import UserError
from figures.records import record_of, result_of

ROOT = Path(__file__).resolve().parents[1]
COURSE = ROOT / "docs" / "course"
CODE_LINES = 40  # a longer quote is a page of code, not an excerpt
LINE_WIDTH = 160  # of an output
BLOCK = r"(?:(?P<fence>`{3,})\w*\n.*?\n(?P=fence)\n)"
RUN = re.compile(r"<!-- run (\S+) -->\n```bash\n(.*?)\n```\n", re.S)
INDEX = {"en": "README.md", "zh": "README_zh.md"}
WORDS = {
    "en": {"index": "Contents", "other": "中文", "question": "The question", "columns": ("Chapter", "Its question")},
    "zh": {"index": "目录", "other": "English", "question": "这一章回答什么", "columns": ("章", "回答什么")},
}


def pages() -> list[Path]:
    return sorted(COURSE.glob("*.md"))


def chapters(language: str) -> list[Path]:
    return [path for path in sorted(COURSE.glob("[0-9][0-9]-*.md")) if language_of(path) == language]


def language_of(path: Path) -> str:
    return "zh" if path.stem.endswith("_zh") else "en"


def twin(path: Path) -> Path:
    stem = path.stem.removesuffix("_zh") if language_of(path) == "zh" else path.stem + "_zh"
    return path.with_name(stem + ".md")


# ------------------------------------------------------------------------------------------------------------ quotes
def quote(directive: str) -> str:
    """The lines of the source that a code directive names, as a block of Markdown."""
    file, name, *options = shlex.split(directive)
    options = dict(option.split("=", 1) for option in options)
    path = ROOT / file
    if not path.is_file():
        raise UserError(f"no file {file}")
    source = path.read_text(encoding="utf-8")
    node = find(ast.parse(source), name, file)
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept = list(range(first - 1, node.end_lineno))
    if options.get("without") == "docstring" and ast.get_docstring(node) is not None:
        kept = [i for i in kept if not node.body[0].lineno - 1 <= i < node.body[0].end_lineno]
    begin = line_with(options["from"], kept, lines, f"{file} {name}") if "from" in options else 0
    end = line_with(options["to"], kept[begin:], lines, f"{file} {name}") + begin if "to" in options else len(kept) - 1
    text = textwrap.dedent("\n".join(lines[i] for i in kept[begin : end + 1])).strip("\n")
    if (count := text.count("\n") + 1) > CODE_LINES:
        raise UserError(f"{file} {name}: a quote of {count} lines, more than {CODE_LINES}; choose with from= and to=")
    return f"```python\n# {file}: {name}\n{text}\n```\n"


def find(tree, name: str, file: str):
    for part in name.split("."):
        found = [node for node in tree.body if getattr(node, "name", None) == part]
        if not found:
            raise UserError(f"{file} has no {name}")
        tree = found[0]
    return tree


def line_with(text: str, kept: list[int], lines: list[str], place: str) -> int:
    for position, i in enumerate(kept):
        if text in lines[i]:
            return position
    raise UserError(f"{place} has no line with {text!r}")


# ----------------------------------------------------------------------------------------------- outputs and numbers
def output_block(name: str, first: int, last: int) -> str:
    """A record's output as a block, its middle left out where it is long, and the line that says where it is from.

    The JSON object at the end is shown only where `last` lines are asked for: it repeats what stands above it.
    """
    record = record_of(name)
    lines = [line if len(line) <= LINE_WIDTH else line[:LINE_WIDTH] + " …" for line in record["output"].split("\n")]
    lines = lines[:-1] if not last and lines[-1].startswith("{") else lines
    if len(lines) > first + last + 1:
        lines[first : len(lines) - last] = [f"... ({len(lines) - first - last} lines)"]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    source = f"{record['date']} · {record['machine']} · {versions} · {record['cpu_seconds']} s CPU"
    return "```text\n" + "\n".join(lines) + f"\n```\n<sub>{source}</sub>\n"


def number(name: str, key: str, *options: str) -> str:
    """A number of a record: of the JSON object in its last line by a path, or of its output by a pattern."""
    if "(" in key:
        match = re.search(key, record_of(name)["output"])
        if not match:
            raise UserError(f"the output of {name} has no {key!r}")
        value = match[1]
    else:
        value = result_of(name)
        for part in key.split("."):
            try:
                value = value[int(part)] if isinstance(value, list) else value[part]
            except (KeyError, IndexError, TypeError, ValueError):
                raise UserError(f"the result of {name} has no {key}") from None
    for option in options:  # a divisor, a format
        value = float(str(value).replace(",", "")) if isinstance(value, str) else value
        value = value / float(option[1:]) if option.startswith("/") else format(value, option)
    return str(value)


# ------------------------------------------------------------------------------------------------------------- pages
def filled(text: str, page: Path) -> str:
    """The page with everything after its directives as it must be."""

    def code(match):
        return f"<!-- code {match[1]} -->\n{quote(match[1])}"

    def output(match):
        name, *options = match[1].split()
        sizes = {"first": 12, "last": 12} | {key: int(n) for key, n in (option.split("=") for option in options)}
        return f"<!-- output {match[1]} -->\n{output_block(name, **sizes)}"

    text = re.sub(rf"<!-- code (.+?) -->\n{BLOCK}?", code, text, flags=re.S)
    text = re.sub(rf"<!-- output (.+?) -->\n{BLOCK}?(?:<sub>.*?</sub>\n)?", output, text, flags=re.S)
    text = re.sub(r"[-−]?\d[\d,.]*%?<!-- = (.+?) -->", lambda m: f"{number(*shlex.split(m[1]))}<!-- = {m[1]} -->", text)
    text = re.sub(r"<!-- nav -->\n(?:\[.*\n)?", lambda m: f"<!-- nav -->\n{nav(page)}\n", text)
    return re.sub(r"<!-- chapters -->\n(?:\|.*\n)*", lambda m: f"<!-- chapters -->\n{table(page)}", text)


def title(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def nav(page: Path) -> str:
    words, row = WORDS[language_of(page)], chapters(language_of(page))
    links = [f"[{words['other']}]({twin(page).name})", f"[{words['index']}]({INDEX[language_of(page)]})"]
    if page in row:
        i = row.index(page)
        links += [f"[← {title(row[i - 1])}]({row[i - 1].name})"] if i else []
        links += [f"[{title(row[i + 1])} →]({row[i + 1].name})"] if i + 1 < len(row) else []
    return " · ".join(links)


def table(page: Path) -> str:
    """The chapters with the first paragraph of what each answers."""
    words = WORDS[language_of(page)]
    lines = ["| {} | {} |".format(*words["columns"]), "|---|---|"]
    for chapter in chapters(language_of(page)):
        text = chapter.read_text(encoding="utf-8")
        question = text.partition(f"## {words['question']}\n\n")[2].partition("\n\n")[0].replace("\n", " ")
        lines.append(f"| [{title(chapter)}]({chapter.name}) | {question} |")
    return "\n".join(lines) + "\n"


def difference(old: str, new: str) -> str:
    lines = [line for line in difflib.ndiff(old.splitlines(), new.splitlines()) if line[:2] in ("- ", "+ ")]
    return f"{lines[0][2:80]!r} should be {lines[1][2:80] if len(lines) > 1 else ''!r}"


def stale() -> list[str]:
    """Pages that differ from the source or the records, and blocks that differ from their record's command."""
    faults = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            if (new := filled(text, page)) != text:
                faults.append(f"{page.name}: {difference(text, new)}")
            for name, command in RUN.findall(text):
                if record_of(name)["command"] != command:
                    faults.append(f"{page.name}: the record of {name} is of another command")
        except UserError as error:
            faults.append(f"{page.name}: {error}")
    return faults
