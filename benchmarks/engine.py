"""Tokens per second of the engine on this machine's CPU, beside transformers' generate() and llama.cpp.

One model (random weights of a preset, or --weight), greedy, every runner asked in turns in one process: transformers'
Llama with the same weights, our engine, and, where requirements-export.txt is installed, llama.cpp on the exported
GGUF file in f32 and q8_0. A single prompt, and for the engine 16 prompts side by
side against transformers one after another. Times are wall seconds, since the runners use threads of their own.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from benchmarks.reference import counterpart
from benchmarks.report import spread
from export.gguf_file import write_gguf
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.weights import load_model

STREAMS = 16
PROMPT_TOKENS = 16


def add_flags(parser) -> None:
    parser.add_argument("--preset", default="minimind2-small", help="shape of random weights (%(default)s)")
    parser.add_argument("--weight", metavar="PATH", help="trained weights instead")
    parser.add_argument("--threads", type=int, default=2, help="of every runner (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=256, help="of each answer (%(default)s)")


class LlamaCpp:
    """llama.cpp on one GGUF file, in a process of its own: its threads would take ours their time."""

    def __init__(self, path, threads: int):
        self.child = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(path), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.address = self.child.stdout.readline().strip()

    def __call__(self, prompt: list[int], new_tokens: int) -> None:
        body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        url, kind = f"{self.address}/completion", {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), kind)) as answer:
            written = json.load(answer)["tokens_predicted"]
        if written != new_tokens:
            raise RuntimeError(f"llama.cpp wrote {written} tokens instead of {new_tokens}")

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()


SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 1024, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(sys.argv[2])
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def llama_cpp(model, tokenizer, folder: str, threads: int) -> dict[str, LlamaCpp]:
    """A server for each precision, none where xllamacpp is missing."""
    if importlib.util.find_spec("xllamacpp") is None:
        print("llama.cpp is left out: requirements-export.txt is not installed", flush=True)
        return {}
    servers = {}
    for dtype in ("float32", "q8_0"):
        path = Path(folder) / f"{dtype}.gguf"
        write_gguf(path, model, tokenizer, "benchmark", dtype)
        servers[f"llama.cpp {dtype}"] = LlamaCpp(path, threads)
    return servers


def seconds(run, prompts) -> float:
    begin = time.perf_counter()
    run(prompts)
    return time.perf_counter() - begin


def run(args) -> dict:
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer()
    if args.weight:
        model, tokenizer, _ = load_model(args.weight)
    else:
        torch.manual_seed(0)
        model = MiniMindForCausalLM(LMConfig.from_preset(args.preset)).eval()
    reference = counterpart(model.config).eval()
    reference.load_state_dict(model.state_dict())
    n, params = args.new_tokens, SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)
    engine = Engine(model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, model.config.vocab_size, (STREAMS, PROMPT_TOKENS), generator=generator).tolist()

    def generate(prompts):
        reference.generate(
            torch.tensor(prompts[:1]), max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True
        )

    runners = {
        "transformers": generate,
        "engine": lambda prompts: engine.generate(prompts[:1], params),
        "engine, 16 prompts": lambda prompts: engine.generate(prompts, params),
    }
    with tempfile.TemporaryDirectory() as folder:
        servers = llama_cpp(model, tokenizer, folder, args.threads)
        runners |= {name: (lambda prompts, ask=server: ask(prompts[0], n)) for name, server in servers.items()}
        rates = {name: [] for name in runners}
        for i in range(args.runs + 1):
            for name, runner in runners.items():
                took, streams = seconds(runner, prompts), STREAMS if "16" in name else 1
                if i:  # the first round warms up
                    rates[name].append(streams * n / took)
            if i:
                print(f"round {i}: " + ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates.items()), flush=True)
        for server in servers.values():
            server.close()

    def ratio(a: str, b: str) -> dict:
        return spread([x / y for x, y in zip(rates[a], rates[b], strict=True)])

    pairs = [("engine", "transformers"), ("engine, 16 prompts", "transformers")]
    pairs += [("engine", name) for name in servers]
    ratios = {f"{a} / {b}": ratio(a, b) for a, b in pairs}
    for name, found in ratios.items():
        print(f"{name:<38} {found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})")
    return {"threads": args.threads, "tokens_per_second": {k: spread(v) for k, v in rates.items()}, "ratios": ratios}
