"""Several runs in one process of several, started by a launcher: `torchrun ... tests/ranks.py jobs.json`.

jobs.json is a list of {"script", "flags", "port"}; "more" are further flags of rank 1 alone. With "kill" or "fail",
[rank, batch], that process is lost when it reads that batch (0: when it is about to meet the others), and notes the
time in jobs.json.lost. Each process notes in jobs.json.<number>.rank<r> the rows it read, how often gradients were
exchanged in each micro-batch, and the code with which the run ended.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stage import load
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from trainer import engine, world  # first: it says how torch's threads wait

# isort: split
from common.errors import run_main
from data.rows import PackedRows


def watched(job: dict) -> dict:
    """Runs the job, with notes of what happens in it."""
    notes = {"rows": [], "exchanged": [], "code": 0}
    rank = int(os.environ["RANK"])
    batch, init, micro_batch = (
        PackedRows.batch,
        engine.DistributedDataParallel.__init__,
        engine.TrainingEngine.micro_batch,
    )
    meet = world.torch_dist.init_process_group

    def lose_this_process():
        for way in ("kill", "fail"):
            if [rank, len(notes["rows"])] == job.get(way):
                Path(f"{sys.argv[1]}.lost").write_text(str(time.time()))
                if way == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError("of one process")

    def noted_meeting(*args, **kwargs):
        lose_this_process()
        return meet(*args, **kwargs)

    def noted_batch(self, indices):
        notes["rows"].append([len(self), *indices])
        lose_this_process()
        return batch(self, indices)

    def noted_micro_batch(self, last):
        notes["exchanged"].append(0)
        return micro_batch(self, last)

    def count(_, bucket):
        notes["exchanged"][-1] += 1
        return allreduce_hook(None, bucket)

    def noted_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_comm_hook(None, count)

    PackedRows.batch, engine.TrainingEngine.micro_batch = noted_batch, noted_micro_batch
    engine.DistributedDataParallel.__init__, world.torch_dist.init_process_group = noted_init, noted_meeting
    try:
        run_main(load(job["script"]).main, job["flags"] + (job.get("more", []) if rank == 1 else []))
    except SystemExit as end:
        notes["code"] = end.code
    finally:
        PackedRows.batch, engine.TrainingEngine.micro_batch = batch, micro_batch
        engine.DistributedDataParallel.__init__, world.torch_dist.init_process_group = init, meet
    return notes


def main(path: str) -> None:
    for number, job in enumerate(json.loads(Path(path).read_text())):
        # a meeting place of its own for each run: the launcher's still knows where the processes of the last one met
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(job["port"])}
        notes = watched(job)
        Path(f"{path}.{number}.rank{os.environ['RANK']}").write_text(json.dumps(notes))
        if notes["code"] not in (0, 2):
            sys.exit(notes["code"])


if __name__ == "__main__":
    main(sys.argv[1])
