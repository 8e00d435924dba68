"""The course agrees with the code and with its records, and its small programs compute what they say."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from stage import ROOT, load
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from course import checks, pages
from exams import exam, exam_report
from figures.records import record_of, result_of
from inspection.trace import trace
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from trainer import losses

CODE = ROOT / "docs" / "course" / "code"


def test_every_page_is_what_the_code_and_the_records_say():
    assert pages.stale() == []


def test_sections_twins_commands_links_and_pictures_hold():
    assert checks.faults() == []


# -------------------------------------------------------------------------------------------- the machinery notices
def page(name="01-bigram.md") -> tuple:
    path = pages.COURSE / name
    return path, path.read_text(encoding="utf-8")


def test_a_quote_a_number_and_an_output_are_written_anew():
    path, text = page()
    loss = f"{result_of('bigram')['losses']['200']:.2f}<!-- = bigram losses.200 .2f -->"
    for old, new in ((loss, loss.replace(".", "9.", 1)), ("logsumexp", "logsum"), ("by counting: loss", "loss")):
        assert old in text
        spoiled = text.replace(old, new)
        assert spoiled != text and pages.filled(spoiled, path) == text


def test_a_quote_can_begin_and_end_at_a_line_and_leave_out_the_docstring():
    whole = pages.quote("model/moe.py FeedForward.forward")
    assert whole.splitlines()[2] == "def forward(self, x: Tensor) -> Tensor:"
    part = pages.quote('model/moe.py route from="if normalise and" to="weight / weight.detach"')
    assert part.splitlines()[2:-1] == ["if normalise and k == 1:", "    weight = weight / weight.detach()"]
    assert '"""' not in pages.quote('model/moe.py route without="docstring"')


@pytest.mark.parametrize(
    ("directive", "message"),
    [
        ("model/nothing.py f", "no file"),
        ("model/moe.py Router", "has no Router"),
        ('model/moe.py route from="gone"', "no line with 'gone'"),
        ("model/LMConfig.py LMConfig", "more than"),
    ],
)
def test_a_quote_that_is_gone_is_named(directive, message):
    with pytest.raises(pages.UserError, match=message):
        pages.quote(directive)


def test_a_long_output_loses_its_middle_and_names_how_much():
    lines = record_of("next_char")["output"].splitlines()
    block = pages.output_block("next_char", 3, 1).splitlines()
    assert block[1:4] == lines[:3]
    assert block[4] == f"... ({len(lines) - 4} lines)"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python 1-pretrain.py --data_path dataset/sample/pretrain.jsonl --epochs 2", None),
        ("python 1-pretrain.py --epochs 2", "names no data"),
        ("python 1-pretrain.py --epoch_count 2", "epoch_count"),
        ("python 9-nothing.py", "no file"),
        ("python -m model.Nothing", "no module"),
        ("python data_process.py sample --seeds 3", "seeds"),
        ("git clone REPOSITORY_URL", None),
    ],
)
def test_commands_meet_the_programs_own_parser(command, fault):
    found = checks.of_command(command)
    assert found is None if fault is None else fault in found


def test_what_a_twin_or_a_chapter_lacks_is_named():
    path, text = page()
    assert checks.of_page(path, text) == [] and checks.of_chapter(text, "en") == []
    assert "other formulas" in checks.of_page(path, text.replace("\\eta \\,", "\\eta"))[0]
    assert "other commands" in " ".join(checks.of_page(path, text.replace("--steps 300", "--steps 301")))
    assert "no section 'Formula'" in checks.of_chapter(text.replace("## Formula", "## Sums"), "en")[0]
    assert "two exercises" in checks.of_chapter(text.replace("<details>", "", 1), "en")[0]


# -------------------------------------------------------------------------------------------------- small programs
def test_the_bigram_s_gradient_is_autograd_s_and_leads_to_the_counts():
    bigram = load("docs/course/code/bigram.py")
    torch.manual_seed(0)
    pairs = torch.randint(5, (64, 2))
    W = torch.randn(5, 5, requires_grad=True)
    wanted = torch.autograd.grad(bigram.loss_of(W, pairs), W)[0]
    torch.testing.assert_close(bigram.gradient_by_hand(W.detach(), pairs), wanted)

    assert bigram.loss_of(torch.zeros(5, 5), pairs).item() == pytest.approx(math.log(5))
    W = torch.zeros(5, 5)
    for _ in range(2000):
        W -= 5 * bigram.gradient_by_hand(W, pairs)
    assert bigram.loss_of(W, pairs).item() == pytest.approx(bigram.counted(pairs, 5), abs=2e-3)


