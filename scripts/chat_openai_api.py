"""Chat with any server that speaks OpenAI's API, ours by default.

    python scripts/chat_openai_api.py                                           http://127.0.0.1:8998/v1
    OPENAI_API_KEY=... python scripts/chat_openai_api.py --base_url https://HOST/v1 --model NAME

An empty line or Ctrl-D ends it, /clear forgets what was said, Ctrl-C stops an answer. The key is read from
OPENAI_API_KEY, or from MINIMIND_API_KEY as the server reads it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import json
import os

from chat import terminal
from chat.page import NOT_THE_API
from common.errors import UserError, run_main
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


def answer(client, args, messages: list[dict]) -> str:
    """Prints the answer as it comes, thinking dimmed; what was said (without the thinking)."""
    wishes = {name: getattr(args, name) for name in ("max_tokens", "temperature") if getattr(args, name) is not None}
    said, dim, chunk = "", False, None
    begin, end = terminal.thought_marks()
    stream = None
    try:
        stream = client.chat.completions.create(model=args.model, messages=messages, stream=True, **wishes)
        for chunk in stream:
            delta = chunk.choices[0].delta if chunk.choices else None
            thought, text = getattr(delta, "reasoning_content", None), getattr(delta, "content", None)
            if dim != bool(thought) and (thought or text):
                dim = bool(thought)
                print(begin if dim else end, end="")
            print(thought or text or "", end="", flush=True)
            said += text or ""
    except KeyboardInterrupt:
        if stream is not None:
            stream.close()  # the server frees the slot
        print(" ...", end="")
    else:
        if chunk is None:
            raise UserError(NOT_THE_API.format(args.base_url))
    print(end if dim else "")
    return said


def talk(client, args) -> None:
    """A refused answer (the server is full, the chat too long) is told, and the chat goes on."""
    import openai

    exchanges: list[tuple[str, str]] = []
    for question in terminal.typed(forget=exchanges.clear):
        messages = [{"role": "system", "content": args.system}] if args.system else []
        for asked, said in exchanges[max(len(exchanges) - args.history, 0) :]:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        try:
            said = answer(client, args, [*messages, {"role": "user", "content": question}])
        except openai.APIStatusError as error:
            terminal.note(f"{args.base_url} refuses: {error.message}")
        else:
            exchanges.append((question, said))


def main(argv=None):
    args = parse(argv)
    try:
        import openai
    except ImportError:
        raise UserError("this needs a package that is not here: pip install openai") from None
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("MINIMIND_API_KEY") or "none"
    try:
        client = openai.OpenAI(base_url=args.base_url, api_key=key, timeout=args.timeout, max_retries=0)
        if not args.model:
            args.model = next(iter(client.models.list())).id
        talk(client, args)
    except openai.APIConnectionError as error:
        raise UserError(f"cannot reach {args.base_url}: {error.__cause__ or error}") from None
    except openai.APIError as error:
        raise UserError(f"{args.base_url} refuses: {error.message}") from None
    except (AttributeError, json.JSONDecodeError):  # the client reads whatever comes as if it were the API's
        raise UserError(NOT_THE_API.format(args.base_url)) from None
    except StopIteration:
        raise UserError(f"{args.base_url} lists no models; name one with --model") from None


if __name__ == "__main__":
    run_main(main)
