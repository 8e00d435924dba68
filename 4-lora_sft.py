"""Stage 4: fine-tune a finished model at low cost. Conversations in, a small adapter out.

  in    --data_path FILE...   rows of {"conversations": [{"role", "content"}, ...]}
        --from_weight         a chat model; default: the newest full_sft_* in --out_dir or out/. It is not changed
  out   out/lora/<name>_<dim>.pth  (the adapter, and which weights it belongs to), .jsonl (every step), .png (curve)
        --peft_dir FOLDER     the adapter once more, as the peft library reads it

Low-rank adaptation (Hu et al. 2021): a product B A of low rank is added to each frozen matrix W, and only A and B are
trained. See model/lora.py. Other programs take the adapter's file like any weights:
`python 2-eval.py --weight out/lora/lora_identity_512.pth` loads the model under it and adds it.

  python 4-lora_sft.py                                        the embedded sample, or dataset/lora_identity.jsonl
  python 4-lora_sft.py --data_path medical.jsonl --rank 16    your own; <name> is the file's, or --save_weight
  python 4-lora_sft.py --data_path medical.jsonl chats.jsonl  ordinary conversations beside it, or it forgets the rest
  python 4-lora_sft.py --targets q_proj v_proj experts        which layers: see model.lora.matches
"""

import re
from pathlib import Path

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import UserError, run_main, user_errors
from data.reading import raw_rows
from data.rows import load_rows
from model.lora import PROJECTIONS, LoraConfig, add_lora, load_lora
from model.peft_folder import check_peft, save_peft
from model.weights import load_model
from trainer.loop import train
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser

MINIMIND_FILES = ("lora_identity.jsonl", "lora_medical.jsonl")
PLACEHOLDER = re.compile(r"\{\{(name|author)\}\}")


def parser():
    p = stage_parser("lora", __doc__, save_weight=None, learning_rate=2e-3, epochs=10.0, batch_size=4,
                     accumulation_steps=1, weight_decay=0.0, val_split=0.05)  # fmt: skip
    g = p.add_argument_group("adapter")
    g.add_argument("--rank", type=int, default=8, metavar="N", help="rank of the update (8)")
    g.add_argument("--alpha", type=float, default=16.0, metavar="X", help="the update is scaled by alpha / rank (16)")
    g.add_argument("--lora_dropout", type=float, default=0.0, metavar="SHARE", help="of its input, in training (0)")
    g.add_argument(
        "--targets",
        nargs="+",
        default=list(PROJECTIONS),
        metavar="LAYER",
        help="ends of layers' names, or patterns with * (all projections of attention and feed-forward)",
    )
    p.flag(g, "lora_experts", False, "adapt each routed expert as well; the same as the target `experts`")
    g.add_argument("--peft_dir", metavar="FOLDER", help="write the adapter for the peft library too")
    g.add_argument("--lora_name", dest="save_weight", metavar="NAME", help="MiniMind's name of --save_weight")
    p.set_defaults(recipe_flags=("rank", "alpha", "lora_dropout", "targets"), subfolder="lora")
    return p


def refuse_placeholders(path) -> None:
    """Raises UserError where a placeholder is left: a model trained on it would call itself {{name}}."""
    for number, row in raw_rows(path):
        if found := PLACEHOLDER.search(str(row)):
            command = f"python data_process.py fill {path} --set {found[1]}=... --out FILE"
            raise UserError(f"{path}:{number}: the placeholder {found[0]} is not filled in; `{command}` does it")


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    args.targets = [*args.targets, "experts"] if args.lora_experts else args.targets
    with user_errors():
        config = LoraConfig(args.rank, args.alpha, args.lora_dropout, args.targets)

    def adapt(model):
        if args.peft_dir:
            check_peft(model, config)
            try:
                Path(args.peft_dir).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--peft_dir {args.peft_dir}: cannot write the folder ({error.strerror})") from None
        add_lora(model, config.rank, config.alpha, config.dropout, config.targets)

    run = prepare(args, MINIMIND_FILES, "lora_domain.jsonl", before=("full_sft",), required=True, adapt=adapt)
    for path in run.data_files:
        refuse_placeholders(path)
    with join(args) as world:
        result = train(run, load_rows("chat", run.data_files, run.tokenizer, args, world), world)
        if args.peft_dir and world.first and not args.dry_run:
            model = load_model(run.came_from, args.preset)[0]  # loaded again: under ZeRO 3 no process has all of it
            load_lora(model, result["weights"], "trained")
            save_peft(args.peft_dir, model, base=run.came_from)
    return result


if __name__ == "__main__":
    run_main(main)
