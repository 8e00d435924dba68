"""Log-probabilities of given continuations, in batches, computing what prompts have in common once.

Legend: B rows in a forward pass, T tokens of it a row, P tokens of the common prefix, V vocabulary.

An exam asks for four continuations of each of a thousand prompts, and all prompts of a subject begin with the same
five worked examples. So the prompts are sorted, and neighbours that begin alike form a group. The common beginning of a
group is computed once. Its keys and values are copied to every row of the batch, and the rows add their own tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.batch import StaticCache
from model.compat import CACHE

MIN_PREFIX = 16  # fewer tokens in common are not worth a pass of their own
PASS_TOKENS = 1024  # tokens of one pass; more do not fit into the processor's cache and are no faster
FULL_PASS = 256  # a pass of so many tokens takes no row that is much longer: padding the others would cost more
CHUNK = 512  # tokens of a common beginning in one pass


@dataclass
class Score:
    """One continuation: sum of its tokens' log-probabilities (nats), each token's, and whether each was the best."""

    total: float
    tokens: list[float]
    is_greedy: bool


@dataclass
class _Row:
    """One input of the model, and the continuations whose scores are read from its last positions."""

    ids: tuple[int, ...]
    asked: list[tuple[int, list[int]]]  # (index of the pair, its continuation)

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return len(self.ids) - max(len(target) for _, target in self.asked)


@torch.inference_mode()
def score_sequences(model, pairs: list[tuple[list[int], list[int]]], max_batch: int = 32) -> list[Score]:
    """pairs: (prompt ids, continuation ids), none empty -> their scores, in order."""
    # "A" and "B" after one prompt are the same input: only the last token differs, and that one is not fed in.
    rows: dict[tuple[int, ...], _Row] = {}
    for number, (prompt, target) in enumerate(pairs):
        ids = tuple(prompt + target[:-1])
        rows.setdefault(ids, _Row(ids, [])).asked.append((number, target))
    scores: dict[int, Score] = {}
    cache = StaticCache(min(max_batch, len(rows)), max((len(ids) for ids in rows), default=0))
    # Sorted by tokens, inputs that begin alike are neighbours.
    for group, prefix in _groups(sorted(rows.values(), key=lambda row: row.ids)):
        batches = list(_batches(group, prefix, max_batch))
        _read_prefix(model, cache, group[0].ids[:prefix], rows=max(map(len, batches)))
        for batch in batches:
            for row, logits in zip(batch, _suffix_logits(model, cache, batch, prefix), strict=True):
                scores |= _row_scores(row, logits)
    return [scores[number] for number in range(len(pairs))]


def _groups(rows: list[_Row]) -> list[tuple[list[_Row], int]]:
    """Sorted rows -> groups of neighbours, each with the number of tokens they have in common (0: too few to share).

    A neighbour joins a group unless the common beginning would shrink below half of what it was.
    """
    groups: list[tuple[list[_Row], int]] = []
    alone: list[_Row] = []
    i = 0
    while i < len(rows):
        # The prefix ends where the first logits are asked for: those positions must be computed for each row.
        group, prefix = [rows[i]], rows[i].first
        for row in rows[i + 1 :]:
            common = _common(group[-1].ids, row.ids, min(prefix, row.first))
            # The first neighbour may shorten the prefix freely, later ones to no less than half: an input that shares
            # little must not take from a group what its others have in common.
            if common < max(MIN_PREFIX, prefix // 2 if len(group) > 1 else 0):
                break
            group.append(row)
            prefix = common
        i += len(group)
        if len(group) == 1:  # those that share nothing are read together, without a prefix
            alone += group
        else:
            groups.append((group, prefix))
    return groups + ([(alone, 0)] if alone else [])


def _common(a: tuple, b: tuple, limit: int) -> int:
    """Length of the common beginning, `limit` at most."""
    for n in range(min(len(a), len(b), limit)):
        if a[n] != b[n]:
            return n
    return min(len(a), len(b), limit)


def _read_prefix(model, cache: StaticCache, ids: tuple[int, ...], rows: int) -> None:
    """Reads the common beginning into row 0 and copies it to the others, over what the last group left there."""
    for start in range(0, len(ids), CHUNK):
        chunk = torch.tensor([ids[start : start + CHUNK]], device=model.device)
        positions = torch.arange(start, start + chunk.shape[1], device=model.device).unsqueeze(0)
        _forward(model, cache, chunk, positions, start + chunk.shape[1], keep=1)
    for row in range(1, rows if ids else 0):
        cache.copy_row(0, row, len(ids))


def _batches(group: list[_Row], prefix: int, max_batch: int):
    """Rows of like length together, so that little is padding."""
    batch: list[_Row] = []
    for row in sorted(group, key=lambda row: len(row.ids)):
        # Rows come shortest first, so this one is the longest so far and sets the width of the pass.
        size = len(row.ids) - prefix
        full = len(batch) == max_batch or size * (len(batch) + 1) > PASS_TOKENS
        padded = size * len(batch) >= FULL_PASS and size > 1.1 * (len(batch[0].ids) - prefix)
        if batch and (full or padded):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _suffix_logits(model, cache: StaticCache, batch: list[_Row], prefix: int) -> list[Tensor]:
    """For each row the fp32 logits of the positions from `row.first` on."""
    T = max(len(row.ids) for row in batch) - prefix
    suffixes = [list(row.ids[prefix:]) for row in batch]
    # Padding stands on the left, so the last positions, whose logits are asked for, are the same columns in all rows.
    tokens = torch.tensor([[0] * (T - len(ids)) + ids for ids in suffixes], device=model.device)
    positions = torch.tensor(
        [[-1] * (T - len(ids)) + list(range(prefix, prefix + len(ids))) for ids in suffixes], device=model.device
    )
    # The output layer runs for as many columns as the longest continuation needs; shorter ones drop the first of them.
    keep = max(len(row.ids) - row.first for row in batch)
    logits = _forward(model, cache, tokens, positions, T + prefix, keep)  # (B, keep, V)
    return [line[keep - (len(row.ids) - row.first) :] for row, line in zip(batch, logits, strict=True)]


def _forward(model, cache, tokens: Tensor, positions: Tensor, span: int, keep: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    mask = cache.look(slice(0, tokens.shape[0]), positions, span, dtype)
    return model(
        input_ids=tokens, attention_mask=mask, position_ids=positions.clamp(min=0), use_cache=True,
        logits_to_keep=keep, **{CACHE: cache},
    ).logits.float()  # fmt: skip


def _row_scores(row: _Row, logits: Tensor) -> dict[int, Score]:
    """logits of the row's last positions -> {index of the pair: its score}."""
    log_p = logits.log_softmax(dim=-1)
    best = log_p.argmax(dim=-1).tolist()
    result = {}
    for number, target in row.asked:
        # Position t predicts token t + 1, and the last token was not fed in: the last rows are the target's.
        places = log_p[-len(target) :]
        tokens = places.gather(-1, torch.tensor(target, device=places.device).unsqueeze(-1)).flatten().tolist()
        result[number] = Score(sum(tokens), tokens, best[-len(target) :] == target)
    return result
