"""What each preset costs: parameters part by part, operations, and an estimate of hours and money on one GPU.

    python docs/course/code/budget.py --gpu "RTX 3090" --mfu 0.3 --yuan_per_hour 1.5 --tokens 3e8

Two tables. The first counts: nothing in it is estimated. The second estimates how long --tokens take, and how long as
many tokens as fit the size (--tokens_per_parameter) would take, from the rate that the GPU's maker gives, the share of
it that training reaches (--mfu) and a rent. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from model.LMConfig import PRESETS, LMConfig
from trainer.log import GPU_TFLOPS, flops_per_token


def parts(config: LMConfig) -> dict[str, int]:
    """How many parameters each kind of part has, all layers together."""
    D, L, heads = config.dim, config.n_layers, config.n_heads + config.n_kv_heads
    found = {
        "embedding": config.vocab_size * D,  # the head is the same matrix
        "attention": L * 2 * D * heads * config.head_dim,  # query and output: n_heads; key and value: n_kv_heads
        "feed-forward": L * 3 * D * config.hidden_dim,  # SwiGLU: gate, up, down
        "norms": L * 2 * D + D + (L * 2 * config.head_dim if config.qk_norm else 0),
    }
    if config.use_moe:
        experts = config.n_routed_experts + config.n_shared_experts
        found["feed-forward"] = L * (experts * 3 * D * config.moe_hidden_dim + config.n_routed_experts * D)
    return found


def seconds(flops: float, tflops: float, mfu: float) -> float:
    """Seconds that so many operations take on a GPU of which training reaches the share `mfu`."""
    return flops / (tflops * 1e12 * mfu)


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, choices=GPU_TFLOPS, metavar="NAME")
    parser.add_argument("--mfu", type=float, required=True, help="share of the GPU's peak that training reaches")
    parser.add_argument("--yuan_per_hour", type=float, required=True)
    parser.add_argument("--tokens", type=float, required=True, help="tokens of your data, times the epochs")
    parser.add_argument("--tokens_per_parameter", type=float, default=20)
    parser.add_argument("--seq_len", type=int, default=512)
    args = parser.parse_args(argv)

    names = ("embedding", "attention", "feed-forward")
    print(f"{'preset':<18} {'parameters':>11} {'active':>11}" + "".join(f"{name:>13}" for name in names))
    presets = {}
    for preset in PRESETS:
        config = LMConfig.from_preset(preset)
        N, active, made_of = config.parameter_count(), config.active_parameter_count(), parts(config)
        print(f"{preset:<18} {N:>11,} {active:>11,}" + "".join(f"{made_of[name] / N:>13.0%}" for name in names))
        presets[preset] = {"parameters": N, "active": active, **made_of}

    tflops = GPU_TFLOPS[args.gpu]
    print(f"\nestimates: {args.gpu}, {tflops} TFLOP/s x {args.mfu:.0%}, {args.yuan_per_hour} yuan an hour")
    fit = f"{args.tokens_per_parameter:.0f} tokens a parameter"
    print(f"{'':<18} {'MFLOP':>8} {f'{args.tokens / 1e6:,.0f}M tokens':>20}   {fit:>32}")
    print(f"{'preset':<18} {'a token':>8} {'hours':>11} {'yuan':>8}   {'M tokens':>12} {'hours':>10} {'yuan':>8}")
    for preset, found in presets.items():
        found["flops"] = flops_per_token(LMConfig.from_preset(preset), args.seq_len)
        found["fitting"] = args.tokens_per_parameter * found["active"]
        for key, tokens in (("hours", args.tokens), ("fitting_hours", found["fitting"])):
            found[key] = seconds(found["flops"] * tokens, tflops, args.mfu) / 3600
        yuan, fitting_yuan = (args.yuan_per_hour * found[key] for key in ("hours", "fitting_hours"))
        print(f"{preset:<18} {found['flops'] / 1e6:>8,.0f} {found['hours']:>11.2f} {yuan:>8.1f}   "
              f"{found['fitting'] / 1e6:>12,.0f} {found['fitting_hours']:>10.2f} {fitting_yuan:>8.1f}")  # fmt: skip
    print(json.dumps(presets))
    return presets


if __name__ == "__main__":
    main()
