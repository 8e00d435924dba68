"""Reasoning: weight on the tags of the assistant alone, thinking kept in a share of the rows."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from stage import STAGES, chat_weights, load, run_flags, write_chats

from common.errors import UserError
from data.rows import packed_splits
from data.thinking import REASONING_TAGS, keep_thinking
from data.token_cache import tokenised
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer, render
from model.tokenizer_files import tokenizer_from_dict, tokenizer_to_dict
from trainer.loop import language_model
from trainer.losses import lm_loss, weighted_sum

STAGE = load(STAGES["reason"])
TOKENIZER = load_tokenizer()
TRACE = "<think>\n三加四。\n</think>\n<answer>\n7\n</answer>"


def chat(question, answer, **extra):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **extra}]


def nats(logits, labels):
    """(B, T - 1) cross-entropy of each target."""
    flat = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return flat.view(len(labels), -1)


def test_the_weighted_loss_by_hand():
    logits = torch.tensor([[[0.0, math.log(3)], [math.log(4), 0.0], [9.0, 9.0]]])  # p(1) = 3/4, then p(0) = 4/5
    labels, weight = torch.tensor([[0, 1, 1]]), torch.tensor([1.0, 10.0])
    first, second = -math.log(3 / 4), -math.log(1 / 5)
    assert weighted_sum(nats(logits, labels), labels, weight).item() == pytest.approx(10 * (first + second), rel=1e-6)
    labels = torch.tensor([[0, 0, 1]])
    total = weighted_sum(nats(logits, labels), labels, weight)
    assert total.item() == pytest.approx(-math.log(1 / 4) + 10 * second, rel=1e-6)
    plain = lm_loss(logits, labels)[0].item()
    assert weighted_sum(nats(logits, labels), labels, torch.ones(2)).item() == pytest.approx(plain, rel=1e-6)


def test_the_weight_is_on_tags_by_id_in_the_assistants_turn_only(tmp_path):
    """A user who writes <think> writes text; a tag in the reply is one token, and its gradient alone grows."""
    weights = STAGE.token_weights(TOKENIZER, 6400, 10.0)
    ids = TOKENIZER.convert_tokens_to_ids(list(REASONING_TAGS))
    assert weights[ids].tolist() == [10.0] * 4 and weights.sum() == 6400 + 4 * 9
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"conversations": chat("<think>和</answer>是什么？", TRACE)}, ensure_ascii=False) + "\n", "utf-8"
    )
    rows, _ = packed_splits([tokenised(tmp_path / "r.jsonl", "chat", TOKENIZER, tmp_path)], "chat", 64, 0, 0.0)
    batch = rows.batch([0])
    tags = torch.isin(batch["input_ids"], torch.tensor(ids))
    assert tags.sum() == 4 and (batch["labels"][tags] == batch["input_ids"][tags]).all()
    torch.manual_seed(0)
    logits = torch.randn(1, 64, 6400, requires_grad=True)
    (heavy,) = torch.autograd.grad(weighted_sum(nats(logits, batch["labels"]), batch["labels"], weights), logits)
    (plain,) = torch.autograd.grad(lm_loss(logits, batch["labels"])[0], logits)
    factor = torch.where(tags, 10.0, 1.0)[:, 1:, None]  # the logits before a token predict it
    torch.testing.assert_close(heavy[:, :-1], factor * plain[:, :-1])


def test_weight_one_is_sft():
    torch.manual_seed(0)
    model = MiniMindForCausalLM(LMConfig(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, use_moe=True)).train()
    ids = torch.randint(3, 6400, (2, 20))
    batch = {"input_ids": ids, "labels": ids, "segment_ids": torch.ones_like(ids)}
    plain, count, _, balance = language_model(model, batch)
    loss, n, numbers, other = STAGE.tagged_language_model(torch.ones(6400))(model, batch)
    assert count == n and loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert numbers["ce"].item() == pytest.approx(plain.item(), rel=1e-6) and other == balance > 0


def test_thinking_is_kept_in_a_share_of_the_conversations():
    chats = [chat(f"{i}+{i}=？", TRACE) for i in range(2000)]
    for share in (0.0, 0.3, 1.0):
        kept = [keep_thinking(c, share) for c in chats]
        assert [keep_thinking(c, share) for c in chats] == kept
        whole = sum(a == b for a, b in zip(kept, chats))
        assert abs(whole / 2000 - share) < 0.04
    fewer, more = ({i for i, c in enumerate(chats) if keep_thinking(c, s) == c} for s in (0.3, 0.6))
    assert fewer < more  # who keeps it at a small share keeps it at a larger one


def test_an_emptied_block_is_the_one_a_model_is_told_not_to_think_by():
    """Prompt with enable_thinking=False, then the answer: the tokens of the emptied row."""
    prompt, _ = render(TOKENIZER, chat("三加四？", "")[:1], add_generation_prompt=True, enable_thinking=False)
    answer = "<answer>\n7\n</answer>"
    rows = chat("三加四？", TRACE), chat("三加四？", answer, reasoning_content="三加四。")
    for row in (*rows, chat("三加四？", TRACE, reasoning_content=None)):
        ids, mask = render(TOKENIZER, keep_thinking(row, 0.0))
        assert ids[: len(prompt)] == prompt
        assert TOKENIZER.decode(ids[len(prompt) :]) == f"{answer}<|im_end|>\n"
    plain = chat("你好", "你好！")
    assert (
        keep_thinking(plain, 0.0) == plain
        and keep_thinking(chat("a", "x<think>y</think>"), 0.0)[1]["content"][0] == "x"
    )


def run_reason(tmp_path, *more) -> dict:
    return STAGE.main([*run_flags("reason", tmp_path, steps=2), "--out_dir", str(tmp_path / "o"), *map(str, more)])


def test_a_run_reports_the_loss_without_weights(tmp_path):
    result = run_reason(tmp_path, "--think_ratio", 0.5)
    assert result["stage"] == "reason" and result["val_loss"] > result["val_ce"] > 0
    assert result["val_bits_per_byte"] > 0
    weights = torch.load(result["weights"], weights_only=True)
    assert weights["record"]["recipe"]["tag_weight"] == 10 and weights["record"]["recipe"]["think_ratio"] == 0.5
    plain = run_reason(tmp_path, "--tag_weight", 1, "--save_weight", "plain")
    assert plain["val_loss"] == pytest.approx(plain["val_ce"], rel=1e-6)


def test_a_vocabulary_without_the_tags_is_refused(tmp_path):
    files = tokenizer_to_dict(TOKENIZER)
    files["tokenizer.json"] = files["tokenizer.json"].replace("<think>", "<thonk>")
    other = tokenizer_from_dict(files)
    with pytest.raises(UserError, match="<think> is no token of this vocabulary .* use --tag_weight 1"):
        STAGE.token_weights(other, 6400, 10.0)
    assert STAGE.token_weights(other, 6400, 1.0).sum() == 6400


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tag_weight", 0], "--tag_weight must be above 0"),
        (["--think_ratio", 2], "--think_ratio must lie in"),
        (["--from_weight", "nowhere/x.pth"], "no weights at nowhere/x.pth"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_reason(tmp_path, *flags)


def test_resume_with_another_weight_or_file_is_refused(tmp_path):
    run_reason(tmp_path)
    chat_weights(tmp_path)
    chats = write_chats(tmp_path / "c.jsonl")
    with pytest.raises(UserError) as caught:
        run_reason(tmp_path, "--resume", "--tag_weight", 3, "--data_path", chats, "--seed", 7)
    assert all(part in str(caught.value) for part in ("tag_weight was 10.0, is now 3.0", "data was", "seed was 42"))
