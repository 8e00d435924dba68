"""An exported model in other runtimes: how many of 28 questions they answer with our tokens, one for one.

Each runtime gets an environment of its own in --folder, kept for the next time. It is a venv that sees this one's
packages behind its own, so torch is not installed once for each. Questions: every n-th of --questions.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from common.errors import UserError
from export.gguf_file import write_gguf
from export.transformers_folder import write_transformers_folder
from inference.engine import Engine
from inference.open_model import find_weight
from inference.sampling import SamplingParams
from model.tokenizer import render
from model.weights import load_model

QUESTIONS, TOKENS = 28, 48
RUNNER = Path(__file__).parent / "runtime_runner.py"
RUNTIMES = {  # name: (runner, what the model is exported as, packages to install; none: this environment)
    "transformers": ("transformers", "folder", []),
    "transformers-4.57": ("transformers", "folder", ["transformers==4.57.6"]),
    "transformers-4.48": ("transformers", "folder", ["transformers==4.48.3"]),
    "llama.cpp f32": ("llama.cpp", "float32", []),
    "llama.cpp q8_0": ("llama.cpp", "q8_0", []),
    "llama.cpp q4_0": ("llama.cpp", "q4_0", []),
    "onnxruntime": ("onnxruntime", "folder", ["optimum-onnx[onnxruntime]"]),
    "openvino": ("openvino", "folder", ["optimum-intel[openvino]", "datasets<5"]),
    "ctranslate2": ("ctranslate2", "folder", ["ctranslate2", "transformers<5"]),
}


def add_flags(parser) -> None:
    parser.add_argument("--weight", metavar="PATH", help="a chat model (the newest in out/)")
    parser.add_argument("--questions", default="dataset/sample/heldout.jsonl", metavar="FILE")
    parser.add_argument("--folder", default="out/runtimes", metavar="DIR", help="for environments and exports")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of: {', '.join(RUNTIMES)}")


def run(args) -> dict:
    torch.set_num_threads(1)
    unknown = set(args.only or ()) - set(RUNTIMES)
    if unknown:
        raise UserError(f"--only {sorted(unknown)[0]}: no such runtime; they are {', '.join(RUNTIMES)}")
    folder = Path(args.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, record = load_model(find_weight(args))
    prompts = questions(Path(args.questions), tokenizer)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0)
    ours = [done.token_ids for done in Engine(model, tokenizer).generate(prompts, greedy)]
    rows = []
    for name in args.only or RUNTIMES:
        runner, kind, packages = RUNTIMES[name]
        path = exported(folder, kind, model, tokenizer, record)
        rows.append({"runtime": name, "bytes": size(path)} | compared(folder, name, runner, path, packages, ours))
        print(rows[-1], flush=True)
    return {"runtimes": rows}


def questions(path: Path, tokenizer) -> list[list[int]]:
    """The prompts' token ids."""
    rows = path.read_text("utf-8").splitlines()
    chosen = rows[:: max(len(rows) // QUESTIONS, 1)][:QUESTIONS]
    asked = [[{"role": "user", "content": json.loads(row)["question"]}] for row in chosen]
    return [render(tokenizer, messages, add_generation_prompt=True)[0] for messages in asked]


def exported(folder: Path, kind: str, model, tokenizer, record) -> Path:
    """A transformers folder, or a GGUF file of type `kind`."""
    if kind == "folder":
        (folder / "model").mkdir(exist_ok=True)
        write_transformers_folder(folder / "model", model, tokenizer, record, "model")
        return folder / "model"
    write_gguf(folder / f"{kind}.gguf", model, tokenizer, "model", kind)
    return folder / f"{kind}.gguf"


def size(path: Path) -> int:
    return (path / "model.safetensors" if path.is_dir() else path).stat().st_size


def compared(folder: Path, name: str, runner: str, path: Path, packages: list[str], ours: list) -> dict:
    """-> {"version", "equal"} or, where it fails, {"failed": the last line it said}."""
    try:
        python = environment(folder / name.replace(" ", "-"), packages) if packages else sys.executable
        out = folder / "answers.json"
        command = [python, RUNNER, runner, path, folder / "prompts.json", str(TOKENS), out]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr.strip() or "no word").splitlines()[-1]}
    found = json.loads(out.read_text())
    ends = {0, 2}
    until_end = [[token for token in tokens if token not in ends] for tokens in found["tokens"]]
    mine = [[token for token in tokens if token not in ends] for tokens in ours]
    equal = sum(a == b for a, b in zip(mine, until_end, strict=True))
    return {"version": found["version"], "equal": f"{equal} of {len(ours)}"}


def environment(folder: Path, packages: list[str]) -> Path:
    """A venv with these packages -> its Python; made once."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
        own = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                             capture_output=True, text=True).stdout.strip()  # fmt: skip
        behind = [path for path in sys.path if path.endswith("site-packages")]
        Path(own, "behind.pth").write_text("\n".join(behind) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, capture_output=True, text=True)
        (folder / "made").touch()
    return python
