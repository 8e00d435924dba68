"""Gradient descent, AdamW and Muon by hand: a valley of two numbers, and the matrix that Muon makes of a gradient.

    python docs/course/code/optimizers.py

The valley is loss = (50 a^2 + b^2) / 2: steep along a, flat along b. AdamW is compared with torch's, Muon's
orthogonalisation with trainer/optimizers.py and with the exact one. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from trainer.optimizers import learning_rate_factor, orthogonalise

STEEP, FLAT, START = 50.0, 1.0, (1.0, 1.0)


def sgd_step(w: Tensor, gradient: Tensor, rate: float) -> Tensor:
    return w - rate * gradient


def adamw_step(w, gradient, state: dict, rate: float, decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8) -> Tensor:
    """One step of AdamW; state holds t, m and v from step to step."""
    state["t"] = t = state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * gradient  # mean of the last gradients, about ten of them
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * gradient**2  # mean of their squares, about twenty
    m, v = state["m"] / (1 - beta1**t), state["v"] / (1 - beta2**t)  # both began at 0: without this they are too small
    return (1 - rate * decay) * w - rate * m / (v.sqrt() + eps)


def muon_direction(matrix: Tensor, steps: int = 5) -> Tensor:
    """Every singular value of (rows <= columns) driven towards 1 by polynomials; no decomposition is computed."""
    x = matrix / matrix.norm()
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def valley(w: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient at w (2,)."""
    scale = torch.tensor([STEEP, FLAT])
    return (scale * w**2).sum().item() / 2, scale * w


def walk(kind: str, rate: float, steps: int, schedule: str | None = None, noise=0.0) -> tuple[list, float]:
    """The places (steps + 1, 2) of a walk down the valley, and the loss at the last one.

    noise: of each gradient, as that of a mini-batch differs from the gradient of all data.
    """
    w, state = torch.tensor(START), {}
    path = [w.tolist()]
    for step in range(steps):
        eta = rate * (learning_rate_factor(step, steps, 0, schedule) if schedule else 1.0)
        gradient = valley(w)[1] + noise * torch.randn(2)
        w = sgd_step(w, gradient, eta) if kind == "sgd" else adamw_step(w, gradient, state, eta)
        path.append(w.tolist())
    return path, valley(w)[0]


def largest_difference_to_torch(steps: int = 20) -> float:
    """AdamW by hand and torch's, on the same random gradients."""
    ours = torch.randn(5, 7).double()
    theirs = ours.clone().requires_grad_()
    optimizer, state = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), {}
    for _ in range(steps):
        gradient = torch.randn(5, 7).double()
        ours, theirs.grad = adamw_step(ours, gradient, state, 0.01, decay=0.1), gradient
        optimizer.step()
    return (ours - theirs).abs().max().item()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.039, 0.041], help="of gradient descent")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    apart = largest_difference_to_torch()
    print(f"AdamW by hand - torch's, after 20 steps: at most {apart:.0e}")
    print(f"\ndown the valley in 60 steps from loss {valley(torch.tensor(START))[0]:.2f}")
    paths, losses = {}, {}
    for kind, rate in [*(("sgd", rate) for rate in args.rates), ("adamw", 0.1)]:
        name = f"{kind} {rate:g}"
        paths[name], losses[name] = walk(kind, rate, 60)
        print(f"  {name:<12} loss {losses[name]:<9.2g} at a {paths[name][-1][0]:+.4f}, b {paths[name][-1][1]:+.4f}")
    print("noisy gradients: 200 steps of adamw 0.1, mean of 20 walks")
    for schedule in (None, "cosine", "wsd"):
        name = schedule or "constant"
        losses[name] = sum(walk("adamw", 0.1, 200, schedule, noise=5.0)[1] for _ in range(20)) / 20
        print(f"  {name:<12} loss {losses[name]:.2g}")

    # A gradient as they are in networks: a few directions carry almost all of it.
    left, right = (torch.linalg.qr(torch.randn(n, n))[0] for n in (8, 12))
    gradient = left @ torch.diag(torch.tensor([0.5**i for i in range(8)])) @ right[:8]
    U, S, Vt = torch.linalg.svd(gradient, full_matrices=False)
    direction, exact = muon_direction(gradient), U @ Vt
    after = torch.linalg.svdvals(direction)
    same = (direction - orthogonalise(gradient)).abs().max().item()
    alike = (direction * exact).sum().item() / direction.norm().item() / exact.norm().item()
    print("\nsingular values of a gradient (8, 12), and of what Muon makes of it")
    print("  before " + "  ".join(f"{s:5.3f}" for s in S.tolist()))
    print("  after  " + "  ".join(f"{s:5.3f}" for s in after.tolist()))
    print(f"  by hand - trainer/optimizers.py: at most {same:.0e}; cosine with the exact matrix {alike:.3f}")
    result = {
        "difference": apart, "losses": losses, "paths": paths, "before": S.tolist(), "after": after.tolist(),
        "same": same, "cosine": alike,
        "schedules": {name: [round(learning_rate_factor(step, 200, 20, name), 4) for step in range(200)]
                      for name in ("cosine", "wsd")},
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
