"""GRPO: reinforcement learning on questions whose answers can be checked.

  in    --data_path FILE...   {"question": ..., "answer": ...}, or worked examples with <answer>...</answer>
        --from_weight         a reasoning model; default: the newest reason_* in --out_dir or out/
  out   out/grpo_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve),
        _samples.jsonl (all answers to one question with their rewards, at the first step and at each validation)

Each question is answered --group times, sampled from softmax(logits / temperature). An answer's reward is 1 where it is
right, plus --format_reward where it is one <think> block and one <answer> block. Its advantage is how far the reward is
above the mean of its group. The loss (trainer/losses.py) raises the probability of answers above the mean and lowers
that of the others, as far as --clip allows in --inner_steps updates, and keeps the model near the starting one (--kl).
A step is --batch_size x --accumulation_steps x processes answers; --seq_len bounds question and answer together.

Printed: means over a step's sampled answers (reward, well_formed, right, truncated, length); learning_groups, the share
of groups whose rewards differ; clip_share, the share of tokens the clip holds; kl, in nats a token. Validation: exact
match of greedy answers to held-out questions.

  python train_grpo.py                                   the embedded sample's arithmetic
  python train_grpo.py --data_path questions.jsonl --group 16 --temperature 0.8 --max_new_tokens 256
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
from common.errors import UserError, run_main
from inference.continuations import answer_questions
from inference.engine import Engine
from inference.sampling import SamplingParams
from inference.stream_text import text_with_markers
from trainer import grpo
from trainer.deepspeed_config import read_config
from trainer.preference import bound_to_its_start, frozen_copy, starting_model
from trainer.problems import fingerprints, load_problems
from trainer.setup import held_out_files, prepare
from trainer.stage_flags import parse, stage_parser

FLAGS = ("group", "temperature", "max_new_tokens", "kl", "clip", "inner_steps", "format_reward")

BOUNDS = (
    (("group",), "be at least 2", lambda x: x >= 2),  # an answer is compared with the others of its group
    (("inner_steps",), "be at least 1", lambda x: x >= 1),
    (("temperature",), "be above 0", lambda x: x > 0),  # without chance a group would be one answer
    (("clip",), "lie in (0, 1)", lambda x: 0 < x < 1),
    (("kl", "format_reward"), "be at least 0", lambda x: x >= 0),
)


def parser():
    p = stage_parser("grpo", __doc__, seq_len=256, batch_size=32, accumulation_steps=4, learning_rate=2e-5,
                     weight_decay=0.0, val_split=0.05)  # fmt: skip
    g = p.add_argument_group("reinforcement")
    g.add_argument("--group", type=int, default=8, metavar="N", help="answers to each question (8)")
    g.add_argument("--temperature", type=float, default=1.0, metavar="X", help="of the sampling (1)")
    g.add_argument("--max_new_tokens", type=int, default=128, metavar="N", help="longest answer (128)")
    g.add_argument("--kl", type=float, default=0.01, metavar="X",
                   help="coefficient of the KL penalty towards the starting model (0.01)")  # fmt: skip
    g.add_argument("--clip", type=float, default=0.2, metavar="X",
                   help="PPO clip range (0.2)")  # fmt: skip
    g.add_argument("--inner_steps", type=int, default=2, metavar="N",
                   help="updates from the same answers; the clip matters from the second on (2)")  # fmt: skip
    g.add_argument("--format_reward", type=float, default=0.2, metavar="X",
                   help="for a well-formed answer, beside 1 for a right one (0.2)")  # fmt: skip
    g.add_argument("--val_path", nargs="+", metavar="FILE", help="held-out questions, in place of --val_split's")
    # No dropout, even if the starting weights were trained with it: see check().
    p.set_defaults(recipe_flags=FLAGS, bounds=BOUNDS, dropout=0.0)
    return p


def check(args) -> None:
    if not 1 <= args.max_new_tokens < args.seq_len:
        raise UserError(f"--max_new_tokens must lie between 1 and --seq_len {args.seq_len}, not {args.max_new_tokens}")
    if args.deepspeed and read_config(args.deepspeed).get("zero_optimization", {}).get("stage") == 3:
        raise UserError(f"{args.deepspeed}: ZeRO stage 3 leaves no process whole weights to sample from; use stage 2")
    if args.dropout:
        raise UserError("--dropout has no place here: the network that learns must be the one that was sampled")


def sampler(tokenizer, max_new_tokens: int):
    """The engine's rollout, as trainer.grpo.train asks for it."""

    def rollout(model, prompts, seeds, temperature):
        params = [SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed) for seed in seeds]
        completions = Engine(model, tokenizer, max_batch=128).generate(prompts, params)
        for completion in completions:  # the judge sees all that was generated, special tokens too
            completion.text = text_with_markers(tokenizer, completion)
        return completions

    return rollout


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    check(args)
    run = prepare(args, sample="reason.jsonl", before=("reason",), required=True)
    val_files = held_out_files(run, sample="reason.jsonl", held_out="reason_heldout.jsonl")
    problems, held_out = load_problems(run.data_files, run.tokenizer, args, val_files)
    # The questions are part of the recipe by their digest: no token cache names them.
    run, reference = run.using(**fingerprints(problems, held_out)), None
    if args.kl:  # without the KL penalty no second model is needed in memory
        run = bound_to_its_start(run)
        reference = frozen_copy(starting_model(run))
        run = run.using(reference.num_parameters())
    with join(args) as world:
        if reference is not None:
            reference.to(world.device)
        rollout = sampler(run.tokenizer, args.max_new_tokens)
        return grpo.train(run, problems, held_out, reference, rollout, world, write=answer_questions)


if __name__ == "__main__":
    run_main(main)
