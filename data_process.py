"""Data work before training, one subcommand a job: `python data_process.py sample` makes the embedded sample.

Each subcommand prints a table of what it did and, as its last line on stdout, one JSON object.
"""
import argparse
import json

from trainer.cli import UserError, run_main


def sample(args):
    """Write the embedded sample (dataset/sample) from the facts in dataset/world."""
    from processing.sample import make_sample

    try:
        counts = make_sample(args.out_dir, args.seed)
    except (OSError, ValueError) as error:
        raise UserError(f"sample: {error}") from error
    for name, count in counts.items():
        print(f"{name:<40}{count:>8,}")
    return {"stage": "sample", "seed": args.seed, "out_dir": args.out_dir, "counts": counts}


def parse(argv=None):
    """The command line; `args.run` is the chosen subcommand's function."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("sample", help=sample.__doc__, description=sample.__doc__)
    command.add_argument("--out_dir", default="dataset/sample", help="folder for the files (default: %(default)s)")
    command.add_argument("--seed", type=int, default=42, help="the same seed gives the same bytes")
    command.set_defaults(run=sample)
    return parser.parse_args(argv)


def main(argv=None):
    """Run the chosen subcommand; its result is the last line on stdout."""
    args = parse(argv)
    print(json.dumps(args.run(args), ensure_ascii=False))


if __name__ == "__main__":
    run_main(main)
