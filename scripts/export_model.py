"""A trained model in the formats of other programs, and other programs' models in ours.

    python scripts/export_model.py --out my-model                    a folder for transformers, vLLM, SGLang
    python scripts/export_model.py --format gguf --dtype q8_0 --out my-model.gguf      llama.cpp, Ollama (+ Modelfile)
    python scripts/export_model.py --format web --out site           a page that chats, for any host of files
    python scripts/export_model.py --format minimind --out full_sft_768.pth            MiniMind's own programs
    python scripts/export_model.py --format weights --weight FOLDER --out out/full_sft_512.pth     and back

--weight takes all that the project can read: its own files, a transformers folder, MiniMind's releases. Nothing is
computed anew: the numbers are renamed, reordered and written (docs/export.md).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors import SafetensorError

from common.errors import RunFailed, UserError, disk_fault, run_main
from common.flags import Parser
from export import web_folder
from export.gguf_file import STORED, write_gguf
from export.hub import check_push, push
from export.minimind_file import minimind_release, minimind_state, other_settings
from export.ollama import modelfile
from export.output import check_folder, publish_files, publish_folder, stage_beside
from export.transformers_folder import FILES, cast, write_transformers_folder
from inference.open_model import find_weight
from model.LMConfig import PRESETS
from model.lora import load_lora, merge_lora
from model.peft_folder import load_peft
from model.tokenizer import load_tokenizer
from model.weights import load_model, save_weights

# --format: how --out ends; a folder where it has no ending
ENDINGS = {"transformers": "", "gguf": ".gguf", "web": "", "minimind": ".pth", "weights": ".pth"}
FOLDERS = {"transformers": FILES, "web": web_folder.FILES}
SHORT_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # as llama.cpp's users write them


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--weight", metavar="PATH", help="weights file or transformers folder (the newest in out/)")
    parser.add_argument("--preset", choices=list(PRESETS), metavar="NAME",
                        help="shape of a MiniMind state dict, where several fit its tensors")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for weights that come without one")
    parser.add_argument("--lora", metavar="PATH", help="adapter to merge into the weights")
    parser.add_argument("--format", choices=tuple(ENDINGS), default="transformers")
    parser.add_argument("--out", metavar="PATH", help="folder, .gguf or .pth file to write (in out/export)")
    types = f"of the stored matrices: {', '.join(STORED)}; the last two for gguf and web only (float32; web: q8_0)"
    parser.add_argument("--dtype", choices=(*STORED, *SHORT_NAMES), metavar="TYPE", help=types)
    parser.add_argument("--wllama", metavar="DIR", help="for web: the unpacked package (npm fetches it)")
    parser.add_argument("--push_to_hub", metavar="NAME", help="upload what was written to this repository")
    parser.flag(parser, "overwrite", False, "replace another export at --out")
    args = parser.parse_args(argv)
    args.dtype = SHORT_NAMES.get(args.dtype, args.dtype) or ("q8_0" if args.format == "web" else "float32")
    if args.dtype in ("q8_0", "q4_0") and args.format not in ("gguf", "web"):
        raise UserError(f"--dtype {args.dtype} is a type of GGUF files; add --format gguf")
    return args


def main(argv=None):
    args = parse_args(argv)
    try:
        if args.push_to_hub:
            check_push(args.push_to_hub)
        result, files = export(args)
    except ValueError as error:
        raise UserError(error) from None
    except (OSError, SafetensorError) as error:
        full = isinstance(error, SafetensorError) or disk_fault(error)
        raise (RunFailed if full else UserError)(f"writing {args.out or 'out/export'} failed: {error}") from None
    if args.push_to_hub:
        try:
            result["pushed_to"] = push(files, args.push_to_hub)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise RunFailed(f"{result['out']} is written, but not on the hub: {reason}") from None
    print(json.dumps(result, ensure_ascii=False))


def export(args) -> tuple[dict, list[Path]]:
    """Reads, converts, writes -> (what the last line tells, the files)."""
    weight = find_weight(args)
    out = where(args, weight)
    if args.format in FOLDERS:
        check_folder(out, FOLDERS[args.format])
    model, tokenizer, record = read(args, weight)
    writers = {"transformers": to_transformers, "gguf": to_gguf, "web": to_web,
               "minimind": to_minimind, "weights": to_weights}  # fmt: skip
    writer = writers[args.format]
    called = weight.resolve().name.removesuffix(".pth") if args.format == "web" else out.name.removesuffix(".gguf")
    name = args.push_to_hub or called
    architecture, files = writer(args, out, model, tokenizer, record, name)
    result = {
        "format": args.format, "architecture": architecture, "dtype": args.dtype, "out": str(out),
        "files": sorted(path.name for path in files), "bytes": sum(path.stat().st_size for path in files),
        "parameters": model.config.parameter_count(), "weights": str(weight), "lora": args.lora,
    }  # fmt: skip
    return result, files


def where(args, weight: Path) -> Path:
    """--out, or a name after the weights'. A GGUF path without .gguf is a folder to hold model.gguf."""
    name = f"{weight.resolve().name.removesuffix('.pth')}{ENDINGS[args.format]}"
    out = Path(args.out) if args.out else Path("out/export") / name
    if args.format == "gguf" and out.suffix != ".gguf":
        out = out / "model.gguf"
    if args.format not in FOLDERS and out.is_dir():
        raise ValueError(f"--out {out} is a folder; this format is a file")
    if out.resolve() == weight.resolve():
        raise ValueError(f"--out {out} is the very model to be exported")
    return out


