"""Fills the course's pages from the code and from recorded runs, and checks that they still agree with both.

    python scripts/make_docs.py                quotes, outputs, numbers, lists of chapters, pictures; a command that has
                                               no record yet, or another text than its record, is run and recorded
    python scripts/make_docs.py --run NAME...  runs these commands anew (`--run all`: every one), then the same
    python scripts/make_docs.py --check        runs and changes nothing; a line a fault, exit code 2 if there is one

A page stays ordinary Markdown. What is filled in stands after a directive, an HTML comment that no reader sees:

    <!-- code FILE NAME [from="..."] [to="..."] [without="docstring"] -->   NAME: a function, a class or Class.method,
        quoted whole, or from the line that contains one text to the line that contains the other
    <!-- run NAME -->       before a ```bash block: its commands are run and recorded in docs/course/records/NAME.json
    <!-- output NAME [first=12] [last=12] -->   what the commands printed: so many first and last lines of it
    8.21<!-- = NAME KEY [/DIVISOR] [FORMAT] -->   a number: KEY is a path into the JSON object of the output's last line
        (a.b), or, with quotes and a group, a pattern to find in the output: "loss (\\S+)"
    <!-- nav -->, <!-- chapters -->   links to the neighbours of a chapter; the table of all chapters
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run_main
from common.files import replaced
from common.flags import Parser
from course import checks
from course.pages import filled, pages, stale
from course.runs import commands, run
from figures.records import RECORDS, record_of
from scripts.figures import main as draw_figures


def main(argv=None) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME", help="commands to run anew, or all")
    parser.flag(parser, "check", False, "change nothing, name the faults")
    args = parser.parse_args(argv)
    if args.check:
        if faults := stale() + checks.faults():
            print("\n".join(faults))
            raise UserError(f"{len(faults)} faults in docs/course; python scripts/make_docs.py fills pages anew")
    else:
        wanted = commands()
        if unknown := sorted(set(args.run) - {"all", *wanted}):
            raise UserError(f"no command is called {', '.join(unknown)}; they are {', '.join(wanted)}")
        for name, command in wanted.items():
            known = (RECORDS / f"{name}.json").is_file() and record_of(name)["command"] == command
            if not known or name in args.run or "all" in args.run:
                run(name, command)
        draw_figures([])
        for page in pages():
            old = page.read_text(encoding="utf-8")
            try:
                new = filled(old, page)
            except UserError as error:
                raise UserError(f"{page.name}: {error}") from None
            if new != old:
                with replaced(page, text=True) as file:
                    file.write(new)
                print(f"{page.relative_to(ROOT).as_posix()}: written")
    result = {"pages": len(pages()), "records": len(list(RECORDS.glob("*.json")))}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
