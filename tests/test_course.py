"""The course agrees with the code and with its records, and its small programs compute what they say."""

import math
from collections import Counter

import pytest
import torch
from stage import ROOT, load
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from course import checks, pages
from figures.records import record_of, result_of
from inference.engine import Engine
from inference.sampling import SamplingParams, filtered
from inspection.trace import trace
from model.LMConfig import LMConfig
from model.lora import add_lora
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render_spans
from trainer.losses import lm_loss

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


def test_what_is_drawn_from_is_the_samplers_own():
    sampling = load("docs/course/code/sampling.py")
    p = sampling.probabilities(torch.tensor([2.0, 1.0, 0.0]), top_p=0.9)
    torch.testing.assert_close(p, torch.tensor([0.731, 0.269, 0]), atol=5e-4, rtol=0)  # exercise 1 of chapter 9
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    for options in ({"temperature": 0.5}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 2, "top_k": 20, "top_p": 0.9}):
        ours = filtered(logits.unsqueeze(0), [SamplingParams(**options)])[0].softmax(dim=-1)
        torch.testing.assert_close(sampling.probabilities(logits, **options), ours)
    pieces = torch.tensor([0.5, 0.25, 0.25])
    assert [sampling.draw(pieces, u) for u in (0, 0.49, 0.5, 0.74, 0.75, 0.999)] == [0, 0, 1, 1, 2, 2]


def test_a_simple_cache_gives_the_engines_text_at_the_cost_that_the_formula_says():
    cache, m, n = load("docs/course/code/cache.py"), 5, 12
    torch.manual_seed(1)
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", n_layers=2, vocab_size=50)).eval()
    ids = [3, 7, 9, 4, 11]
    (without, dear), (with_cache, cheap) = (cache.write(model, ids, n, cached) for cached in (False, True))
    engine = Engine(model, load_tokenizer())
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    assert without == with_cache == ids + engine.generate([ids], params)[0].token_ids
    assert dear[-1][0] == n * m + n * (n - 1) // 2 and cheap[-1][0] == m + n - 1
    assert dear[-1][1] == sum((m + i) ** 2 for i in range(n)) and cheap[-1][1] == m**2 + sum(range(m + 1, m + n))


def test_the_masked_loss_by_hand_is_the_projects_and_counts_what_the_assistant_says():
    mask, tokenizer = load("docs/course/code/mask.py"), load_tokenizer()
    ids, learned, _ = render_spans(tokenizer, mask.CONVERSATION)
    said = [message["content"] + "<|im_end|>" for message in mask.CONVERSATION if message["role"] == "assistant"]
    assert tokenizer.decode([i for i, m in zip(ids, learned, strict=True) if m]) == "".join(said)
    logits = torch.randn(len(ids), len(tokenizer), generator=torch.Generator().manual_seed(0))
    nats, mean = mask.masked_loss(logits, torch.tensor(ids), torch.tensor(learned))
    labels = torch.tensor([[i if m else -100 for i, m in zip(ids, learned, strict=True)]])
    total, count = lm_loss(logits.unsqueeze(0), labels)
    assert mean.item() == pytest.approx((total / count).item()) and len(nats) == len(ids) - 1
    assert mask.markers_in(tokenizer, "你好") == mask.markers_in(tokenizer, mask.TYPED) == 2


def test_lora_by_hand_its_start_and_its_sizes_are_the_projects():
    lora = load("docs/course/code/lora.py")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig.from_preset("tiny", vocab_size=50))
    add_lora(model, 8, 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == lora.sizes("tiny")["trained"][8]
    ids = torch.randint(50, (1, 8))
    A, B = lora.start_gradients(model, ids, False)
    assert A == 0 < B and lora.start_gradients(model, ids, True) == (0, 0)
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():
        for p in layer.adapter["weight"].parameters():
            p.normal_(0, 0.1)
        x = torch.randn(3, layer.in_features)
        by_hand = lora.lora_by_hand(x, layer.weight, layer.adapter["weight"].A, layer.adapter["weight"].B, 16)
        torch.testing.assert_close(by_hand, layer(x))
