"""Reasoning: learn to think before answering, from a larger model's worked answers. A model that thinks aloud out.

  in    --data_path FILE...   conversations whose replies are <think>...</think><answer>...</answer>, or carry their
                              thinking under "reasoning_content"
        --from_weight         a chat model; default: the newest dpo_* or full_sft_* in --out_dir or out/
  out   out/reason_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

This is SFT with two additions. A token of a tag in the assistant's turn counts --tag_weight times in the sum of the
loss (the divisor stays the number of learned tokens): four tokens of an answer decide whether it is well-formed. And
only --think_ratio of the rows keep their thinking, the others get an empty block: the model learns to answer without
thinking as well, when it is told to. Printed: ce, the loss without weights.

  python train_distill_reason.py                              the embedded sample, or dataset/r1_mix_1024.jsonl
  python train_distill_reason.py --data_path traces.jsonl --think_ratio 0.8
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
import torch

from common.errors import UserError, run_main
from data.rows import load_rows
from data.thinking import REASONING_TAGS
from trainer.loop import inputs, learned_targets, train
from trainer.losses import weighted_sum
from trainer.setup import prepare
from trainer.stage_flags import parse, stage_parser

BOUNDS = (
    (("tag_weight",), "be above 0", lambda x: x > 0),
    (("think_ratio",), "lie in [0, 1]", lambda x: 0 <= x <= 1),
)


def parser():
    p = stage_parser("reason", __doc__, learning_rate=1e-3, epochs=3.0, batch_size=4, accumulation_steps=1,
                     weight_decay=0.01)  # fmt: skip
    g = p.add_argument_group("reasoning")
    g.add_argument("--tag_weight", type=float, default=10.0, metavar="X",
                   help="how often <think>, </think>, <answer>, </answer> count in the loss (10)")  # fmt: skip
    g.add_argument("--think_ratio", type=float, default=1.0, metavar="SHARE",
                   help="of rows that keep their thinking (1)")  # fmt: skip
    p.set_defaults(recipe_flags=("tag_weight", "think_ratio"), bounds=BOUNDS)
    return p


def token_weights(tokenizer, vocab_size: int, tag_weight: float) -> torch.Tensor:
    """(V,): tag_weight for the tags, 1 for all else."""
    vocabulary = tokenizer.get_vocab()
    missing = [tag for tag in REASONING_TAGS if tag not in vocabulary]
    if missing and tag_weight != 1:
        raise UserError(f"{' '.join(missing)} is no token of this vocabulary and has no weight of its own; "
                        "use --tag_weight 1")  # fmt: skip
    weights = torch.ones(vocab_size)
    weights[[vocabulary[tag] for tag in REASONING_TAGS if tag not in missing]] = tag_weight
    return weights


def tagged_language_model(token_weight: torch.Tensor):
    """The loss function: sums over the learned tokens."""

    def loss_fn(model, batch):
        out = model(**inputs(batch), labels=batch["labels"], reduction="none")
        loss = weighted_sum(out.loss, batch["labels"], token_weight)
        return loss, learned_targets(batch["labels"]), {"ce": out.loss.detach().sum()}, out.aux_loss

    return loss_fn


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    files = ("r1_mix_1024.jsonl",)
    run = prepare(args, files, sample="reason.jsonl", before=("full_sft", "dpo"), required=True)
    weights = token_weights(run.tokenizer, run.model.config.vocab_size, args.tag_weight)
    share = None if args.think_ratio == 1 else args.think_ratio
    with join(args) as world:
        rows = load_rows("chat", run.data_files, run.tokenizer, args, world, think_share=share)
        return train(run, rows, world, tagged_language_model(weights.to(world.device)))


if __name__ == "__main__":
    run_main(main)
