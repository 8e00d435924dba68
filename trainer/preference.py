"""Preference pairs: the answers' log-probabilities, the frozen reference, and the report on held-out pairs.

A pair is two neighbouring segments of a packed row, chosen then rejected; see data/rows.py.
"""

import copy
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import replaced
from data.token_cache import usable
from model.weights_file import fingerprint
from trainer.loop import inputs
from trainer.losses import segment_log_probs
from trainer.setup import Run, load_weights

FROZEN = "reference_weights"  # key of their fingerprint in a recipe; "reference" there is the value of DPO's flag
RESAMPLES = 2000  # how often the bootstrap draws


def pair_log_probs(model, batch: dict):
    """-> (output of the forward pass; log-probabilities (nats) and token counts of each segment's answer, (B, S))."""
    out = model(**inputs(batch), labels=batch["labels"], reduction="none")
    return out, *segment_log_probs(out.loss, batch["labels"], batch["segment_ids"], batch["documents"].shape[1])


def chosen_and_rejected(values):
    """values (B, S), a column for each segment -> those of the chosen answers and of the rejected, (B, S / 2) each."""
    return values[:, ::2], values[:, 1::2]


@torch.no_grad()
def answers_of(model, rows, world, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (nats) and number of tokens of each document's answer, (documents of the caches,) each.

    0 for documents that are in no row. Every process computes a share of the rows, and all return the whole result.
    Leaves the model in eval mode.
    """
    model.to(world.device).eval()
    found = np.zeros((2, sum(map(len, rows.caches))))  # a process fills in its own documents only
    for indices in world.shares(len(rows), batch_size):
        batch = rows.batch(indices)
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        with world.autocast():
            _, log_probs, counts = pair_log_probs(model, batch)
        # (B, S); -1 in rows that hold fewer documents than the fullest one
        real = batch["documents"] >= 0
        where = batch["documents"][real].cpu().numpy()
        found[0, where], found[1, where] = log_probs[real].cpu().numpy(), counts[real].cpu().numpy()
    # Each document was computed by one process and is 0 in the others' arrays: the sum puts them together.
    log_probs, counts = sum(world.gather(found)).astype(np.float32)
    return log_probs, counts


def bound_to_its_start(run: Run) -> Run:
    """A copy of the run with the fingerprint of its starting weights, the frozen reference, in its recipe."""
    begun_with = run.state["record"]["recipe"].get(FROZEN) if run.state else None
    return run.using(**{FROZEN: begun_with or fingerprint(run.model)})


def starting_model(run: Run):
    """The model that the run began with; UserError where its file has changed since. Before the first step this is
    run.model itself: copy it to keep it."""
    if run.state is None:
        return run.model
    origin = run.record["came_from"]
    model = load_weights(origin, run.record.get("preset"))[0]
    if fingerprint(model) != run.fixed[FROZEN]:
        raise UserError(f"{origin} is no longer what this run began with, its reference; --overwrite starts afresh")
    return model


def frozen_copy(model):
    """A copy that is not trained and that training `model` does not change."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class Reference:
    """The frozen model that a run began with: its log-probabilities for batches, and the comparison at the end.

    The log-probabilities are computed once, before training, and kept in a file beside the token cache. With
    --reference live the model stays in memory and computes them at every step.
    """

    def __init__(self, run: Run):
        self.run, self.args, self.live = run, run.args, None

    def ready(self, rows, world) -> None:
        """Loads the live model, or adds the cached numbers to `rows` (training, validation), whose batches then have
        them as batch["reference"]."""
        if self.args.dry_run:
            return
        if self.args.reference == "live":
            self.live = frozen_copy(starting_model(self.run)).to(world.device)
            return
        for part in filter(None, rows):
            part.per_document["reference"] = self._cached(part, world)

    @property
    def parameters(self) -> int:
        """Number of parameters of the live model; 0 without one."""
        return self.live.num_parameters() if self.live is not None else 0

    def _cached(self, rows, world) -> np.ndarray:
        """The reference's log-probability of each document's answer, (documents of the caches,), from the file of an
        earlier run or computed and written."""
        # The file's name is a hash of all that the numbers depend on: weights, data, how rows are cut, precision.
        caches = [cache.folder.name for cache in rows.caches]
        key = json.dumps([self.run.fixed[FROZEN], caches, rows.seq_len, str(world.dtype)]).encode()
        digest = hashlib.blake2b(key + rows.documents.tobytes(), digest_size=8).hexdigest()
        path = Path(self.args.out_dir) / "cache" / f"reference-{digest}.npy"
        if world.gather(path.exists())[0]:  # the first process decides: all must take the same way
            try:
                with usable(path):
                    return np.load(path)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{path} is damaged ({error}); delete it, and it is made again") from None
        values, _ = answers_of(starting_model(self.run), rows, world, self.run.batch_size)
        world.on_first(lambda: keep(path, values))
        return values

    @torch.no_grad()
    def log_probs(self, batch: dict) -> torch.Tensor:
        """Log-probability of each segment's answer under the reference, (B, S)."""
        return batch["reference"] if self.live is None else pair_log_probs(self.live, batch)[1]

    def report(self, rows, world):
        """-> figures(engine), what train() calls at the end: how training changed preferences on `rows` (or None)."""

        def figures(engine) -> dict:
            if rows is None:
                return {}
            after, counts = answers_of(engine.module, rows, world, self.run.batch_size)
            # The reference is the model before training, so its numbers are those from before.
            before = rows.per_document.get("reference")
            before = answers_of(self.live, rows, world, self.run.batch_size)[0] if before is None else before
            return preference_report(*(x[rows.documents] for x in (before, after, counts)))

        return figures


def keep(path: Path, values: np.ndarray) -> None:
    """Writes an array as a .npy file."""
    content = io.BytesIO()  # into memory first: numpy's error for a full disk does not name the reason
    np.save(content, values)
    with usable(path), replaced(path) as file:
        file.write(content.getbuffer())


# ------------------------------------------------------------------------------------------------------- what it did
def preference_report(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> dict:
    """What training did to the preferences on held-out pairs.

    before, after, counts (2n,): log-probability (nats) of the answers before and after training, and their number of
    tokens; chosen and rejected answers alternate.
    accuracy: share of pairs whose chosen answer is likelier, by the sum and by the mean over its tokens.
    gain_interval: 95% interval of the gain in accuracy. longer_answer_accuracy: the accuracy of always choosing the
    longer answer (a tie counts half), a baseline: a model may learn nothing but to like length.
    """
    chosen, rejected = counts[::2], counts[1::2]
    result = {"heldout_pairs": len(chosen)}
    for name, divisor in (("accuracy", np.ones_like(counts)), ("accuracy_per_token", np.maximum(counts, 1))):
        # (pairs,) before and after: whether the chosen answer is the likelier one.
        right = [(x / divisor)[::2] > (x / divisor)[1::2] for x in (before, after)]
        result |= {
            name: float(right[1].mean()), f"{name}_before": float(right[0].mean()),
            f"{name}_gain_interval": paired_bootstrap(*right),
        }  # fmt: skip
    result["longer_answer_accuracy"] = float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))
    return result


def paired_bootstrap(before: np.ndarray, after: np.ndarray, resamples=RESAMPLES) -> list[float]:
    """95% bootstrap interval of mean(after) - mean(before), (n,) each: the pairs are drawn again with replacement."""
    # Paired: a pair is drawn with its values before and after, so how hard the pairs are does not widen the interval.
    difference = after.astype(float) - before.astype(float)
    rng, n = np.random.default_rng(0), len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975]).tolist()
