"""GRPO by hand on ten questions, with a reward that can be cheated and one that cannot.

    python docs/course/code/cheat.py

The model writes digits until it writes the end token. Question q below 5 has the answer q. The answers of the other
five are drawn anew each time they are asked: nobody can know them. One rule looks for the answer anywhere in what was
written, the other wants the answer and nothing else. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from trainer.losses import group_advantages, grpo_loss

END, LONGEST, KNOWN = 10, 24, 5  # the end token; tokens of an answer at most; questions that have a fixed answer


def sample(W: Tensor, questions: Tensor) -> tuple[Tensor, Tensor]:
    """Answers to questions (N,) -> tokens (N, LONGEST) and a mask, true up to the end token.

    W (10, 11, 11): for each question and token before (10: the beginning) the logits of the next token.
    """
    tokens, before = [], torch.full_like(questions, END)
    for _ in range(LONGEST):
        before = torch.multinomial(W[questions, before].softmax(dim=-1), 1).squeeze(1)
        tokens.append(before)
    tokens = torch.stack(tokens, dim=1)
    ended_before = (tokens == END).cumsum(dim=1) - (tokens == END).long()
    return tokens, ended_before == 0


def log_probs(W: Tensor, questions: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token, (N, LONGEST)."""
    before = torch.cat((torch.full_like(tokens[:, :1], END), tokens[:, :-1]), dim=1)
    log_p = W[questions[:, None], before].log_softmax(dim=-1)  # (N, LONGEST, 11)
    return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def judged(tokens: Tensor, mask: Tensor, answers: Tensor) -> dict[str, Tensor]:
    """The reward of each answer, (N,), by both rules."""
    found = ((tokens == answers[:, None]) & mask).any(dim=1)
    alone = (tokens[:, 0] == answers) & (tokens[:, 1] == END)
    return {"loose": found.float(), "strict": alone.float()}


def advantages_by_hand(rewards: Tensor) -> Tensor:
    """(questions, group) -> how far each answer is above the mean of its group, in standard deviations."""
    rows = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        deviation = (sum((r - mean) ** 2 for r in row) / (len(row) - 1)) ** 0.5
        rows.append([(r - mean) / (deviation + 1e-4) for r in row])
    return torch.tensor(rows)


def policy_loss(log_p: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Its gradient is the policy gradient: each token of an answer counts by the advantage of the whole answer."""
    return -(log_p * advantages[:, None])[mask].sum() / mask.sum()


def train(rule: str, steps: int, group: int, rate: float) -> tuple[list[dict], float, Tensor]:
    """-> (means over each tenth of the steps; the largest difference from trainer/losses.py at the first step; W)."""
    W = torch.zeros(10, 11, 11, requires_grad=True)
    optimizer, seen, rows, difference = torch.optim.Adam([W], lr=rate), [], [], 0.0
    questions = torch.arange(10).repeat_interleave(group)  # (N,): every question, `group` times
    for step in range(steps + 1):
        drawn = torch.randint(10, (10,)).repeat_interleave(group)
        answers = torch.where(questions < KNOWN, questions, drawn)
        with torch.no_grad():
            tokens, mask = sample(W, questions)
        rewards = judged(tokens, mask, answers)
        seen.append([rewards["loose"].mean(), rewards["strict"].mean(), mask.sum() / len(mask)])
        if step % (steps // 10) == 0:  # step 0 alone, then the steps since the last row
            means = [round(x, 4) for x in torch.tensor(seen, dtype=torch.float64).mean(dim=0).tolist()]
            rows.append({"step": step} | dict(zip(("loose", "strict", "length"), means, strict=True)))
            seen = []
        advantages = advantages_by_hand(rewards[rule].view(10, group)).flatten()
        log_p = log_probs(W, questions, tokens)
        gradient = torch.autograd.grad(policy_loss(log_p, mask, advantages), W, retain_graph=True)[0]
        if step == 0:
            ours = group_advantages(rewards[rule].view(10, group)).flatten()
            total, count, _ = grpo_loss(log_p, log_p.detach(), None, ours, mask, clip=0.2, kl=0.0)
            difference = (torch.autograd.grad(total / count, W)[0] - gradient).abs().max().item()
        W.grad = gradient
        optimizer.step()
    return rows, difference, W.detach()


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 10 (400)")
    parser.add_argument("--group", type=int, default=16, help="answers to each question (16)")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate (0.05)")
    args = parser.parse_args(argv)
    result = {}
    for rule, says in (("loose", "the answer is somewhere in it"), ("strict", "the answer and nothing else")):
        torch.manual_seed(0)
        rows, difference, W = train(rule, args.steps, args.group, args.rate)
        print(f"trained with the {rule} rule: {says}")
        print(f"gradient by hand - trainer/losses.py: at most {difference:.0e}")
        print("  step   reward   really right   length")
        for row in rows:
            print(f"{row['step']:6}   {row[rule]:6.2f}   {row['strict']:12.2f}   {row['length']:6.1f}")
        written = {}
        for question in (3, 8):
            tokens, mask = sample(W, torch.tensor([question]))
            written[question] = "".join(str(t) for t in tokens[mask].tolist() if t != END)
            print(f"asked {question}, it writes {written[question]}")
        print()
        result[rule] = {"rows": rows, "last": rows[-1], "difference": difference, "written": written}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
