"""How a quantity that was measured several times is given."""

import statistics


def spread(values) -> dict[str, float]:
    """{"median", "min", "max", "n"} of repeated measurements."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}
