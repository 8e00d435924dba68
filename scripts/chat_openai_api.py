"""Chat with any server that speaks OpenAI's API, ours by default.

    python scripts/chat_openai_api.py                                           http://127.0.0.1:8998/v1
    OPENAI_API_KEY=... python scripts/chat_openai_api.py --base_url https://HOST/v1 --model NAME

exit, quit, an empty line or Ctrl-D ends it, /clear forgets what was said, Ctrl-C stops an answer. The key is read from
OPENAI_API_KEY, or else from MINIMIND_API_KEY, the server's own variable.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os

from chat import terminal
from chat.abilities import Abilities
from chat.sources import Remote, Settings
from common.errors import UserError, run_main, user_errors
from common.flags import Parser


def parse(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("--base_url", default="http://127.0.0.1:8998/v1", metavar="URL", help="(%(default)s)")
    parser.add_argument("--model", metavar="NAME", help="(the first that the server lists)")
    parser.add_argument("--system", metavar="TEXT", help="system message (none)")
    parser.add_argument("--history", type=int, default=4, metavar="N", help="earlier exchanges that are sent (4)")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="of an answer (the server's)")
    parser.add_argument("--temperature", type=float, metavar="X", help="(the server's)")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for an answer (600)")
    args = parser.parse_args(argv)
    if args.history < 0:
        raise UserError(f"--history must not be negative, but is {args.history}")
    return args


def main(argv=None):
    args = parse(argv)
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("MINIMIND_API_KEY") or ""
    with user_errors():
        source = Remote(args.base_url, key, args.model or "", args.timeout)
        source.model = source.model or next(iter(source.models()), "")
        if not source.model:
            raise UserError(f"{args.base_url} lists no models; name one with --model")
        settings = Settings(
            args.system or "", args.history, max_tokens=args.max_tokens, temperature=args.temperature, top_p=None
        )
        terminal.converse(source, settings, Abilities())  # what a server's model was taught is not told


if __name__ == "__main__":
    run_main(main)
