"""How a quantity is measured and given."""

import statistics
import time


def spread(values) -> dict[str, float]:
    """{"median", "min", "max", "n"} of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def paired_ratios(first, second, pairs: int) -> list[float]:
    """CPU seconds of first() over those of second(), called in turns after one unmeasured call of each."""
    first(), second()
    ratios = []
    for _ in range(pairs):
        begin = time.process_time()
        first()
        middle = time.process_time()
        second()
        ratios.append((middle - begin) / (time.process_time() - middle))
    return ratios
