"""A bigram model learned by gradient descent, its gradient worked out by hand.

    python docs/course/code/bigram.py --data_path dataset/sample/pretrain.jsonl

One table W (V, V): row i holds the logits of the character that follows character i. The same probabilities can be had
by counting; so one sees where gradient descent must arrive, and whether it does. The last line is a JSON object.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F


def read_pairs(path: str) -> tuple[list[str], torch.Tensor]:
    """The characters in use, and all pairs of neighbours as their numbers (N, 2)."""
    with open(path, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    characters = sorted(set("".join(texts)))
    number = {char: i for i, char in enumerate(characters)}
    pairs = [(number[a], number[b]) for text in texts for a, b in zip(text, text[1:])]
    return characters, torch.tensor(pairs)


def loss_of(W: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """The mean of -log p(next | current) over the pairs, in nats."""
    current, following = pairs.T  # (N,), (N,)
    logits = W[current]  # (N, V): a lookup, the row of each current character
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    return -log_p.gather(-1, following.unsqueeze(-1)).mean()


def gradient_by_hand(W: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """d loss / d W (V, V): each pair adds p - onehot(next), divided by N, to the row of its current character."""
    current, following = pairs.T
    error = F.softmax(W[current], dim=-1)  # (N, V) what the model says ...
    error[torch.arange(len(pairs)), following] -= 1  # ... minus what came
    return torch.zeros_like(W).index_add(0, current, error / len(pairs))


def train(W: torch.Tensor, pairs: torch.Tensor, steps: int, batch: int, learning_rate: float) -> list[float]:
    """Gradient descent on W, in place; a step looks at `batch` pairs drawn at random. Returns each step's loss."""
    losses = []
    for _ in range(steps):
        drawn = pairs[torch.randint(len(pairs), (batch,))]
        losses.append(loss_of(W, drawn).item())
        W -= learning_rate * gradient_by_hand(W, drawn)
    return losses


def counted(pairs: torch.Tensor, V: int) -> float:
    """The lowest loss a bigram model can have on these pairs: that of the counted probabilities."""
    counts = torch.zeros(V, V).index_put((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)
    p = counts / counts.sum(dim=-1, keepdim=True)
    return -(counts * p.log().nan_to_num(neginf=0)).nansum().item() / len(pairs)


def sample(W: torch.Tensor, characters: list[str], start: str, length: int) -> str:
    text = start
    for _ in range(length):
        p = F.softmax(W[characters.index(text[-1])], dim=-1)
        text += characters[torch.multinomial(p, 1).item()]
    return text.replace("\n", " ")


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help='rows of {"text": ...}')
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256, help="pairs a step looks at (256)")
    parser.add_argument("--learning_rate", type=float, default=100.0)
    parser.add_argument("--start", default="中", help="the character that texts begin with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)

    characters, pairs = read_pairs(args.data_path)
    V = len(characters)
    W = torch.zeros(V, V)
    print(f"{V:,} characters, {len(pairs):,} pairs; ln V = {math.log(V):.4f}")

    # Is the gradient right? autograd computes it from loss_of alone.
    some = pairs[:256]
    by_autograd = torch.autograd.grad(loss_of(W.requires_grad_(), some), W)[0]
    W = W.detach()
    difference = (gradient_by_hand(W, some) - by_autograd).abs().max().item()
    print(f"largest difference between the gradient by hand and autograd's: {difference:.1e}")

    result = {"characters": V, "pairs": len(pairs), "ln_v": math.log(V), "lowest": counted(pairs, V), "losses": {}}
    result["losses"]["0"] = loss_of(W, pairs[:20000]).item()
    print(f"step     0  loss {result['losses']['0']:.4f}   {sample(W, characters, args.start, 24)}")
    done = 0
    for step in sorted({args.steps // 100, args.steps // 10, args.steps // 2, args.steps} - {0}):
        losses = train(W, pairs, step - done, args.batch, args.learning_rate)
        done, recent = step, losses[-50:]
        result["losses"][str(step)] = sum(recent) / len(recent)
        print(f"step {step:5}  loss {result['losses'][str(step)]:.4f}   {sample(W, characters, args.start, 24)}")
    print(f"by counting: loss {result['lowest']:.4f}, the lowest that any table can have")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