def test_byte_pairs_are_merged_as_the_library_merges_them():
    bpe = load("docs/course/code/bpe.py")
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3, "太阳系": 9, "太阳": 4}
    learned, cut = bpe.learn_merges(Counter(words), 12)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 12, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([" ".join([word] * n) for word, n in words.items()], trainer)
    for (tokens, _), word in zip(cut, words, strict=True):
        # As many pieces, of the same lengths: a letter of the library's tokens stands for a byte.
        assert [len(token) for token in tokens] == [len(token) for token in library.encode(word).tokens], word
        assert bpe.encode_steps(word, [pair for pair, _ in learned])[-1] == tokens


def test_counted_contexts_give_the_next_character():
    next_char = load("docs/course/code/next_char.py")
    assert next_char.count_next(["abab", "abc"], 2) == {"ab": Counter("ac"), "ba": Counter("b")}


def test_what_is_written_into_the_stream_adds_up_to_what_leaves_it():
    stream = load("docs/course/code/stream.py")
    for extra in ({}, {"use_moe": True}):
        model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50, **extra)).eval()
        traced = trace(model, [3, 7, 9])
        parts = stream.written(traced)
        assert [name for name, _ in parts][:2] == ["embedding", "layer 0 attention"] and len(parts) == 5
        final = sum(update for _, update in parts)
        p = traced.logits[-1].softmax(-1)
        assert stream.guess(model, final) == (p.argmax().item(), pytest.approx(p.max().item(), rel=1e-5))


def test_attention_by_hand_is_the_models_own():
    attention = load("docs/course/code/attention.py")
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50)).eval()
    traced = trace(model, [3, 7, 9, 4])
    _, weights, read = attention.attend_by_hand(*attention.queries_keys_values(model, traced.residuals[1], 1))
    torch.testing.assert_close(weights, traced.attention[1])
    with torch.no_grad():
        written = model.model.layers[1].self_attn.o_proj(read.transpose(0, 1).flatten(1))
    torch.testing.assert_close(written, traced.attended[1])


def test_a_rotated_score_depends_on_the_distance_alone():
    result = load("docs/course/code/rotation.py").main(["--preset", "minimind2-small"])
    scores = result["scores"]
    assert scores["5,2"] == pytest.approx(scores["105,102"], abs=1e-3) and abs(scores["5,2"] - scores["5,4"]) > 0.1
    assert result["plain"] < 1e-5 < result["rotated"]


def test_norm_and_experts_by_hand_are_the_models_own():
    result = load("docs/course/code/experts.py").main(["--preset", "minimind2-moe", "--tokens", "8"])
    assert max(result["difference"].values()) < 1e-5 and sum(result["load"]) == 8 * 2
    assert result["balance"]["even"] == pytest.approx(1) and result["balance"]["same_two"] == pytest.approx(2)


def test_dpo_by_hand_is_the_trainers_own():
    preference = load("docs/course/code/preference.py")
    model, tokenizer = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=1)).eval(), load_tokenizer()
    messages = [{"role": "user", "content": "1+1=？"}, {"role": "assistant", "content": "2"}]
    ids, mask = map(torch.tensor, render(tokenizer, messages))
    with torch.no_grad():
        nats = model(ids[None], labels=torch.where(mask == 1, ids, -100)[None], reduction="none").loss
    assert preference.log_prob_by_hand(model, tokenizer, messages) == pytest.approx(-nats.sum().item(), rel=1e-5)
    # The numbers of the exercise: the first policy makes both answers likelier, the second both less likely.
    for policy, margin, kl, loss in (((-14.0, -17.0), 0.5, -3.5, 0.4741), ((-26.0, -31.0), 0.7, 9.5, 0.4032)):
        ours = preference.dpo_by_hand(policy, (-20.0, -18.0), 0.1)
        assert (ours["margin"], ours["kl"], ours["loss"]) == pytest.approx((margin, kl, loss), abs=1e-4)
        four = (torch.tensor(x) for x in (*policy, -20.0, -18.0))
        assert losses.dpo_loss(*four, 0.1).item() == pytest.approx(loss, abs=1e-4)


