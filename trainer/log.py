"""The log of a run: a line on the screen, every step in a file, a curve at the end."""

import functools
import json
import os
import re
import sys
import time

import torch
from tqdm import tqdm

from common import workers
from common.files import named, replaced

# Peak speed in TFLOPS: dense products in half precision with sums in float32, from the makers' data sheets. Those of
# GeForce 30, 40 and 50 give other figures; here it is multiprocessors x 512 x boost clock, as in their white papers.
GPU_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "A100": 312,
    "A800": 312, "A40": 150, "A30": 165, "A10": 125, "L40S": 362, "L40": 181, "L20": 119, "L4": 121, "V100": 125,
    "T4": 65, "RTX 6000 Ada": 364, "RTX A6000": 155, "RTX 5090": 209, "RTX 5080": 112, "RTX 5070 Ti": 88,
    "RTX 5070": 62, "RTX 4090": 165, "RTX 4080": 97, "RTX 4070 Ti": 80, "RTX 4070": 58, "RTX 4060 Ti": 44,
    "RTX 4060": 30, "RTX 3090 Ti": 80, "RTX 3090": 71, "RTX 3080 Ti": 68, "RTX 3080": 60, "RTX 3070": 41,
    "RTX 3060 Ti": 32, "RTX 3060": 25, "RTX 2080 Ti": 57,
}  # fmt: skip

BAR = "{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}, {elapsed} so far"
LOSS_CURVES = (("loss", "training"), ("val_loss", "held out"))


