"""What a teacher says at one place, and the gradient of distillation by hand.

    python docs/course/code/distil.py --teacher out/course/full_sft_160.pth --student out/course/pretrain_160.pth \
        --question 夏至是哪个季节的节气？ --begun 夏至是

Prints the teacher's best tokens at several temperatures beside the student's. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor

from common.errors import run_main, user_errors
from model.tokenizer import encode_text, render
from model.weights import load_model
from trainer.losses import divergence

TEMPERATURES = (1.0, 1.5, 3.0)


def gradient_by_hand(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """d (T^2 KL(teacher || student)) / d student logits, (V,): what the student says minus what the teacher says."""
    return temperature * ((student / temperature).softmax(dim=-1) - (teacher / temperature).softmax(dim=-1))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a weights file")
    parser.add_argument("--student", required=True, help="a weights file with the same tokenizer")
    parser.add_argument("--question", required=True)
    parser.add_argument("--begun", default="", help="how the answer begins; the next token is looked at")
    parser.add_argument("--top", type=int, default=6, help="tokens to print (6)")
    args = parser.parse_args(argv)
    with user_errors():
        teacher, tokenizer, _ = load_model(args.teacher)
        student = load_model(args.student)[0]
    ids = render(tokenizer, [{"role": "user", "content": args.question}], add_generation_prompt=True)[0]
    ids = torch.tensor([ids + encode_text(tokenizer, args.begun)])
    with torch.no_grad():
        z_teacher, z_student = (model.eval()(ids).logits[0, -1] for model in (teacher, student))  # (V,) each

    print(f"{args.question} {args.begun}...")
    print("teacher's next token" + "".join(f"    T = {t:g}" for t in TEMPERATURES) + "   student, T = 1")
    best = z_teacher.topk(args.top).indices
    columns = [(z_teacher / t).softmax(dim=-1)[best] for t in TEMPERATURES] + [z_student.softmax(dim=-1)[best]]
    for row, token in enumerate(best.tolist()):
        cells = "".join(f"{column[row].item():9.2%}" for column in columns)
        print(f"{cells}   {tokenizer.decode([token])!r}")
    result = {"top": [round(x, 4) for x in columns[0].tolist()], "difference": {}}
    for t in TEMPERATURES:
        z = z_student.clone().requires_grad_()
        wanted = torch.autograd.grad(divergence(z[None], z_teacher[None], t), z)[0]
        result["difference"][f"{t:g}"] = (wanted - gradient_by_hand(z_student, z_teacher, t)).abs().max().item()
    largest = max(result["difference"].values())
    print(f"gradient by hand - of trainer/losses.py: at most {largest:.0e}")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_main(main)
