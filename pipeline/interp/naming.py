"""Features and tokens as the user names them.

LAYER/INDEX              3/1021      a feature; layers from 0 at the first that is read
LAYER/INDEX@POSITION     3/1021@4    a feature at one position of a prompt
TEXT, or #ID             Paris, #17  a token: a text that is one, as it is or with a space in front, or its number
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.data.models import LanguageModel
from pipeline.errors import UserError


class Place(NamedTuple):
    """A feature, and the position that it is meant at, where one is named."""

    layer: int
    feature: int
    position: int | None = None


def place(text: str) -> Place | None:
    """What LAYER/INDEX or LAYER/INDEX@POSITION names; None for a text that is neither."""
    found = re.fullmatch(r"\s*(\d+)/(\d+)(?:@(\d+))?\s*", text)
    return found and Place(int(found[1]), int(found[2]), None if found[3] is None else int(found[3]))


def no_feature(said: str, form: str = "LAYER/INDEX, such as 1/17") -> UserError:
    """For what names none. said: the setting or the text; form: how to write one there."""
    return UserError(f"{said} names no feature; write {form}")


def check_there(features: Sequence[tuple[int, int]], n_layers: int, d_features: int, said: str = "") -> None:
    """Raises UserError, which `said` begins, for (layer, feature) pairs that are not among n_layers of d_features."""
    wrong = [
        f"{layer}/{index}"
        for layer, index in features
        if layer not in range(n_layers) or index not in range(d_features)
    ]
    if wrong:
        there = f"layers are 0 to {n_layers - 1}, features 0 to {d_features - 1}"
        raise UserError(f"{said}there is no feature {', '.join(wrong[:5])}; {there}")


def features(ids: str, key: str) -> list[tuple[int, int]]:
    """[0/12,1/7], or a file with one on each line -> (layer, feature) pairs, as they come.

    key: what the user calls the setting. Raises UserError for what is neither.
    """
    is_list = ids.startswith("[") and ids.endswith("]")
    if not is_list and "/" in ids and not Path(ids).exists():
        is_list = all(part.strip().replace("/", "").isdigit() for part in ids.split(","))
    if not is_list and not Path(ids).is_file():
        raise UserError(f"{key}={ids} is no file and no list; write [0/12,1/7] (LAYER/INDEX)")
    entries = ids.strip("[]").split(",") if is_list else Path(ids).read_text().split()
    found = []
    for entry in entries:
        one = place(entry)
        if one is None or one.position is not None:
            raise no_feature(f"{key}: {entry.strip()!r}")
        found.append((one.layer, one.feature))
    return found


def token(lm: LanguageModel, text: str, key: str) -> int:
    """The id of the token that `text` names. key: what the user calls the setting. Raises UserError for a text that is
    none or several."""
    number = text.strip().removeprefix("#")
    if text.strip().startswith("#") and number.isdecimal() and int(number) < lm.vocab_size:
        return int(number)
    tried: list[list[int]] = [lm.tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, f" {text}")]
    for ids in tried:
        if len(ids) == 1 and ids[0] != lm.tokenizer.unk_token_id:
            return ids[0]
    why = "is no token" if len(tried[0]) == 1 else f"is {len(tried[0])} tokens"
    raise UserError(
        f'{key}: "{text}" {why} of model={lm.name}; give one token as it stands in a text, or #17 by number'
    )
