"""argparse with errors in one line, and booleans as MiniMind writes them."""

import argparse
import sys

BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and the defaults in the help."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)

    def flag(self, group, name, default, text):
        """A boolean: --name, --no-name, or MiniMind's --name 0/1/True/False."""
        group.add_argument(f"--{name}", nargs="?", const=True, default=default, type=boolean, metavar="BOOL", help=text)
        group.add_argument(f"--no-{name}", dest=name, action="store_false", default=argparse.SUPPRESS,
                           help=argparse.SUPPRESS)  # fmt: skip


def out_of_bounds(values, bounds, prefix="--") -> list[str]:
    """A sentence for each attribute of `values` (flags) that is wrong; None stands for no value.

    bounds: rows of (names, the condition in words after "must", the condition as a function of a value).
    """
    return [
        f"{prefix}{name} must {words}, not {value!r}"
        for names, words, holds in bounds
        for name in names
        if (value := getattr(values, name)) is not None and not holds(value)
    ]


def boolean(text: str) -> bool:
    if text.lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLEANS[text.lower()]
