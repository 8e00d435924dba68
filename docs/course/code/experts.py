"""RMSNorm, SwiGLU and a mixture of experts by hand, beside the model's own.

    python docs/course/code/experts.py --preset minimind2-moe

The block is drawn at random and not trained: shapes, sums and counts are what matters here. The last line is a JSON
object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import RMSNorm
from model.LMConfig import LMConfig
from model.moe import MoEFeedForward, balance_loss, route


def norm_by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def experts_by_hand(block: MoEFeedForward, x: Tensor) -> Tensor:
    """x (N, D) -> (N, D): token by token, the weighted sum of its K experts, and the shared expert."""
    K, out = block.config.num_experts_per_tok, []
    for token in x:  # (D,)
        score = block.gate(token).softmax(dim=-1)  # (E,)
        best = score.topk(K)
        y = block.shared_experts(token)
        for weight, e in zip(best.values / best.values.sum(), best.indices.tolist(), strict=True):
            y = y + weight * block.experts.expert(e, token)
        out.append(y)
    return torch.stack(out)


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.no_grad()
def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, help="a model with routed and shared experts")
    parser.add_argument("--tokens", type=int, default=64, help="random tokens to send through the block (64)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    config = LMConfig.from_preset(args.preset)
    if not config.use_moe or not config.n_shared_experts:
        parser.error(f"{args.preset} has no routed and shared experts; take minimind2-moe")
    D, E, K = config.dim, config.n_routed_experts, config.num_experts_per_tok
    x = 30 * torch.randn(args.tokens, D)  # as long as a stream that many layers have written into

    norm = RMSNorm(D, config.norm_eps)
    difference = {"norm": (norm(x) - norm_by_hand(x, norm.weight, config.norm_eps)).abs().max().item()}
    x, before = norm(x), x
    print(f"RMSNorm: a token of length {before[0].norm():.0f} has length {x[0].norm():.2f} afterwards; "
          f"sqrt(D) = {D ** 0.5:.2f}; by hand: at most {difference['norm']:.0e} apart")  # fmt: skip

    block = MoEFeedForward(config).eval()
    for p in block.parameters():
        nn.init.normal_(p, std=config.initializer_range)
    difference["experts"] = (block(x.unsqueeze(0))[0][0] - experts_by_hand(block, x)).abs().max().item()
    one = numbers(block.shared_experts)
    width, shared = config.moe_hidden_dim, config.n_shared_experts
    active = (K + shared) * one + numbers(block.gate)
    print(f"\none SwiGLU block {D} -> {width} -> {D}: 3 x {D} x {width} = {one:,} numbers")
    print(f"{E} routed experts, {shared} shared, router {numbers(block.gate):,}: {numbers(block):,} in all; "
          f"a token meets {active:,}")  # fmt: skip
    print(f"block - experts by hand: at most {difference['experts']:.0e}")

    scores = block.gate(x).softmax(dim=-1)  # (N, E)
    weight, chosen = route(scores, K, config.norm_topk_prob)
    print("\nthe first tokens, their experts and the weights of these")
    for t in range(4):
        pairs = sorted(zip(weight[t].tolist(), chosen[t].tolist(), strict=True), reverse=True)
        print(f"  token {t}: " + ", ".join(f"expert {e} {w:.2f}" for w, e in pairs))
    load = F.one_hot(chosen, E).sum(dim=(0, 1)).tolist()
    print(f"tokens of each expert: {load}, of {args.tokens} x {K}")

    # The balance loss is 1 where all experts get the same and E / K where the same K get everything.
    document = torch.zeros(args.tokens, dtype=torch.long)
    even = torch.arange(args.tokens * K).view(-1, K) % E
    same = torch.arange(K).expand(args.tokens, K)
    balance = {
        "this_router": balance_loss(scores, chosen, document).item(),
        "even": balance_loss(torch.full_like(scores, 1 / E), even, document).item(),
        "same_two": balance_loss(F.one_hot(same, E).sum(dim=1) / K, same, document).item(),
    }
    print("balance loss: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in balance.items()))
    result = {"difference": difference, "expert": one, "block": numbers(block), "active": active, "load": load,
              "balance": balance}  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
