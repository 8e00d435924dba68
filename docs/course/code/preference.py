"""The loss of DPO by hand: log-probabilities of two answers under two models, and what is made of these four numbers.

    python docs/course/code/preference.py --reference out/course/full_sft_160.pth --policy out/course/dpo_160.pth \
        out/course/dpo_plain_160.pth --data_path dataset/sample/dpo_heldout.jsonl

Prints one pair in full, then means over the first --pairs pairs for each policy. The last line is a JSON object.
"""

import argparse
import json
import math
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.errors import run_main, user_errors
from data.reading import raw_rows
from data.row_shapes import parse_record
from model.tokenizer import render
from model.weights import load_model
from trainer.losses import dpo_loss


@torch.no_grad()
def log_prob_by_hand(model, tokenizer, messages: list[dict]) -> float:
    """log p(last message | those before), in nats: a sum over its tokens, the token that ends the turn included."""
    begin = len(render(tokenizer, messages[:-1], add_generation_prompt=True)[0])
    ids, mask = render(tokenizer, messages)
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)  # (T, V); row t is about token t + 1
    return sum(log_p[t - 1, ids[t]].item() for t in range(begin, len(ids)) if mask[t])


def dpo_by_hand(policy: tuple[float, float], reference: tuple[float, float], beta: float) -> dict[str, float]:
    """From log-probabilities of (chosen, rejected): what 5-dpo_train.py prints of one pair."""
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]  # how much likelier than before, in nats
    margin = beta * (chosen - rejected)
    return {"chosen": chosen, "rejected": rejected, "margin": margin, "kl": -(chosen + rejected) / 2,
            "loss": math.log(1 + math.exp(-margin)), "right": float(policy[0] > policy[1])}  # fmt: skip


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True, help="the weights that training began with")
    parser.add_argument("--policy", required=True, nargs="+", help="weights after training")
    parser.add_argument("--data_path", required=True, help='rows of {"chosen": [messages], "rejected": [messages]}')
    parser.add_argument("--pairs", type=int, default=40, help="how many of its rows (40)")
    parser.add_argument("--beta", type=float, default=0.1, help="as in training (0.1)")
    args = parser.parse_args(argv)
    with user_errors():
        pairs = [parse_record(raw) for _, raw in islice(raw_rows(args.data_path), args.pairs)]
        log_p = {}
        for path in (args.reference, *args.policy):
            model, tokenizer, _ = load_model(path)
            log_p[path] = [
                tuple(log_prob_by_hand(model.eval(), tokenizer, pair[side]) for side in ("chosen", "rejected"))
                for pair in pairs
            ]
    reference = log_p.pop(args.reference)

    print(f"asked     {pairs[0]['chosen'][-2]['content']}")
    for k, side in enumerate(("chosen", "rejected")):
        numbers = "".join(f"   {Path(path).stem} {log_p[path][0][k]:.1f}" for path in log_p)
        print(f"{side:9} {pairs[0][side][-1]['content']}")
        print(f"          log p: reference {reference[0][k]:.1f}{numbers}")
    print(f"\nmeans over {len(pairs)} pairs; likelier than under the reference by so many nats")
    print(f"{'policy':16} {'chosen':>8} {'rejected':>9} {'margin':>8} {'kl':>8} {'loss':>7} {'accuracy':>9}")
    result = {"pairs": len(pairs), "difference": 0.0, "policies": []}
    before = sum(chosen > rejected for chosen, rejected in reference) / len(pairs)
    print(f"{'(reference)':16} {0:8.2f} {0:9.2f} {0:8.2f} {0:8.2f} {math.log(2):7.3f} {before:9.0%}")
    for path, ours in log_p.items():
        rows = [dpo_by_hand(p, r, args.beta) for p, r in zip(ours, reference, strict=True)]
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        shown = [
            torch.tensor(x, dtype=torch.float64) for x in (*zip(*ours, strict=True), *zip(*reference, strict=True))
        ]
        losses = dpo_loss(*shown, args.beta).tolist()
        result["difference"] = max([result["difference"], *(abs(a["loss"] - b) for a, b in zip(rows, losses))])
        print(f"{Path(path).stem:16} {means['chosen']:+8.2f} {means['rejected']:+9.2f} {means['margin']:+8.2f} "
              f"{means['kl']:+8.2f} {means['loss']:7.3f} {means['right']:9.0%}")  # fmt: skip
        result["policies"].append(means)
    print(f"loss by hand - trainer/losses.py: at most {result['difference']:.0e}")
    result["before"] = before
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
