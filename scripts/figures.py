"""Draws the course's pictures, in both languages: docs/course/images/NAME_en.svg and NAME_zh.svg.

    python scripts/figures.py                all of them
    python scripts/figures.py merges tokens  these

A picture is a file of figures/ with a function draw(language); its name is the file's name. What it shows comes from
the code, or from the records of the course's commands (scripts/make_docs.py).
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run_main
from common.flags import Parser
from figures.canvas import LANGUAGES, save
from figures.catalogue import figures, path_of


def main(argv=None) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="pictures to draw (all)")
    args = parser.parse_args(argv)
    known = figures()
    if unknown := sorted(set(args.names) - set(known)):
        raise UserError(f"no picture {', '.join(unknown)}; pictures are {', '.join(known)}")
    written = []
    for name in args.names or known:
        for language in LANGUAGES:
            path = path_of(name, language)
            save(known[name](language), path)
            written.append(path.relative_to(ROOT).as_posix())
            print(f"{written[-1]}: {path.stat().st_size / 1000:.0f} KB")
    result = {"written": len(written)}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
