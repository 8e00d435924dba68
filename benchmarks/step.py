"""One training step on the CPU: ours against transformers' Llama and against a bare matrix product.

Both models see the same packed rows with the same mask and take forward, backward, clipping and AdamW. Runs
alternate (A B A B); times are CPU seconds of the process, so a busy neighbour changes them little; medians and ranges
are printed.
"""

import time

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.report import spread
from export.counterpart import transformers_config
from model.attention import packed_mask, packed_positions
from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM
from trainer.log import flops_per_token
from trainer.losses import lm_loss

ROWS, SEQ_LEN, DOCUMENTS = 8, 512, 3


def add_flags(parser) -> None:
    parser.add_argument("--preset", default="minimind2-small", help="(%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="paired runs (%(default)s)")


def packed_rows(vocab_size: int) -> dict:
    """Random rows of three documents each."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab_size, (ROWS, SEQ_LEN), generator=generator)
    cuts = torch.randint(1, SEQ_LEN, (ROWS, DOCUMENTS - 1), generator=generator).sort(dim=1).values
    segments = 1 + (torch.arange(SEQ_LEN).view(1, -1, 1) >= cuts.unsqueeze(1)).sum(-1)
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return {"input_ids": ids, "labels": torch.where(starts, -100, ids), "segment_ids": segments}


def counterpart(config: LMConfig):
    """transformers' model of the same mathematics (Llama, Qwen3, GraniteMoeShared or Qwen3Moe), random weights."""
    fields = transformers_config(config, "float32") | {"use_cache": False}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


def step_seconds(model, optimizer, logits_of, batch) -> float:
    begin = time.process_time()
    loss, count = lm_loss(logits_of(model), batch["labels"])
    (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - begin


def matmul_flops(size=2048) -> float:
    a, b = torch.randn(size, size), torch.randn(size, size)
    begin = time.process_time()
    a @ b
    return 2 * size**3 / (time.process_time() - begin)


def run(args) -> dict:
    torch.set_num_threads(args.threads)
    config = LMConfig.from_preset(args.preset)
    batch = packed_rows(config.vocab_size)
    ours, llama = MiniMindForCausalLM(config).train(), counterpart(config).train()
    llama.load_state_dict(ours.state_dict())
    mask, positions = packed_mask(batch["segment_ids"]), packed_positions(batch["segment_ids"])

    def our_logits(model):
        return model(batch["input_ids"], segment_ids=batch["segment_ids"]).logits

    def llama_logits(model):
        return model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits

    with torch.no_grad():
        difference = (our_logits(ours) - llama_logits(llama)).abs().max().item()
    pairs = [(m, torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True), f) for m, f in
             ((ours, our_logits), (llama, llama_logits))]  # fmt: skip
    tokens, flops = ROWS * SEQ_LEN, flops_per_token(config, SEQ_LEN) * ROWS * SEQ_LEN
    rates, ratios, shares = ([], []), [], []
    for i in range(args.runs + 1):
        seconds = [step_seconds(*pair, batch) for pair in pairs]
        matmul = matmul_flops()
        if i == 0:
            continue  # warm-up
        for rate, s in zip(rates, seconds, strict=True):
            rate.append(tokens / s)
        ratios.append(seconds[1] / seconds[0])
        shares.append(flops / seconds[0] / matmul)
        print(f"run {i}: ours {tokens / seconds[0]:,.0f} tok/s, Llama {tokens / seconds[1]:,.0f} tok/s, "
              f"ratio {ratios[-1]:.3f}, {shares[-1]:.1%} of a {2048}^3 product's rate", flush=True)  # fmt: skip
    return {
        "preset": args.preset, "threads": args.threads, "largest_logit_difference": difference,
        "ours_tokens_per_cpu_second": spread(rates[0]), "llama_tokens_per_cpu_second": spread(rates[1]),
        "rate_over_llama": spread(ratios), "share_of_matmul": spread(shares),
    }  # fmt: skip
