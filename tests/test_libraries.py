"""Other people's trainers on our model as it is: transformers' Trainer, trl's SFT (its DPO: test_dpo.py), peft's LoRA.

The balance loss of the experts: `forward` adds it to the loss it returns when it is given labels, in training. The
Trainer learns from that loss, so nothing is lost. trl computes its own loss from the logits (SFT) or from
log-probabilities (DPO) and throws the model's away; it adds a balance loss of its own only for models that return the
router's logits with `output_router_logits` in their config. Ours does not: under trl the experts are trained without
a balance loss. For a few steps of fine-tuning that is harmless; for long runs use this project's own stages.
"""

import pytest
import torch

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from model.tokenizer import load_tokenizer

SMALL = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 48, "vocab_size": 6400}
KINDS = {"dense": {}, "moe": {"use_moe": True, "aux_loss_alpha": 0.5}}
CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 1,
       "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"{n}加一？"}, {"role": "assistant", "content": f"等于{n + 1}。" * (n % 3 + 1)}]
    for n in range(12)
]


def small(kind, **fields):
    torch.manual_seed(0)
    return MiniMindForCausalLM(LMConfig(**(SMALL | KINDS[kind] | fields)))


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def state_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rows(lengths, width=20):
    generator = torch.Generator().manual_seed(2)
    for n in lengths:
        row = torch.randint(3, 6400, (width,), generator=generator)
        mask = (torch.arange(width) < n).long()
        yield {"input_ids": row, "attention_mask": mask, "labels": torch.where(mask > 0, row, -100)}


@pytest.mark.parametrize("kind", KINDS)
def test_trainer_takes_the_steps_of_a_plain_loop(kind, tmp_path):
    """Balance loss included: micro-batches of unequal length, summed, give the gradient of the batch as a whole."""
    from transformers import Trainer, TrainingArguments

    data = list(rows([20, 7, 13, 4, 20, 9, 11, 17, 5, 20, 8, 16]))
    trained = small(kind, initializer_range=0.2)
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0, weight_decay=0.0,
        train_sampling_strategy="sequential", optim="sgd", **CPU,
    )  # fmt: skip
    Trainer(trained, arguments, train_dataset=data).train()

    plain = small(kind, initializer_range=0.2).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=CPU["learning_rate"])
    before = state_of(plain)
    for step in range(3):
        batch = {key: torch.stack([row[key] for row in data[4 * step : 4 * step + 4]]) for key in data[0]}
        optimizer.zero_grad()
        logits = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
        if kind == "moe":  # each micro-batch's mean, weighted by its learned tokens
            for half in (slice(0, 2), slice(2, 4)):
                part = {key: value[half] for key, value in batch.items()}
                aux = plain(part["input_ids"], attention_mask=part["attention_mask"]).aux_loss
                loss = loss + aux * (part["labels"][:, 1:] != -100).sum() / (targets != -100).sum()
        loss.backward()
        optimizer.step()
    assert changed(plain, before) == set(before)
    for name, parameter in trained.named_parameters():
        moved = (plain.get_parameter(name) - before[name]).abs().max()
        assert (parameter - plain.get_parameter(name)).abs().max() < 1e-3 * moved, name


@pytest.mark.slow  # trl takes longer to import than to run
@pytest.mark.parametrize("kind", KINDS)
def test_trl_sft(kind, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, tokenizer = small(kind), load_tokenizer()
    before = state_of(model)
    arguments = trl.SFTConfig(tmp_path, per_device_train_batch_size=4, max_length=64, assistant_only_loss=True, **CPU)
    data = datasets.Dataset.from_dict({"messages": CHATS})
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    # ln 6400 = 8.76 nats at random weights. The model's own loss would stand 2 layers x 0.5 above that.
    assert losses[0] == pytest.approx(8.76, abs=0.2)
    assert changed(model, before) == set(before)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_lora(kind, tmp_path):
    """Targets are named: "all-linear" would adapt the router too."""
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    model = small(kind)
    before = state_of(model)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, lora)
    arguments = TrainingArguments(tmp_path / "run", per_device_train_batch_size=4, **CPU)
    Trainer(adapted, arguments, train_dataset=list(rows([20] * 12))).train()
    base = {name.replace("base_model.model.", "").replace("base_layer.", ""): parameter
            for name, parameter in adapted.named_parameters() if "lora_" not in name}  # fmt: skip
    assert set(base) == set(before) and all(torch.equal(base[name], before[name]) for name in before)
    assert all(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)

    x = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        wanted = adapted.eval()(x).logits
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(small(kind), tmp_path / "adapter").eval()
        assert torch.equal(again(x).logits, wanted)
        merged = again.merge_and_unload()
        assert isinstance(merged, MiniMindForCausalLM)
        assert torch.allclose(merged(x).logits, wanted, atol=1e-6)
        assert not torch.allclose(small(kind).eval()(x).logits, wanted, atol=1e-5)
