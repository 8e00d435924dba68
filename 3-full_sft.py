"""Stage 3: learn to answer. Conversations in, a chat model out.

  in    --data_path FILE...   rows of {"conversations": [{"role", "content"}, ...]}, or MiniMind v1's CSV columns
        --from_weight         a base model; default: the newest pretrain_* in --out_dir or out/
  out   out/full_sft_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

Only what the assistant says is learned, and the token that ends its turn. A conversation longer than a row goes on in
the next one at the border of a turn.

  python 3-full_sft.py                                        the embedded sample, or dataset/sft_mini_512.jsonl
  python 3-full_sft.py --data_path chats.jsonl --epochs 3     your conversations
MiniMind v1's two steps, short questions first:
  python 3-full_sft.py --data_path single.csv --out_dir out/single_chat
  python 3-full_sft.py --data_path multi.csv --from_weight out/single_chat/full_sft_512.pth
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import run_main
from data.rows import load_rows
from inference.continuations import answer_questions
from trainer.loop import train
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser

MINIMIND_FILES = ("sft_mini_512.jsonl", "sft_t2t_mini.jsonl", "sft_512.jsonl", "sft_data_single.csv", "sft_data.csv")


def main(argv=None) -> dict:
    parser = stage_parser("full_sft", __doc__, learning_rate=5e-4, epochs=2.0, weight_decay=0.01)
    args = parse(parser, argv)
    run = prepare(args, MINIMIND_FILES, sample="sft.jsonl", before=("pretrain",))
    with join(args) as world:
        rows = load_rows("chat", run.data_files, run.tokenizer, args, world)
        return train(run, rows, world, write=answer_questions)


if __name__ == "__main__":
    run_main(main)
