"""Stage 5: learn from preferences. Pairs of a better and a worse answer in, a chat model out.

  in    --data_path FILE...   rows of {"chosen": [messages], "rejected": [messages]} that differ in the last message
        --from_weight         a chat model; default: the newest full_sft_* in --out_dir or out/. A frozen copy of it is
                              the reference
  out   out/dpo_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

Direct preference optimisation (Rafailov et al. 2023): raise the log-probability of the chosen answer above that of the
rejected one, relative to the reference, whose log-probabilities are computed once, before training, and kept in
out/cache. This loss sees the difference alone: both answers may become less likely, and the model forgets. So the
cross-entropy of the chosen answer is added (--sft_weight, Pang et al. 2024, arXiv 2404.19733).

Printed, each a mean over pairs: loss (without the added part); accuracy (share of pairs whose chosen answer is more
likely; per token: by the mean over its tokens); margin (beta times how much more than the reference the policy prefers
it); kl (log reference minus log policy of an answer, in nats: an estimate of KL(reference || policy) if the reference
could have written these answers; below zero where training made them likelier). The last line adds the change of
accuracy on held-out pairs, with a 95% interval.

  python 5-dpo_train.py                                       the embedded sample, or dataset/dpo.jsonl
  python 5-dpo_train.py --data_path pairs.jsonl --beta 0.05   your pairs; less bound to the reference
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import UserError, run_main
from data.rows import load_rows
from inference.continuations import answer_questions
from trainer import losses
from trainer.loop import train
from trainer.preference import Reference, bound_to_its_start, chosen_and_rejected, pair_log_probs
from trainer.setup import held_out_files, prepare
from trainer.stage_flags import parse, stage_parser

FLAGS = ("loss", "beta", "label_smoothing", "simpo_gamma", "per_token", "sft_weight", "reference")

BOUNDS = (
    (("beta",), "be above 0", lambda x: x > 0),
    (("sft_weight",), "be at least 0", lambda x: x >= 0),
    (("label_smoothing",), "lie in [0, 0.5)", lambda x: 0 <= x < 0.5),
)


def parser():
    p = stage_parser("dpo", __doc__, learning_rate=5e-5, batch_size=4, accumulation_steps=1, weight_decay=0.01,
                     val_split=0.05)  # fmt: skip
    g = p.add_argument_group("preferences")
    g.add_argument("--loss", choices=("sigmoid", "ipo", "simpo", "orpo"), default="sigmoid",
                   help="simpo and orpo compare with no reference (sigmoid)")  # fmt: skip
    g.add_argument("--beta", type=float, default=0.1, metavar="X", help="strength of the KL penalty (0.1)")
    g.add_argument("--label_smoothing", type=float, default=0.0, metavar="SHARE",
                   help="assumed share of mislabelled pairs; sigmoid only (0)")  # fmt: skip
    g.add_argument("--simpo_gamma", type=float, default=0.5, metavar="X", help="SimPO target reward margin (0.5)")
    p.flag(g, "per_token", False, "length-normalised log-probabilities; all losses but sigmoid use them anyway")
    g.add_argument("--sft_weight", type=float, default=1.0, metavar="X",
                   help="weight of the SFT loss on the chosen answer; 0: plain DPO (1)")  # fmt: skip
    g.add_argument("--reference", choices=("cached", "live"), default="cached",
                   help="log-probabilities computed once, or by a second model at every step (cached)")  # fmt: skip
    g.add_argument("--val_path", nargs="+", metavar="FILE", help="held-out pairs, in place of --val_split's")
    p.set_defaults(recipe_flags=FLAGS, bounds=BOUNDS)
    return p


def preference_loss(args, reference):
    """The loss function: sums over pairs. reference.log_probs(batch) as in trainer.preference.Reference."""
    per_token = args.per_token or args.loss != "sigmoid"
    sft_weight = 0.0 if args.loss == "orpo" else args.sft_weight  # orpo has such a part of its own

    def loss_fn(model, batch):
        # For each answer: the sum of its tokens' log-probabilities (nats) under policy and reference, and its number of
        # tokens. A pair is two neighbouring answers of a row. All tensors below are (B, pairs of a row).
        out, log_probs, tokens = pair_log_probs(model, batch)
        chosen, rejected = chosen_and_rejected(log_probs)
        ref_chosen, ref_rejected = chosen_and_rejected(reference.log_probs(batch))
        chosen_tokens, rejected_tokens = chosen_and_rejected(tokens.clamp(min=1))
        # All rows have places for as many pairs as the fullest one; empty places must not count.
        real = chosen_and_rejected(batch["documents"])[0] >= 0
        chosen_mean, rejected_mean = chosen / chosen_tokens, rejected / rejected_tokens
        policy, ref = (chosen, rejected), (ref_chosen, ref_rejected)
        if per_token:  # by the sum, an answer is less likely just because it is longer
            policy, ref = (chosen_mean, rejected_mean), (ref_chosen / chosen_tokens, ref_rejected / rejected_tokens)
        if args.loss == "simpo":
            loss = losses.simpo_loss(*policy, args.beta, args.simpo_gamma)
        elif args.loss == "orpo":
            loss = losses.orpo_loss(*policy, args.beta)
        else:
            loss = losses.dpo_loss(*policy, *ref, args.beta, args.label_smoothing, args.loss)
        # The cross-entropy per token of the chosen answer is minus its mean log-probability.
        learned = losses.masked_sum(loss, real) - sft_weight * losses.masked_sum(chosen_mean, real)
        printed = {
            "loss": loss, "accuracy": chosen > rejected, "accuracy_per_token": chosen_mean > rejected_mean,
            "margin": args.beta * ((policy[0] - ref[0]) - (policy[1] - ref[1])),
            "kl": (ref_chosen + ref_rejected - (chosen + rejected)) / 2,
        }  # fmt: skip
        numbers = {name: losses.masked_sum(x.detach().float(), real) for name, x in printed.items()}
        return learned, real.sum(), numbers, out.aux_loss

    return loss_fn


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    if args.label_smoothing and args.loss != "sigmoid":
        raise UserError(f"--label_smoothing belongs to --loss sigmoid, not to {args.loss}")
    run = bound_to_its_start(prepare(args, ("dpo.jsonl",), sample="dpo.jsonl", before=("full_sft",), required=True))
    reference = Reference(run)
    val_files = held_out_files(run, sample="dpo.jsonl", held_out="dpo_heldout.jsonl")
    with join(args) as world:
        rows = load_rows("pair", run.data_files, run.tokenizer, args, world, val_files)
        reference.ready(rows, world)  # before training: of a new run, run.model is still the reference itself
        run, loss_fn = run.using(reference.parameters), preference_loss(args, reference)
        report = reference.report(rows[1], world)
        return train(run, rows, world, loss_fn, report, bits_per_byte=False, write=answer_questions)


if __name__ == "__main__":
    run_main(main)
