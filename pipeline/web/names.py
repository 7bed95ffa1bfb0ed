"""Names in sentences."""

from collections.abc import Sequence


def listed(names: Sequence[str], most: int = 6) -> str:
    """a, b and c; the first few of many."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} others"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
