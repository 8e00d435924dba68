"""Serve a model over OpenAI's API: any client or page that can talk to OpenAI can talk to it.

    python scripts/serve_openai_api.py                                   the newest model in out/, port 8998
    python scripts/serve_openai_api.py --weight FILE --api_key SECRET    a key that clients must send
    python scripts/serve_openai_api.py --lora out/lora/a_512.pth out/lora/b_512.pth    adapters, each a model
    curl http://127.0.0.1:8998/v1/chat/completions -H "Content-Type: application/json" \\
         -d '{"model": "minimind", "messages": [{"role": "user", "content": "你好"}]}'

Requests share one batch, which they join and leave between two tokens. Ctrl-C or SIGTERM ends the requests that run
and then the server; a second Ctrl-C leaves at once. serving/schema.py says which fields are followed, which refused.
Addresses: /v1/chat/completions, completions, responses and models; /tokenize, /detokenize, /tokenizer_info, /metrics.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import os
import re
import signal
from math import inf

from chat.terminal import note
from common.errors import UserError, run_main, user_errors
from common.flags import Parser
from inference import open_model
from inference.scheduler import Scheduler
from model.lora import adapter_parameters
from serving.app import create_app
from serving.middleware import MEGABYTE, Limits
from serving.process import Server, listen, raise_descriptor_limit

KEY = "MINIMIND_API_KEY"


def parse(argv):
    parser = Parser(description=__doc__)
    g = parser.add_argument_group("server")
    g.add_argument("--host", default="127.0.0.1", help="0.0.0.0: reachable from other machines (127.0.0.1)")
    g.add_argument("--port", type=int, default=8998, help="(8998)")
    g.add_argument("--api_key", default=os.environ.get(KEY), metavar="KEY",
                   help=f"clients must send it; safer in the variable ${KEY} (none)")  # fmt: skip
    g.add_argument("--model_name", nargs="+", metavar="NAME",
                   help="what requests may call the model (name of the weights, minimind)")  # fmt: skip
    g.add_argument("--cors_origins", nargs="+", metavar="ORIGIN",
                   help="pages that may ask from a browser, as https://my.page; '*': any (none)")  # fmt: skip
    parser.flag(g, "docs", False, "serve /docs and /openapi.json, to everybody, and without the key")
    parser.flag(g, "ignore_tools", False, "never show the model the tools that a client offers")
    g = parser.add_argument_group("limits")
    g.add_argument("--slots", type=int, metavar="N", help="answers generated side by side (32, or as many as fit)")
    g.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait; more are refused (64)")
    g.add_argument("--max_tokens", type=int, metavar="N", help="of an answer (what fits into the context)")
    g.add_argument("--max_messages", type=int, default=1000, metavar="N", help="of a request (1000)")
    g.add_argument("--max_body", type=float, default=1.0, metavar="MB", help="size of a request (1.0)")
    g.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for a whole answer (600)")
    g = parser.add_argument_group("sampling, where a request says nothing")
    g.add_argument("--temperature", type=float, default=0.85, metavar="X", help="(0.85)")
    g.add_argument("--top_p", type=float, default=0.85, metavar="X", help="(0.85)")
    parser.flag(parser, "thinking", None, "open a think block (--no-thinking: an empty one), where a request says "
                "nothing; default: as the model likes")  # fmt: skip
    open_model.add_model_flags(parser)
    parser.add_argument("--lora", nargs="+", default=[], metavar="PATH",
                        help="adapters (files, peft folders) for these weights, each a model of its own")  # fmt: skip
    parser.flag(parser, "compile", False, "CUDA: decode steps as graphs; faster, after a minute for the first ones")
    args = parser.parse_args(argv)
    faults = [
        f"--{name} must be at least {least}, not {getattr(args, name)}"
        for name, least in (("slots", 1), ("queue", 0), ("max_tokens", 1), ("max_messages", 1), ("port", 0))
        if getattr(args, name) is not None and getattr(args, name) < least
    ]
    faults += [
        f"--{n} must be above 0, not {getattr(args, n)}"
        for n in ("max_body", "timeout")
        if not 0 < getattr(args, n) < inf
    ]
    faults += [f"--port must be at most 65535, not {args.port}"] * (args.port > 65535)
    faults += [f"--temperature must lie between 0 and 2, not {args.temperature}"] * (not 0 <= args.temperature <= 2)
    faults += [f"--top_p must be above 0 and at most 1, not {args.top_p}"] * (not 0 < args.top_p <= 1)
    faults += [
        f"--cors_origins: {origin!r} is no origin; write it as https://my.page, without a path"
        for origin in args.cors_origins or []
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin)
    ]
    if faults:
        raise UserError("\n       ".join(faults))
    return args


def leave(number, frame) -> None:
    """Exits with the code of the signal. uvicorn catches a signal, shuts down, and raises it again at its end."""
    sys.exit(128 + number)


def main(argv=None):
    args = parse(argv)
    raise_descriptor_limit()
    with user_errors():
        listener = listen(args.host, args.port)  # before the model is loaded: a port in use shows at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with user_errors():
        path = open_model.find_weight(args)
        engine, record = open_model.open_engine(args, path, adapters=args.lora, enable_thinking=args.thinking)
    names = args.model_name or list(dict.fromkeys([Path(path).stem, "minimind"]))
    limits = Limits(
        int(args.max_body * MEGABYTE), messages=args.max_messages, max_tokens=args.max_tokens, timeout=args.timeout
    )
    with user_errors():
        rows = args.slots or open_model.rows_that_fit(engine)
        scheduler = Scheduler(engine, rows, args.queue, args.compile)
        app = create_app(
            scheduler, names, args.api_key, limits, {"temperature": args.temperature, "top_p": args.top_p},
            docs=args.docs, ignore_tools=args.ignore_tools, cors_origins=args.cors_origins,
        )  # fmt: skip
    host, port = listener.getsockname()[:2]
    sizes = {
        name: sum(p.numel() for p in adapter_parameters(engine.source, name).values()) for name in engine.adapters.names
    }
    size = engine.source.num_parameters() - sum(sizes.values())
    note(f"{path}: {record.get('stage', 'stage unknown')}, {size:,} parameters, {rows} rows")
    for name, size in sizes.items():
        note(f"{name}: an adapter, rank {engine.source.lora_configs[name].rank}, {size:,} parameters")
    names = ", ".join([*names, *sizes])
    note(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1 serves {names}; Ctrl-C ends it")
    if not args.api_key and not host.startswith("127.") and host != "::1":
        note("anyone who reaches this machine can use it: --api_key asks for a key")
    with scheduler:
        Server(app, scheduler).run(sockets=[listener])


if __name__ == "__main__":
    run_main(main)
