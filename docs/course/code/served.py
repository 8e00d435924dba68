"""Starts the server for a model, asks it questions as any client of OpenAI's API would, and stops it again.

    python docs/course/code/served.py --weight out/course/zoo_160.pth --questions 动物园里的老虎叫什么名字？

The last line is a JSON object.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import openai

from common.errors import RunFailed, run_main


def wait_until_ready(server: subprocess.Popen, client: openai.OpenAI) -> str:
    """The name that the server gives its model, as soon as it answers."""
    while server.poll() is None:
        try:
            return client.models.list().data[0].id
        except openai.APIConnectionError:
            time.sleep(0.5)
    raise RunFailed(f"the server ended with exit code {server.returncode}")


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", required=True)
    parser.add_argument("--questions", nargs="+", required=True)
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args(argv)

    serve = [sys.executable, "scripts/serve_openai_api.py", "--weight", args.weight, "--port", str(args.port)]
    server = subprocess.Popen(serve, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none", max_retries=0)
    answers = []
    try:
        name = wait_until_ready(server, client)
        print(f"{client.base_url} serves {name}")
        for question in args.questions:
            chat = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model=name, messages=chat, temperature=0, max_tokens=64)
            answers.append({"question": question, "answer": reply.choices[0].message.content,
                            "tokens": reply.usage.completion_tokens})  # fmt: skip
            print(f"  user       {question}\n  assistant  {answers[-1]['answer']}   ({answers[-1]['tokens']} tokens)")
    finally:
        server.terminate()
        server.wait()
    result = {"model": name, "answers": answers}
    print(json.dumps(result, ensure_ascii=False))
    return result


if __name__ == "__main__":
    run_main(main)
