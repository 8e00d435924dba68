"""Asks a base model and a chat model the same things, with and without the template and the earlier turns.

    python docs/course/code/ask.py --base out/course/pretrain_160.pth --chat out/course/full_sft_160.pth

Every answer is greedy and at most 24 tokens long. The last line is a JSON object.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from common.errors import run_main, user_errors
from inference.engine import Engine
from inference.sampling import SamplingParams
from model.weights import load_model

MAX_TOKENS = 24
FIRST = [{"role": "user", "content": "法国的首都是哪里？"}]
ANSWERED = [*FIRST, {"role": "assistant", "content": "法国的首都是巴黎。"}]
NEXT = [{"role": "user", "content": "那日本呢？"}]
TERSE = [{"role": "system", "content": "只回答答案，不要解释。"}]
UNKNOWN = [{"role": "user", "content": "我家的猫叫什么名字？"}]


def answer(engine: Engine, prompt) -> tuple[str, str]:
    """-> the text, and why it ended: "stop" at the end token, "length" where it would have gone on."""
    completion = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=MAX_TOKENS))[0]
    return completion.text, completion.finish_reason


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="PATH", help="weights of a base model")
    parser.add_argument("--chat", required=True, metavar="PATH", help="weights of a chat model")
    args = parser.parse_args(argv)

    with user_errors():
        base, chat = (Engine(*load_model(path)[:2]) for path in (args.base, args.chat))
    cases = {
        "base, as text": (base, FIRST[0]["content"]),
        "base, as text it knows": (base, f"问：{FIRST[0]['content']}答："),
        "base, as a chat": (base, FIRST),
        "chat, as a chat": (chat, FIRST),
        "chat, with a system message": (chat, TERSE + FIRST),
        "chat, second turn with the first": (chat, ANSWERED + NEXT),
        "chat, second turn alone": (chat, NEXT),
        "chat, what it cannot know": (chat, UNKNOWN),
    }
    result = {}
    for name, (engine, prompt) in cases.items():
        text, end = answer(engine, prompt)
        result[name] = {"text": text, "end": end, "prompt_tokens": len(engine.encode(prompt))}
        print(f"{name} ({result[name]['prompt_tokens']} tokens)\n  {text!r}  [{end}]")
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    run_main(main)
