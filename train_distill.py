"""White-box distillation: a small model learns from a large model's probabilities, not only from its text.

  in    --data_path FILE...   rows of {"conversations": [...]}; with --rows text rows of {"text": ...}
        --teacher             a model with the same tokenizer; default: the newest chat weights in --out_dir or out/
        --from_weight         the student; default: the shape that --preset and the shape flags name, random; without
                              those every second layer of the teacher. Dense and expert models teach each other
  out   out/full_dist_<dim>.pth  (weights, config, tokenizer), .jsonl (every step), .png (curve)

The loss of a token is alpha * cross-entropy + (1 - alpha) * T^2 * KL(teacher || student) at temperature T (Hinton et
al. 2015); other divergences by --kl, see trainer.losses.kd_loss. Black-box distillation needs no stage: let
`data_process.py distill` ask a teacher for answers and train on them with 3-full_sft.py.

  python train_distill.py                                                   half the layers of your newest chat model
  python train_distill.py --teacher out/full_sft_768.pth --preset minimind2-small --epochs 3
  python train_distill.py --teacher big.pth --rows text --data_path corpus.jsonl --kl reverse
"""

from trainer.world import join  # first: it says how torch's threads wait

# isort: split
import torch

from common.errors import UserError, run_main
from data.rows import load_rows
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer
from model.tokenizer_files import tokenizer_hash
from model.weights_file import FREE_FIELDS, fingerprint
from trainer.loop import inputs, train
from trainer.losses import distillation_sums
from trainer.setup import Weights, find_frozen, load_weights, prepare, random_model, shape_flags
from trainer.stage_flags import parse, stage_parser

MINIMIND_FILES = ("sft_mini_512.jsonl", "sft_t2t_mini.jsonl", "sft_512.jsonl")

BOUNDS = (
    (("alpha",), "lie in [0, 1]", lambda x: 0 <= x <= 1),
    (("skew",), "lie in (0, 1)", lambda x: 0 < x < 1),
    (("temperature",), "be above 0", lambda x: x > 0),
)


def parser():
    p = stage_parser("full_dist", __doc__, learning_rate=1e-3, epochs=2.0, accumulation_steps=1, weight_decay=0.01)
    g = p.add_argument_group("distillation")
    g.add_argument("--teacher", "--from_teacher_weight", metavar="PATH|STAGE", help="see above")
    g.add_argument("--alpha", type=float, default=0.5, metavar="SHARE", help="of the cross-entropy (0.5)")
    g.add_argument("--temperature", type=float, default=1.5, metavar="T", help="softens both models' choices (1.5)")
    g.add_argument("--kl", choices=("forward", "reverse", "skewed"), default="forward", help="divergence (forward)")
    g.add_argument("--skew", type=float, default=0.1, metavar="SHARE",
                   help="of the teacher in what the skewed divergence compares with (0.1)")  # fmt: skip
    g.add_argument("--rows", choices=("chat", "text"), default="chat", help="what the data is (chat)")
    p.set_defaults(recipe_flags=("alpha", "temperature", "kl", "skew", "rows"), bounds=BOUNDS)
    return p


def new_student(args, teacher):
    """-> (student, its origin in words), for a student that has no file."""
    given = shape_flags(args)
    if args.preset or given.keys() - set(FREE_FIELDS):
        return random_model(args, teacher.config.vocab_size), "random (from nothing)"
    torch.manual_seed(args.seed)
    half = {"n_layers": max(1, teacher.config.n_layers // 2)}
    student = MiniMindForCausalLM(LMConfig(**(teacher.config.fields() | half | given)))
    if args.from_weight == "none":
        return student, "random (from nothing)"
    student.load_state_dict(teacher.state_dict(), strict=False)  # embedding, final norm, head
    for i, layer in enumerate(student.model.layers):
        layer.load_state_dict(teacher.model.layers[2 * i].state_dict())
    return student, "every second layer of the teacher"


def distillation(args, teacher):
    """The loss function: sums over the learned tokens."""

    def loss_fn(model, batch):
        out = model(**inputs(batch))
        with torch.no_grad():
            hidden = teacher.model(**inputs(batch)).last_hidden_state
        ce, kd, count = distillation_sums(
            out.logits, hidden, teacher.lm_head, batch["labels"], args.temperature, args.kl, args.skew,
            n=int(batch["count"]),
        )  # fmt: skip
        loss = args.alpha * ce + (1 - args.alpha) * kd
        return loss, count, {"ce": ce.detach(), "kd": kd.detach()}, out.aux_loss

    return loss_fn


def main(argv=None) -> dict:
    args = parse(parser(), argv)
    path = find_frozen(args, "teacher", args.teacher, before=("full_sft", "dpo"))
    teacher, tokenizer, _ = load_weights(path)
    tokenizer = tokenizer or load_tokenizer(args.tokenizer)
    files = MINIMIND_FILES if args.rows == "chat" else ("pretrain_hq.jsonl", "pretrain_t2t_mini.jsonl")

    def make():
        student, came_from = new_student(args, teacher)
        return Weights(student, tokenizer, came_from, {})

    run = prepare(args, files, "sft.jsonl" if args.rows == "chat" else "pretrain.jsonl", make=make)
    widths = run.model.config.vocab_size, teacher.config.vocab_size
    if tokenizer_hash(run.tokenizer) != tokenizer_hash(tokenizer) or widths[0] != widths[1]:
        raise UserError(f"the teacher {path} has another vocabulary than the student: their words cannot be compared")
    run.files.check_apart(path)
    run = run.using(teacher.num_parameters(), paths={"teacher": str(path)}, teacher=fingerprint(teacher))
    with join(args) as world:
        teacher.requires_grad_(False).to(world.device)
        rows = load_rows(args.rows, run.data_files, run.tokenizer, args, world)
        return train(run, rows, world, distillation(args, teacher))


if __name__ == "__main__":
    run_main(main)