class Log:
    """Prints and writes the numbers of the first process; on the others it does nothing. trackers: see tracking.py."""

    def __init__(
        self, files, world, total_steps: int, flops_per_token: float, log_interval: int, start_step: int, trackers=()
    ):
        self.files, self.world, self.total, self.interval = files, world, total_steps, log_interval
        self.flops_per_token, self.peak_flops = flops_per_token, device_flops(world) if world.first else 0.0
        self.trackers = list(trackers)
        self.history, self.clock, self.since = [], time.perf_counter(), [0, 0]  # tokens and steps since that time
        if world.first:
            self.file = self._open(start_step)
            show = sys.stderr.isatty()
            # No time left in the bar: tqdm's is an average since the start, and the line of the log tells one.
            self.bar = tqdm(total=total_steps, initial=start_step, disable=not show, leave=False, bar_format=BAR)

    def _open(self, start_step: int):
        """Opens the log file, cuts it off after step `start_step`, and reads what is left into the history.

        A run that was killed has logged steps after its last save. The resumed run takes them again, so their lines are
        removed. The other lines are not rewritten, so no kill can lose them.
        """
        with named(self.files.log):
            file = open(self.files.log, "ab+", buffering=0)  # unbuffered: each line is in the file at once
            file.seek(0)
            end = 0  # bytes to keep
            for line in file.readlines() if start_step else ():
                try:
                    record = json.loads(line)
                    # The last validation comes after the last save, so a resumed run repeats it.
                    last = record["step"] == self.total and "tokens" not in record
                    # A line without a line end was cut short by a crash.
                    if record["step"] > start_step or last or not line.endswith(b"\n"):
                        break
                except (ValueError, TypeError, KeyError):
                    break
                self.history.append(record)
                end += len(line)
            file.truncate(end)
        return file

    def step(self, step: int, tokens: int, **numbers) -> None:
        """Logs a finished step. tokens: its real tokens; numbers: by name."""
        if not self.world.first:
            return
        self._write({"step": step, "tokens": tokens, **numbers})
        self.bar.update()
        # Speed and time left are averages since the last printed line.
        self.since = [self.since[0] + tokens, self.since[1] + 1]
        if step % self.interval == 0 or step == self.total:
            now = time.perf_counter()
            speed = self.since[0] / max(now - self.clock, 1e-9)
            left = (self.total - step) * (now - self.clock) / self.since[1]
            self.clock, self.since = now, [0, 0]
            mfu = f"{speed * self.flops_per_token / self.peak_flops:.0%}" if self.peak_flops else "unknown"
            shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if name not in ("lr", "seconds"))
            memory = peak_memory(self.world.device) / 2**30
            self.say(
                f"step {step}/{self.total}  {shown}  lr {numbers['lr']:.2e}  {speed:,.0f} tok/s  "
                f"mfu {mfu}  mem {memory:.2f} GB  left {tqdm.format_interval(left)}"
            )

    def validation(self, step: int, **numbers) -> None:
        if self.world.first:
            self._write({"step": step, **numbers})
            shown = "  ".join(f"{name} {value:.4f}" for name, value in numbers.items() if value is not None)
            self.say(f"step {step}/{self.total}  {shown}")
        self.clock, self.since = time.perf_counter(), [0, 0]  # tok/s must not include the validation

    def say(self, text: str) -> None:
        if self.world.first:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def flush(self) -> None:
        """Waits until all lines are on the disk. Called before a state is saved: after a power cut the log must hold
        all steps that the state holds."""
        if self.world.first:
            with named(self.files.log):
                os.fsync(self.file.fileno())

    def close(self) -> None:
        self._tell(lambda tracker: tracker.close())
        if self.world.first:
            self.bar.close()
            self.file.close()

    def _write(self, record: dict) -> None:
        self.history.append(record)
        with named(self.files.log):
            line = json.dumps(record).encode() + b"\n"
            while line:  # an unbuffered write may take only a part
                line = line[self.file.write(line) :]
        numbers = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._tell(lambda tracker: tracker.log(record["step"], numbers))

    def _tell(self, act) -> None:
        """Calls act(tracker) for each tracker. One that fails is dropped with a warning, and the run goes on."""
        for tracker in list(self.trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a service's client raises
                self.trackers.remove(tracker)
                print(f"warning: {type(tracker).__name__} is told no more: {error!r}", file=sys.stderr)

    def draw_curve(self, curves=LOSS_CURVES, unit="loss") -> None:
        """Draws curves, (name of a number, its label) each, into a picture beside the weights."""
        if not self.world.first or not any(curves[0][0] in record for record in self.history):
            return
        try:
            import matplotlib
        except ImportError:
            self.say("no loss curve: install matplotlib to have it drawn")
            return
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4))
        for key, label in curves:
            points = [(record["step"], record[key]) for record in self.history if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker=None if key == curves[0][0] else "o")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.set_title(self.files.name)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.tight_layout()
        with replaced(self.files.curve) as file:
            figure.savefig(file, format="png", dpi=120)
        pyplot.close(figure)


def flops_per_token(config, seq_len: int, learned_share=1.0) -> float:
    """Floating-point operations of forward and backward for one token of a row.

    For each weight the token meets: 2 in the forward pass, 2 for the gradient of the input, and 2 for the weight's own
    gradient if it is trained (learned_share of them are). An embedding is a lookup and counts only as the head it is
    tied to. The two attention products add, for the causal half: 6 * layers * heads * head width * row length.
    """
    weights = config.active_parameter_count()
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.dim
    return (4.0 + 2.0 * learned_share) * weights + 6.0 * config.n_layers * config.n_heads * config.head_dim * seq_len


def device_flops(world) -> float:
    """Peak floating-point operations a second, of all processes: for a GPU from the table, 0 if it is not there; for
    other devices as measured."""
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        known = [model for model in GPU_TFLOPS if re.search(rf"\b{model}\b(?!.*Laptop)", name)]
        return GPU_TFLOPS[max(known, key=len)] * 1e12 * world.size if known else 0.0
    return product_flops(world.device) * world.size


@functools.cache  # the start of a run and its log want the same figure
def product_flops(device: torch.device) -> float:
    """Operations a second of the best of three matrix products."""
    size = 1024
    a = torch.full((size, size), 0.5, device=device)  # not random: the run's random numbers stay as they are
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: by torch on a GPU, by the process on a CPU (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return workers.peak_memory(0) or 0
