"""Stage 5: learn what is liked better. Pairs of answers in, a chat model out that prefers as they do.

  in    --data_path FILE...   rows of {"chosen": [messages], "rejected": [messages]} that differ in the last message
        --from_weight         a chat model; default: the newest full_sft_* in --out_dir or out/. Its copy, frozen, is
                              the reference that the loss compares with
  out   out/dpo_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

Direct preference optimisation (Rafailov et al. 2023): raise the chosen answer's log-probability over the rejected
one's, compared with the reference. The reference is computed once, before training, and kept in out/cache. Alone this
lowers the probability of both answers, and of what the model knew; the chosen one's cross-entropy beside it
(--sft_weight, Pang et al. 2024, arXiv 2404.19733) holds them up.

Printed, each a mean over pairs: loss (without that part), accuracy (the chosen answer is the likelier one; per token:
by the mean over its tokens), margin (beta times what the policy prefers it more than the reference), kl (log reference
minus log policy of an answer, in nats: KL(reference || policy) as far as these answers are such as the reference
writes; below zero where training made them likelier). The last line adds how accuracy on held-out pairs changed, with
its 95% interval.

  python 5-dpo_train.py                                       the embedded sample, or dataset/dpo.jsonl
  python 5-dpo_train.py --data_path pairs.jsonl --beta 0.05   your pairs; less bound to the reference
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import UserError, run_main
from data.reading import check_file
from trainer import losses
from trainer.loop import train
from trainer.preference import Reference, pair_log_probs
from trainer.setup import SAMPLE, prepare
from trainer.stage_flags import parse, stage_parser

FLAGS = ("loss", "beta", "label_smoothing", "simpo_gamma", "per_token", "sft_weight", "reference")


def parser():
    p = stage_parser(
        "dpo", __doc__, learning_rate=5e-5, batch_size=4, accumulation_steps=1, weight_decay=0.01, val_split=0.05
    )
    g = p.add_argument_group("preferences")
    g.add_argument("--loss", choices=("sigmoid", "ipo", "simpo", "orpo"), default="sigmoid",
                   help="simpo and orpo compare with no reference (sigmoid)")  # fmt: skip
    g.add_argument("--beta", type=float, default=0.1, metavar="X", help="how dear leaving the reference is (0.1)")
    g.add_argument("--label_smoothing", type=float, default=0.0, metavar="SHARE",
                   help="share of pairs thought to be swapped; sigmoid only (0)")  # fmt: skip
    g.add_argument("--simpo_gamma", type=float, default=0.5, metavar="X", help="margin that simpo asks for (0.5)")
    p.flag(g, "per_token", False, "compare log-probabilities a token, not summed; all but sigmoid always do")
    g.add_argument("--sft_weight", type=float, default=1.0, metavar="X",
                   help="of the chosen answer's cross-entropy a token beside the loss; 0: plain DPO (1)")  # fmt: skip
    g.add_argument("--reference", choices=("cached", "live"), default="cached",
                   help="live: a second model in memory at every step (cached)")  # fmt: skip
    g.add_argument("--val_path", nargs="+", metavar="FILE", help="held-out pairs, in place of --val_split's")
    p.set_defaults(recipe_flags=FLAGS)
    return p


def check(args) -> None:
    if not args.beta > 0:
        raise UserError(f"--beta must be above 0, not {args.beta}")
    if args.sft_weight < 0:
        raise UserError(f"--sft_weight must not be negative, but is {args.sft_weight}")
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing must lie in [0, 0.5), not {args.label_smoothing}")
    if args.label_smoothing and args.loss != "sigmoid":
        raise UserError(f"--label_smoothing belongs to --loss sigmoid, not to {args.loss}")


def preference_loss(args, reference):
    """The loss function: sums over pairs."""
    per_token = args.per_token or args.loss != "sigmoid"
    sft_weight = 0.0 if args.loss == "orpo" else args.sft_weight  # orpo has such a part of its own

    def loss_fn(model, batch):
        out, log_probs, counts = pair_log_probs(model, batch)  # (B, S): chosen, rejected, chosen, rejected, ...
        frozen = reference.log_probs(batch)
        real = batch["documents"][:, ::2] >= 0  # (B, S / 2); a row has as many places for pairs as the fullest one
        *sums, tokens = [(x[:, ::2], x[:, 1::2]) for x in (log_probs, frozen, counts.clamp(min=1))]
        means = [(chosen / tokens[0], rejected / tokens[1]) for chosen, rejected in sums]
        policy, ref = means if per_token else sums
        if args.loss == "simpo":
            loss = losses.simpo_loss(*policy, args.beta, args.simpo_gamma)
        elif args.loss == "orpo":
            loss = losses.orpo_loss(*policy, args.beta)
        else:
            loss = losses.dpo_loss(*policy, *ref, args.beta, args.label_smoothing, args.loss)
        learned = losses.masked_sum(loss, real) - sft_weight * losses.masked_sum(means[0][0], real)
        learned, numbers = losses.with_balance(learned, out, batch)
        more = {
            "accuracy": sums[0][0] > sums[0][1],
            "accuracy_per_token": means[0][0] > means[0][1],
            "margin": args.beta * ((policy[0] - ref[0]) - (policy[1] - ref[1])),
            "kl": (sum(sums[1]) - sum(sums[0])) / 2,
        }
        for name, values in {"loss": loss, **more}.items():
            numbers[name] = losses.masked_sum(values.detach().float(), real)
        return learned, real.sum(), numbers

    return loss_fn


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    check(args)
    start = prepare(args, ("dpo.jsonl",), sample="dpo.jsonl", before=("full_sft",), required=True)
    start.bytes_of_token = None  # the loss is not that of a text
    reference = Reference(start)
    sampled = start.data_files == [SAMPLE / "dpo.jsonl"]
    val_files = [check_file(f) for f in args.val_path or ([SAMPLE / "dpo_heldout.jsonl"] if sampled else [])]
    with join(args) as world:
        rows = start.packed("pair", world, val_files)
        reference.ready(rows, world)
        return train(start, rows, preference_loss(args, reference), world, reference.report(rows[1], world))


if __name__ == "__main__":
    run_main(main)
