"""Asks one model the same questions with an adapter on, off, and merged into the weights.

    python docs/course/code/adapter.py --base out/course/full_sft_160.pth --adapter out/course/lora/zoo_160.pth

The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from common.errors import run_main, user_errors
from model.lora import load_lora, merge_lora, use_lora
from model.tokenizer import render
from model.weights import load_model

QUESTIONS = ("动物园里的老虎叫什么名字？", "法国的首都是哪里？", "氧的元素符号是什么？")


def answers(model, tokenizer) -> list[str]:
    """The best token each time, to the end of the turn or 24 tokens; by transformers' own loop."""
    texts = []
    for question in QUESTIONS:
        ids, _ = render(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
        out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        texts.append(tokenizer.decode(out, skip_special_tokens=True))
    return texts


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="PATH", help="the weights that the adapter was trained on")
    parser.add_argument("--adapter", required=True, metavar="PATH", help="the adapter's file")
    args = parser.parse_args(argv)

    with user_errors():
        model, tokenizer, _ = load_model(args.base)
        load_lora(model, args.adapter, name="zoo")
    model.eval()
    result = {"on": answers(model, tokenizer), "off": answers(use_lora(model, None), tokenizer)}
    result["merged"] = answers(merge_lora(use_lora(model, "zoo")), tokenizer)
    for i, question in enumerate(QUESTIONS):
        print(question + "".join(f"\n  {how:<7} {texts[i]!r}" for how, texts in result.items()))
    size = {name: Path(path).stat().st_size for name, path in (("base", args.base), ("adapter", args.adapter))}
    print(f"\nfiles: {size['base'] / 1e6:.1f} MB the model, {size['adapter'] / 1e6:.2f} MB the adapter")
    print(json.dumps(result | {"bytes": size}, ensure_ascii=False))
    return result


if __name__ == "__main__":
    run_main(main)