def read(args, weight: Path):
    """-> (model, tokenizer, record), the adapter merged in."""
    model, tokenizer, record = load_model(weight, args.preset)
    if args.tokenizer:
        tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None and args.format not in ("minimind", "weights"):
        raise ValueError(f"{weight} comes without a tokenizer; name the folder of the one it learned with: --tokenizer")
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, {weight} only {model.config.vocab_size}")
    if args.lora:
        load_adapter = load_peft if Path(args.lora).is_dir() else load_lora
        load_adapter(model, args.lora)
        merge_lora(model)
        record = record | {"stage": "lora", "lora": Path(args.lora).name}
    return model, tokenizer, record


def to_transformers(args, out: Path, model, tokenizer, record: dict, name: str):
    with stage_beside(out) as stage:
        config = write_transformers_folder(stage, model, tokenizer, record, name, args.dtype)
        publish_folder(stage, out, args.overwrite)
    print(f"{out}: {config['architectures'][0]}; try it: vllm serve {out}")
    return config["architectures"][0], sorted(out.iterdir())


def to_gguf(args, out: Path, model, tokenizer, record: dict, name: str):
    with stage_beside(out) as stage:
        base = record.get("stage") == "pretrain"
        architecture = write_gguf(stage / out.name, model, tokenizer, name, args.dtype, base)
        text = modelfile(out.name, tokenizer, base)
        (stage / "Modelfile").write_text(text, encoding="utf-8")
        publish_files(stage, out.parent, args.overwrite)
    print(f"{out}: architecture {architecture}; try it: llama-cli -m {out}")
    return architecture, [out, out.parent / "Modelfile"]


def to_web(args, out: Path, model, tokenizer, record: dict, name: str):
    with stage_beside(out) as stage, web_folder.wllama_package(args.wllama) as package:
        architecture = web_folder.write_web_folder(stage, package, model, tokenizer, record, name, args.dtype)
        publish_folder(stage, out, args.overwrite)
    print(f"{out}: try it: python -m http.server --directory {out}, then http://localhost:8000")
    return architecture, sorted(out.iterdir())


def to_minimind(args, out: Path, model, tokenizer, record: dict, _):
    release, state = minimind_release(model.config), minimind_state(model, args.dtype)
    with stage_beside(out) as stage:
        torch.save(state, stage / out.name)
        publish_files(stage, out.parent, args.overwrite)
    config = model.config
    print(f"{out}: for {release}, --hidden_size {config.dim} --num_hidden_layers {config.n_layers}"
          f" --use_moe {int(config.use_moe)}, with this tokenizer's files in its folder model/")  # fmt: skip
    if others := other_settings(config):
        said = ", ".join(f"{key} {value}" for key, value in others.items())
        print(f"note: its scripts have no flag for {said}; change the defaults of its config class", file=sys.stderr)
    return release, [out]


def to_weights(args, out: Path, model, tokenizer, record: dict, _):
    for key, tensor in model.state_dict().items():
        cast(tensor, args.dtype, key)  # refuses what the type cannot hold
    with stage_beside(out) as stage:
        save_weights(stage / out.name, model.to(getattr(torch, args.dtype)), tokenizer, record)
        publish_files(stage, out.parent, args.overwrite)
    if tokenizer is None:
        print("note: no tokenizer was found beside the weights, so none is in the file", file=sys.stderr)
    print(f"{out}: try it: python 2-eval.py --weight {out}")
    return type(model).__name__, [out]


if __name__ == "__main__":
    run_main(main)
