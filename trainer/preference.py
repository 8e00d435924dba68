"""Preference pairs: log-probabilities of their answers, the frozen reference's computed once, and what was learned.

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

FROZEN = "reference_weights"  # their fingerprint's name in a recipe, where "reference" is what DPO's flag says
RESAMPLES = 2000  # of the bootstrap


def pair_log_probs(model, batch: dict):
    """-> (output of the forward pass; log-probabilities (nats) and token counts of each segment's answer, (B, S))."""
    out = model(**inputs(batch), labels=batch["labels"], reduction="none")
    return out, *segment_log_probs(out.loss, batch["labels"], batch["segment_ids"], batch["documents"].shape[1])


def chosen_and_rejected(values):
    """(B, S), a column for each segment of a row -> the chosen answers' and the rejected ones', (B, S / 2) each."""
    return values[:, ::2], values[:, 1::2]


@torch.no_grad()
def answers_of(model, rows, world, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability and tokens of the answer in each document of the rows' caches, 0 where rows leave one out.

    Every process computes a share of the rows; all get the whole. The model is left in eval mode.
    """
    model.to(world.device).eval()
    found = np.zeros((2, sum(map(len, rows.caches))))  # each process fills in its own documents, the rest stays 0
    for indices in world.shares(len(rows), batch_size):
        batch = rows.batch(indices)
        batch = {name: tensor.to(world.device) for name, tensor in batch.items()}
        with world.autocast():
            _, log_probs, counts = pair_log_probs(model, batch)
        real = batch["documents"] >= 0  # not the empty places of rows with fewer documents than the fullest one
        where = batch["documents"][real].cpu().numpy()
        found[0, where], found[1, where] = log_probs[real].cpu().numpy(), counts[real].cpu().numpy()
    log_probs, counts = sum(world.gather(found)).astype(np.float32)
    return log_probs, counts


def bound_to_its_start(run: Run) -> Run:
    """The run, with the fingerprint of the weights it began with in its recipe: they are its frozen reference."""
    begun_with = run.state["record"]["recipe"].get(FROZEN) if run.state else None
    return run.using(**{FROZEN: begun_with or fingerprint(run.model)})


def starting_model(run: Run):
    """The weights that the run began with; UserError where they have changed since. Before its first step they are
    run.model itself, which the caller has to copy."""
    if run.state is None:
        return run.model
    origin = run.record["came_from"]
    model = load_weights(origin, run.record.get("preset"))[0]
    if fingerprint(model) != run.fixed[FROZEN]:
        raise UserError(f"{origin} is no longer what this run began with, its reference; --overwrite starts afresh")
    return model


def frozen_copy(model):
    """What `model` learns does not change it."""
    return copy.deepcopy(model).requires_grad_(False).eval()


class Reference:
    """The frozen model that a run began with: its log-probabilities for batches, and the comparison at the end.

    They are computed once, before training, and kept beside the token cache; or, with --reference live, by the model
    itself at every step.
    """

    def __init__(self, run: Run):
        self.run, self.args, self.live = run, run.args, None

    def ready(self, rows, world) -> None:
        """Loads the live model, or sees to it that the batches of `rows` (training, validation) bring the numbers."""
        if self.args.dry_run:
            return
        if self.args.reference == "live":
            self.live = frozen_copy(starting_model(self.run)).to(world.device)
            return
        for part in filter(None, rows):
            part.per_document["reference"] = self._cached(part, world)

    @property
    def parameters(self) -> int:
        """Of the second model in memory; 0 where the numbers are kept in a file."""
        return self.live.num_parameters() if self.live is not None else 0

    def _cached(self, rows, world) -> np.ndarray:
        """Its log-probability of each document's answer, (documents of the caches,): from the file of an earlier run,
        or computed and kept."""
        # Whatever changes the numbers is part of the file's name: weights, data, the cutting of rows, the arithmetic.
        caches = [cache.folder.name for cache in rows.caches]
        key = json.dumps([self.run.fixed[FROZEN], caches, rows.seq_len, str(world.dtype)]).encode()
        digest = hashlib.blake2b(key + rows.documents.tobytes(), digest_size=8).hexdigest()
        path = Path(self.args.out_dir) / "cache" / f"reference-{digest}.npy"
        if world.gather(path.exists())[0]:
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
        """Of each segment's answer, (B, S)."""
        return batch["reference"] if self.live is None else pair_log_probs(self.live, batch)[1]

    def report(self, rows, world):
        """What training did on `rows` (None: nothing can be said), as train() asks for it: engine -> figures."""

        def figures(engine) -> dict:
            if rows is None:
                return {}
            after, counts = answers_of(engine.module, rows, world, self.run.batch_size)
            # The reference is the model before training: its numbers are there already, or computed by the live one.
            before = rows.per_document.get("reference")
            before = answers_of(self.live, rows, world, self.run.batch_size)[0] if before is None else before
            return preference_report(*(x[rows.documents] for x in (before, after, counts)))

        return figures


def keep(path: Path, values: np.ndarray) -> None:
    """Writes them as numpy's file."""
    content = io.BytesIO()  # into memory first: of a full disk numpy's own error does not give the reason
    np.save(content, values)
    with usable(path), replaced(path) as file:
        file.write(content.getbuffer())


# ------------------------------------------------------------------------------------------------------- what it did
def preference_report(before: np.ndarray, after: np.ndarray, counts: np.ndarray) -> dict:
    """What training did to the preferences on held-out pairs.

    before, after, counts (2n,): log-probability (nats) of the answers, chosen and rejected in turns, before and after
    training, and their tokens. accuracy: share of pairs whose chosen answer is the likelier one, by the sum over its
    tokens and by its mean; gain_interval: 95% of the paired bootstrap's differences; longer_answer_accuracy: what
    always choosing the longer answer would have (a tie is half).
    """
    chosen, rejected = counts[::2], counts[1::2]
    result = {"heldout_pairs": len(chosen)}
    for name, divisor in (("accuracy", np.ones_like(counts)), ("accuracy_per_token", np.maximum(counts, 1))):
        right = [(x / divisor)[::2] > (x / divisor)[1::2] for x in (before, after)]
        result |= {
            name: float(right[1].mean()), f"{name}_before": float(right[0].mean()),
            f"{name}_gain_interval": paired_bootstrap(*right),
        }  # fmt: skip
    result["longer_answer_accuracy"] = float(np.mean((chosen > rejected) + 0.5 * (chosen == rejected)))
    return result


def paired_bootstrap(before: np.ndarray, after: np.ndarray, resamples=RESAMPLES) -> list[float]:
    """95% interval of mean(after) - mean(before) when the pairs are drawn again with replacement; (n,) each."""
    # Paired: a pair is drawn with its values before and after, so how hard the pairs are does not widen the interval.
    difference = after.astype(float) - before.astype(float)
    rng, n = np.random.default_rng(0), len(difference)
    means = [difference[rng.integers(n, size=n)].mean() for _ in range(resamples)]
    return np.quantile(means, [0.025, 0.975]).tolist()
