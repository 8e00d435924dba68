"""Finds texts that are equal, or nearly: exact by a hash, nearly by MinHash with its bands on disk.

A text is a set of shingles: three neighbouring units, a unit being a Chinese character or a word of letters and digits.
The Jaccard similarity of two sets is estimated by MinHash (Broder 1997; signatures by `datasketch`): the share of equal
places among 160. A copy in which a tenth of the units was replaced, wherever they stand, keeps 0.9^3 = 0.73 of its
shingles: similarity 0.73 / (2 - 0.73) = 0.57. Candidates share one of 40 bands of 4 places: a pair of similarity s
does with probability 1 - (1 - s^4)^40, which is 0.99 at 0.57, 0.27 at 0.3 and 4e-7 at 0.01, where unrelated texts lie.
A candidate counts if its estimate reaches THRESHOLD, three standard errors below 0.57.

One file a band, 16 bytes a text: each is read alone, sorted and let go, so two million texts need 1.3 GB of
disk and a few hundred MB of memory. Texts shorter than NEAR_UNITS are compared exactly only: among short answers a
sentence that fits two facts (小满是夏季的节气, 秋分是秋季的节气) makes texts alike that teach different things.
"""

import functools
import hashlib
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

BANDS, PLACES = 40, 4
THRESHOLD = 0.45
NEAR_UNITS = 64
CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
UNITS = re.compile(f"[{CJK}]|[^\\W_{CJK}]+")
SHINGLE = 3
SPACE = re.compile(r"\s+")


def exact_key(text: str) -> int:
    """64 bits of the text without spaces and capitals; 2 million texts have a chance match once in 10^7 times."""
    plain = SPACE.sub("", text).casefold()
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(text: str) -> set[str]:
    """The sets that are compared: all runs of three units."""
    units = UNITS.findall(text.casefold())
    return {" ".join(units[i : i + SHINGLE]) for i in range(max(len(units) - SHINGLE + 1, 1))}


def signature(text: str) -> np.ndarray:
    """(160,) uint32; all zero for a text too short to have near copies."""
    if len(UNITS.findall(text, 0, 50 * NEAR_UNITS)) < NEAR_UNITS:
        return np.zeros(BANDS * PLACES, np.uint32)
    sketch = _empty_sketch().copy()
    sketch.update_batch(shingle.encode("utf-8", "surrogatepass") for shingle in shingles(text))
    return sketch.hashvalues


@functools.cache
def _empty_sketch():
    from datasketch import MinHash

    # crc32 is four times as fast as the default sha1; MinHash permutes the values anyway
    return MinHash(BANDS * PLACES, seed=1, hashfunc=zlib.crc32)


class Fingerprints:
    """Keys and signatures of texts 0, 1, 2, ..., appended to files in a folder."""

    def __init__(self, folder: Path, near: bool = True):
        self.folder, self.near = Path(folder), near
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sizes = {"keys": 8} | ({f"band_{b:02d}": 4 * PLACES for b in range(BANDS)} if near else {})
        self.files = {name: open(self.folder / f"{name}.bin", "wb") for name in self.sizes}

    def append(self, keys: list[int], signatures: np.ndarray) -> None:
        """keys: n integers below 2^64; signatures: (n, 160) uint32."""
        self.files["keys"].write(np.asarray(keys, np.uint64).tobytes())
        for b in range(BANDS) if self.near else ():
            self.files[f"band_{b:02d}"].write(np.ascontiguousarray(signatures[:, b * PLACES : (b + 1) * PLACES]))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def keys(self) -> np.ndarray:
        return np.fromfile(self.folder / "keys.bin", np.uint64)

    def bands(self) -> Iterator[np.ndarray]:
        """(n, 4) uint32 of one band after another; zero rows for short texts."""
        for b in range(BANDS) if self.near else ():
            yield np.fromfile(self.folder / f"band_{b:02d}.bin", np.uint32).reshape(-1, PLACES)


def find_copies(prints: Fingerprints, threshold: float = THRESHOLD) -> tuple[np.ndarray, np.ndarray]:
    """(of, similarity), one entry a text: the earlier text it is a copy of, or -1, and how near it is.

    The first of several copies stays. `of` always names a text that stays: a chain of small changes is not followed,
    so that nothing is dropped for a text that it is not itself near to. Similarity is 1 for exact copies.
    """
    keys = prints.keys()
    of, similarity = np.full(len(keys), -1, np.int64), np.zeros(len(keys), np.float32)
    first, copy = _same_key(keys)
    of[copy], similarity[copy] = first, 1.0
    pairs = _candidates(prints, of)  # of the texts that are left
    near = _estimate(prints, pairs)
    chosen = near >= threshold
    # Ascending by the later text: when a pair comes up, it is settled whether its earlier text stays. If that is a copy
    # itself, the later one may be near to it and yet not near to the text that stays.
    for (earlier, later), value in zip(pairs[chosen].tolist(), near[chosen].tolist()):
        if of[earlier] < 0 and value > similarity[later]:
            of[later], similarity[later] = earlier, value
    return of, similarity


def _same_key(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(first, later): for each text that is not the first of its key, the first."""
    # A stable sort brings equal keys together and keeps the texts of one key in their order, so each run of equal keys
    # begins with the first text. `maximum.accumulate` carries the place of the run's beginning along the run.
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    starts = np.concatenate([[True], ranked[1:] != ranked[:-1]])[: len(keys)]
    firsts = order[np.maximum.accumulate(np.where(starts, np.arange(len(keys)), 0))]
    return firsts[~starts], order[~starts]


def _candidates(prints: Fingerprints, of: np.ndarray) -> np.ndarray:
    """(m, 2) pairs (earlier, later) that share a band, ascending by the later text.

    Of a group that shares a band each text is paired with the group's first and with its own predecessor: two pairs a
    text however large the group is, and forty bands make up for what one leaves out.
    """
    pairs = np.zeros(0, np.uint64)
    for band in prints.bands():
        used = np.flatnonzero(band.any(axis=1) & (of < 0))  # neither too short nor an exact copy
        # The band's four numbers as one of 64 bits, so that texts can be sorted by it.
        words = np.ascontiguousarray(band[used]).view(np.uint64)
        keys = words[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ words[:, 1]  # a chance match is no harm: it is verified
        for earlier, later in (_same_key(keys), _predecessors(keys)):
            # A pair as one number, the later text in the upper half: sorting sorts by the later text.
            found = used[earlier].astype(np.uint64) | used[later].astype(np.uint64) << np.uint64(32)
            pairs = np.unique(np.concatenate([pairs, found]))
    return np.stack([pairs & np.uint64(2**32 - 1), pairs >> np.uint64(32)], axis=1).astype(np.int64)


def _predecessors(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(earlier, later): each text that is not the first of its key, with the one before it of that key."""
    order = np.argsort(keys, kind="stable")
    same = keys[order][1:] == keys[order][:-1]
    return order[:-1][same], order[1:][same]


def _estimate(prints: Fingerprints, pairs: np.ndarray) -> np.ndarray:
    """The share of equal places of each pair's signatures."""
    equal = np.zeros(len(pairs), np.int32)
    for band in prints.bands():
        for at in range(0, len(pairs), 2**20):  # a million pairs at a time hold 32 MB
            earlier, later = pairs[at : at + 2**20].T
            equal[at : at + 2**20] += (band[earlier] == band[later]).sum(axis=1)
    return equal / (BANDS * PLACES)
