"""Low-rank adapters by hand, beside the project's: the update, its gradients at the start, and how large they are.

    python docs/course/code/lora.py --weight out/course/full_sft_160.pth --preset minimind2-small

The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from model.LMConfig import PRESETS, LMConfig
from model.lora import PROJECTIONS, add_lora, merge_lora, targeted
from model.model import MiniMindForCausalLM
from model.weights import load_model

RANK, ALPHA, RANKS = 8, 16, (1, 4, 8, 16, 64)


def lora_by_hand(x: Tensor, W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """x (T, in), W (out, in) frozen, A (rank, in), B (out, rank) -> (T, out)."""
    rank = len(A)
    return x @ W.T + alpha / rank * (x @ A.T) @ B.T  # first down to `rank` numbers, then up: B A is never formed


def sizes(preset: str) -> dict:
    """Numbers that are trained at each rank, in all projections of a preset, and all its parameters."""
    with torch.device("meta"):  # shapes alone, no memory
        model = MiniMindForCausalLM(LMConfig.from_preset(preset))
    layers = targeted(model, PROJECTIONS).values()
    trained = {rank: sum(rank * (layer.in_features + layer.out_features) for layer in layers) for rank in RANKS}
    return {"preset": preset, "all": model.num_parameters(), "layers": len(layers), "trained": trained}


def start_gradients(model, ids: Tensor, zero_A: bool) -> tuple[float, float]:
    """The norms of the gradients of all A and all B, before the first step. zero_A: A starts at zero, too."""
    parts = {side: [p for name, p in model.named_parameters() if name.endswith(f".{side}")] for side in "AB"}
    with torch.no_grad():
        for A in parts["A"]:
            A.mul_(0 if zero_A else 1)
    loss = model(ids, labels=ids).loss
    grads = torch.autograd.grad(loss, parts["A"] + parts["B"])
    split = len(parts["A"])
    return tuple(torch.stack([g.norm() for g in side]).norm().item() for side in (grads[:split], grads[split:]))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True, help="a weights file of the project")
    parser.add_argument("--preset", choices=list(PRESETS), default="minimind2-small", help="whose sizes to count")
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.weight)
    torch.manual_seed(0)
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, 16))
    with torch.no_grad():
        before = model(ids).logits
    add_lora(model, RANK, ALPHA)
    with torch.no_grad():
        start = (model(ids).logits - before).abs().max().item()
    print(f"with a new adapter of rank {RANK} the logits change by at most {start:.0e}")
    plain, zero = start_gradients(model, ids, False), start_gradients(model, ids, True)
    print(f"gradients at the start: of A {plain[0]:.2g}, of B {plain[1]:.2g}; "
          f"were A zero as well: of A {zero[0]:.2g}, of B {zero[1]:.2g}")  # fmt: skip

    layer = model.model.layers[0].self_attn.q_proj
    adapter, x = layer.adapter["weight"], torch.randn(5, layer.in_features)
    with torch.no_grad():
        for p in (p for name, p in model.named_parameters() if name.endswith((".A", ".B"))):
            p.normal_(0, 0.05)  # as if it had been trained
        wanted, W = layer(x), layer.weight.clone()
        by_hand = (lora_by_hand(x, W, adapter.A, adapter.B, ALPHA) - wanted).abs().max().item()
        rank = int(torch.linalg.matrix_rank(adapter.delta()))
        adapted = model(ids).logits
        merged = (merge_lora(model)(ids).logits - adapted).abs().max().item()
    print(f"\none layer by hand - model/lora.py: at most {by_hand:.0e}; the update has rank {rank}")
    print(f"logits after merging - before: at most {merged:.0e}")

    size = sizes(args.preset)
    print(f"\n{args.preset}: {size['layers']} layers adapted, {size['all']:,} parameters in all")
    for r, n in size["trained"].items():
        print(f"rank {r:>3}: {n:>10,} trained, {n / size['all']:6.1%}   file {n * 4 / 1e6:5.1f} MB")
    result = {"start": start, "gradients": {"A": plain[0], "B": plain[1], "zero": zero}, "by_hand": by_hand,
              "rank": rank, "merged": merged, "sizes": size}  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