def test_a_student_s_gradient_is_what_it_says_minus_what_the_teacher_says():
    distil = load("docs/course/code/distil.py")
    student, teacher = torch.randn(7, requires_grad=True), torch.randn(7)
    for temperature in (1.0, 2.5):
        wanted = torch.autograd.grad(losses.divergence(student[None], teacher[None], temperature), student)[0]
        by_hand = distil.gradient_by_hand(student.detach(), teacher, temperature)
        torch.testing.assert_close(by_hand, wanted, rtol=1e-4, atol=1e-6)


def test_a_loose_rule_is_cheated_and_the_gradient_is_grpo_s():
    cheat = load("docs/course/code/cheat.py")
    rewards = torch.tensor([[1.2, 1.2, 0.2, 0.2, 0.2, 0.2, 0, 0], [0.2] * 6 + [0, 0]])  # the exercise's two groups
    by_hand = cheat.advantages_by_hand(rewards)
    torch.testing.assert_close(by_hand, losses.group_advantages(rewards))
    torch.testing.assert_close(by_hand[:, [0, -1]], torch.tensor([[1.595, -0.798], [0.539, -1.618]]), rtol=0, atol=2e-3)
    tokens, mask = torch.tensor([[3, 7, 10], [7, 10, 7]]), torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    found = cheat.judged(tokens, mask, torch.tensor([7, 7]))
    assert found["loose"].tolist() == [1, 1] and found["strict"].tolist() == [0, 1]
    torch.manual_seed(0)
    rows, difference, _ = cheat.train("loose", steps=20, group=8, rate=0.3)
    assert difference < 1e-7
    assert rows[-1]["loose"] > rows[0]["loose"] + 0.2 and rows[-1]["strict"] < 0.15
    assert rows[-1]["length"] > rows[0]["length"]


def test_sums_without_a_carry_are_kept_and_their_steps_dropped(tmp_path):
    sums = load("docs/course/code/sums.py")
    totals = {"用竖式算出23+11的结果。": 34, "27+15=？": None, "61+52=？": 113, "12+5=？": None, "23-11=？": None}
    assert {question: sums.sum_without_carry(question) for question in totals} == totals
    sums.main(["--data_path", str(ROOT / "dataset/sample/reason.jsonl"), "--out", str(tmp_path / "sums.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "sums.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 100 and all(set(row) == {"question", "answer"} for row in rows)
    assert all(sums.sum_without_carry(row["question"]) == int(row["answer"]) for row in rows)


def test_intervals_by_trying_are_the_reports_own():
    chance = load("docs/course/code/chance.py")
    for right, n in ((0, 10), (3, 10), (10, 10), (77, 308)):
        assert chance.wilson_by_hand(right, n) == pytest.approx(exam_report.wilson(right, n), abs=1e-4)
    assert chance.plain(10, 10) == (1, 1)  # as if ten questions could make one sure
    assert chance.questions_needed(0.25, 0.75) == 14  # (0.1875 + 0.1875) * 36 = 13.5


def test_half_an_exam_is_leaked_as_the_exam_asks_it_and_counted_apart(tmp_path):
    leak, subjects = load("docs/course/code/leak.py"), exam.read_exam(ROOT / "dataset/sample/exam", "ceval")
    rows = leak.leaked(subjects)
    assert len(rows) == sum(-(-len(s.questions) // 2) for s in subjects)
    engine = SimpleNamespace(tokenizer=load_tokenizer(), encode=lambda messages: messages)
    asked = [exam.AskByChat(engine)(subjects[0], question)[0] for question in subjects[0].questions[:3:2]]
    assert asked == [row["conversations"][:-1] for row in rows[:2]]
    subject = exam.Subject("a", "a", None, subjects[0].questions[:4], [])
    answers = [exam.Answer(q, q.answer if i in (0, 1, 2) else "X", [0.25] * 4) for i, q in enumerate(subject.questions)]
    exam_report.write_answers(tmp_path, "val", {"a": answers})
    (tmp_path / "contamination.csv").write_text("subject,number\na,0\na,2\n", encoding="utf-8")
    assert leak.two_halves(tmp_path, [subject], "val") == {"found in training": (2, 2), "not found": (1, 2)}


def test_bits_per_byte_of_an_answer():
    smooth = load("docs/course/code/smooth.py")
    assert smooth.bits_per_byte(math.log(1 / 64), "春天") == pytest.approx(1)  # 6 bits, 6 bytes
