"""Features as the user names them: layer/feature."""

from pathlib import Path

from pipeline.errors import UserError


def named(ids: str, key: str, n_layers: int | None = None, d_features: int | None = None) -> list[tuple[int, int]]:
    """[0/12,1/7], or a file with one on each line -> (layer, feature) pairs, as they come.

    key: what the user calls the setting. Raises UserError for what is neither, and for features that there are not
    among n_layers of d_features.
    """
    is_list = ids.startswith("[") and ids.endswith("]")
    if not is_list and "/" in ids and not Path(ids).exists():
        is_list = all(part.strip().replace("/", "").isdigit() for part in ids.split(","))
    if not is_list and not Path(ids).is_file():
        raise UserError(f"{key}={ids} is no file and no list; write [0/12,1/7] (layer/feature)")
    entries = ids.strip("[]").split(",") if is_list else Path(ids).read_text().split()
    found = []
    for entry in entries:
        layer, slash, feature = entry.strip().partition("/")
        if not (slash and layer.isdecimal() and feature.isdecimal()):
            raise UserError(f"{key}: {entry.strip()!r} is no feature; write layer/feature, such as 0/12")
        found.append((int(layer), int(feature)))
    if n_layers is not None and d_features is not None:
        wrong = [f"{layer}/{feature}" for layer, feature in found if layer >= n_layers or feature >= d_features]
        if wrong:
            there = f"layers go from 0 to {n_layers - 1}, features from 0 to {d_features - 1}"
            raise UserError(f"{key}: there is no {', '.join(wrong[:5])}; {there}")
    return found
