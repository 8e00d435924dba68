"""Stage 1: learn to continue text. Raw text in, a base model out.

  in    --data_path FILE...   rows of {"text": ...}; a .txt file is one document
  out   out/pretrain_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

Every token of every document is learned from the tokens before it. Documents are packed into rows without padding and
do not see each other.

  python 1-pretrain.py                                        the embedded sample, or dataset/pretrain_hq.jsonl
  python 1-pretrain.py --data_path my.jsonl --epochs 2        your text
  torchrun --nproc_per_node 2 1-pretrain.py --batch_size 32   two GPUs
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import run_main
from data.rows import load_rows
from inference.continuations import continue_texts
from trainer.loop import train
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser

MINIMIND_FILES = ("pretrain_hq.jsonl", "pretrain_t2t_mini.jsonl", "pretrain_t2t.jsonl", "pretrain_data.csv")


def main(argv=None) -> dict:
    rates = {"muon": 4e-3, "adamw": 1e-3}  # docs/log.md, "Which optimizer"
    parser = stage_parser("pretrain", __doc__, learning_rate=rates, optimizer="muon", from_weight="none")
    args = parse(parser, argv)
    run = prepare(args, MINIMIND_FILES, sample="pretrain.jsonl")
    with join(args) as world:
        rows = load_rows("text", run.data_files, run.tokenizer, args, world)
        return train(run, rows, world, write=continue_texts)


if __name__ == "__main__":
    run_main(main)
