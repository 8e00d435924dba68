"""DDP and ZeRO by hand: several processes share the rows of a step and exchange numbers around a ring.

    torchrun --nproc_per_node 2 docs/course/code/ring.py --preset tiny --steps 4

Every process has its own part of the rows. Three ways to learn from all of them: one process that sees every row; DDP,
where the gradients are summed around the ring and each process updates all weights; ZeRO-1, where each process updates
its own part of the weights, and only it has Adam's state for that part. The weights must be the same in all three. The
last line is a JSON object.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from model.LMConfig import LMConfig
from model.model import MiniMindForCausalLM


def shift(outgoing: Tensor, incoming: Tensor, rank: int, size: int) -> None:
    """Sends a tensor to the right neighbour while another one comes in from the left."""
    request = dist.isend(outgoing, (rank + 1) % size)
    dist.recv(incoming, (rank - 1) % size)
    request.wait()


def reduce_scatter(parts: list[Tensor], rank: int, size: int) -> int:
    """Afterwards one part of each process holds the sum over all processes; returns which one that is."""
    incoming = torch.empty_like(parts[0])
    for step in range(size - 1):
        shift(parts[(rank - step) % size], incoming, rank, size)
        parts[(rank - step - 1) % size] += incoming
    return (rank + 1) % size


def all_gather(parts: list[Tensor], rank: int, size: int) -> None:
    """Every process hands the part that it owns around the ring, until all processes have all parts."""
    for step in range(size - 1):
        shift(parts[(rank + 1 - step) % size], parts[(rank - step) % size], rank, size)


def gradient(model, rows: Tensor, count: int) -> Tensor:
    """The gradient of these rows' summed loss, divided by the targets of the whole step, as one long vector."""
    model.zero_grad()
    (model(rows, labels=rows, reduction="none").loss.sum() / count).backward()
    return parameters_to_vector([p.grad for p in model.parameters()])


def adam(numbers: Tensor) -> torch.optim.Optimizer:
    return torch.optim.AdamW([numbers], lr=1e-3, weight_decay=0.1)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the two moments."""
    state = (x for moments in optimizer.state.values() for x in moments.values())
    return sum(x.numel() * x.element_size() for x in state if x.ndim)


def learn(way: str, model, batches: Tensor, rank: int, size: int) -> dict:
    """Trains on batches (steps, B, T) in one of the three ways -> the weights, and what this process held and sent."""
    start = parameters_to_vector(model.parameters()).detach()
    padded = torch.zeros(-(-len(start) // size) * size)  # so that it divides into equal parts
    padded[: len(start)] = start
    weights = list(padded.chunk(size))  # views: what changes in a part changes in `padded`
    own = torch.nn.Parameter(weights[(rank + 1) % size] if way == "zero" else padded)
    optimizer, count = adam(own), batches[0, :, 1:].numel()
    for rows in batches:
        vector_to_parameters(padded[: len(start)].clone(), model.parameters())
        mine = rows if way == "alone" else rows.chunk(size)[rank]
        total = torch.zeros_like(padded)
        total[: len(start)] = gradient(model, mine, count)
        parts = list(total.chunk(size))
        if way == "alone":
            own.grad = total
        else:
            owned = reduce_scatter(parts, rank, size)
            if way == "ddp":
                all_gather(parts, rank, size)  # with reduce_scatter before it: an all-reduce
            own.grad = parts[owned] if way == "zero" else total
        optimizer.step()
        if way == "zero":
            all_gather(weights, rank, size)
    turns = 0 if way == "alone" else 2 * (size - 1)
    return {"weights": padded, "state": state_bytes(optimizer), "sent": turns * 4 * len(padded) // size}


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=12, help="rows of a step, over all processes (12)")
    args = parser.parse_args(argv)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        dist.init_process_group("gloo")
    if args.rows % size:
        parser.error(f"{args.rows} rows cannot be shared by {size} processes")

    config = LMConfig.from_preset(args.preset)
    torch.manual_seed(0)  # the same weights and rows in every process
    model = MiniMindForCausalLM(config)
    start = parameters_to_vector(model.parameters()).detach().clone()
    batches = torch.randint(config.vocab_size, (args.steps, args.rows, 32))

    found = {}
    for way in ("alone", "ddp", "zero"):
        vector_to_parameters(start.clone(), model.parameters())
        found[way] = learn(way, model, batches, rank, size)
    alone = found["alone"].pop("weights")
    for way in ("ddp", "zero"):
        found[way]["difference"] = (found[way].pop("weights") - alone).abs().max().item()
    found["alone"]["moved"] = (alone[: len(start)] - start).abs().max().item()
    if rank == 0:
        print(f"{size} processes, {args.steps} steps of {args.rows} rows, {len(start):,} parameters")
        print(f"the largest change of a weight: {found['alone']['moved']:.1e}")
        print(f"\n{'':<22} {'rows':>5} {'Adam, MB':>9} {'sent a step, MB':>16}   differs from one process by at most")
        for way, name in (("alone", "one process"), ("ddp", "DDP, this process"), ("zero", "ZeRO-1, this process")):
            rows = args.rows if way == "alone" else args.rows // size
            sent, state = found[way]["sent"] / 1e6, found[way]["state"] / 1e6
            apart = f"{found[way]['difference']:.1e}" if way != "alone" else ""
            print(f"{name:<22} {rows:>5} {state:>9.1f} {sent:>16.1f}   {apart}".rstrip())
        print(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
