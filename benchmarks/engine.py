"""Tokens per second of the engine on this machine's CPU, beside transformers' generate().

One model (random weights of a preset, or --weight), greedy, both runners in turns in one process: transformers' class
with the same weights, and our engine. A single prompt, and for the engine 16 prompts side by side against transformers
one after another. Times are wall seconds, since the runners use threads of their own.
"""

import time

import torch

from benchmarks.parts import counterpart, spread
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
    parser.add_argument("--threads", type=int, default=2, help="of both runners (%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="rounds (%(default)s)")
    parser.add_argument("--new_tokens", type=int, default=256, help="of each answer (%(default)s)")


def run(args) -> dict:
    torch.set_num_threads(args.threads)
    if args.weight:
        model, tokenizer, _ = load_model(args.weight)
    else:
        torch.manual_seed(0)
        model, tokenizer = MiniMindForCausalLM(LMConfig.from_preset(args.preset)).eval(), load_tokenizer()
    reference = counterpart(model.config).eval()
    reference.load_state_dict(model.state_dict())
    engine, n = Engine(model, tokenizer), args.new_tokens
    # Nothing ends an answer early: every runner writes the same number of tokens.
    params = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, model.config.vocab_size, (STREAMS, PROMPT_TOKENS), generator=generator).tolist()

    def generate(prompts):
        reference.generate(torch.tensor(prompts), max_new_tokens=n, min_new_tokens=n, do_sample=False, use_cache=True)

    runners = {  # name -> (prompts, what answers them)
        "transformers": (prompts[:1], generate),
        "engine": (prompts[:1], lambda prompts: engine.generate(prompts, params)),
        "engine, 16 prompts": (prompts, lambda prompts: engine.generate(prompts, params)),
    }
    rates = {name: [] for name in runners}
    for i in range(args.runs + 1):
        for name, (asked, answer) in runners.items():
            begin = time.perf_counter()
            answer(asked)
            if i:  # the first round warms up
                rates[name].append(len(asked) * n / (time.perf_counter() - begin))
        if i:
            print(f"round {i}: " + ", ".join(f"{name} {rate[-1]:.0f}" for name, rate in rates.items()), flush=True)
    # Round by round: what else the machine does falls on both.
    ratios = {
        f"{name} / transformers": spread([a / b for a, b in zip(rates[name], rates["transformers"], strict=True)])
        for name in ("engine", "engine, 16 prompts")
    }
    for name, found in ratios.items():
        print(f"{name:<38} {found['median']:.2f} ({found['min']:.2f}-{found['max']:.2f})")
    return {"threads": args.threads, "tokens_per_second": {k: spread(v) for k, v in rates.items()}, "ratios": ratios}
