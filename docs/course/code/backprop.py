"""Backpropagation through one block by hand, beside autograd and beside a nudge of one weight.

    python docs/course/code/backprop.py

The block is the model's in small: x + W2 silu(W1 x), then a head and the cross-entropy. The last line is a JSON object.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor


def loss_of(W1: Tensor, W2: Tensor, U: Tensor, x: Tensor, target: Tensor) -> Tensor:
    """W1 (D, H), W2 (H, D), U (D, V), x (N, D), target (N,) -> the mean cross-entropy, in nats."""
    r = x + F.silu(x @ W1) @ W2  # (N, D)
    return F.cross_entropy(r @ U, target)


def gradients_by_hand(W1: Tensor, W2: Tensor, U: Tensor, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """d loss / d W1, W2, U and x. Forward keeps what backward needs; backward walks the same lines from the end."""
    h = x @ W1  # (N, H)
    s = torch.sigmoid(h)
    a = h * s  # (N, H): silu
    r = x + a @ W2  # (N, D)
    z = r @ U  # (N, V)

    dz = z.softmax(dim=-1)
    dz[torch.arange(len(z)), target] -= 1  # what the model says minus what came, as in chapter 1
    dz = dz / len(z)
    dU = r.T @ dz  # of a product, the weight's gradient: what came in, times the gradient of what went out
    dr = dz @ U.T  # and the input's gradient: back through the same matrix
    dW2 = a.T @ dr
    da = dr @ W2.T
    dh = da * (s + a * (1 - s))  # silu'(h)
    dW1 = x.T @ dh
    dx = dr + dh @ W1.T  # two paths leave x, so two gradients come back and add up
    return {"W1": dW1, "W2": dW2, "U": dU, "x": dx}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (0)")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    D, H, V, N = 8, 16, 10, 32
    weights = {"W1": torch.randn(D, H) / D**0.5, "W2": torch.randn(H, D) / H**0.5, "U": torch.randn(D, V) / D**0.5}
    inputs = weights | {"x": torch.randn(N, D)}
    inputs = {name: tensor.double().requires_grad_() for name, tensor in inputs.items()}
    target = torch.randint(V, (N,))

    loss = loss_of(**inputs, target=target)
    loss.backward()
    by_hand = gradients_by_hand(**{name: t.detach() for name, t in inputs.items()}, target=target)
    difference = 0.0
    print(f"loss {loss.item():.4f}; gradients by hand beside autograd's")
    for name, gradient in by_hand.items():
        apart = (gradient - inputs[name].grad).abs().max().item()
        difference = max(difference, apart)
        print(f"  d loss / d {name:<3} {str(tuple(gradient.shape)):>8}   length {gradient.norm():.4f}   "
              f"largest difference {apart:.0e}")  # fmt: skip

    nudge, losses = 1e-4, []
    for sign in (1, -1):
        moved = {name: tensor.detach().clone() for name, tensor in inputs.items()}
        moved["W1"][0, 0] += sign * nudge
        losses.append(loss_of(**moved, target=target).item())
    slope, wanted = (losses[0] - losses[1]) / (2 * nudge), by_hand["W1"][0, 0].item()
    print(f"\nW1[0, 0] a little up and a little down: the loss changes by {slope:.8f} a unit; by hand {wanted:.8f}")

    result = {"loss": loss.item(), "difference": difference, "slope": slope, "by_hand": wanted}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
