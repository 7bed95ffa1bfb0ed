"""Edits of features, as they are written and as they are applied.

    LAYER/INDEX[@WHERE]=VALUE      set            1/342@4=0       ablate
    LAYER/INDEX[@WHERE]*FACTOR     scale          0/17@-1*2
    LAYER/INDEX[@WHERE]+VALUE      add            2/5@2:6+-1.5
    NAME[@WHERE]...                  the same for each feature of a supernode

WHERE is a position, several with commas (2,5,-1), a range (2:6, :4, 3:), `last`, `prompt` (every position of the
prompt), `new` (every generated token) or `all` (both; what is meant where none is given). Negative positions count from
the prompt's end. Position 0 has no features: it is left out of ranges, and refused by its number. A feature of a
supernode that names a position is edited there, unless the edit says where.

Every edit is a map a -> scale a + add of one activation. Edits of the same activation act in the order in which they
are given. A result of 0 is an inactive feature; a negative one is allowed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from pipeline.core.pattern import Pattern, from_pairs
from pipeline.errors import UserError
from pipeline.interp import naming
from pipeline.interp.naming import Place

PATTERN = re.compile(r"(?P<what>[^@=*+]+?)\s*(?:@(?P<where>[^=*+]+?))?\s*(?P<how>[=*+])\s*(?P<value>[^=*+]+)")

Values = tuple[Pattern, Tensor]
"""Features of one layer: a pattern over n T tokens, and values [nnz]."""


Supernodes = Mapping[str, Sequence[Place]]
"""Features by the name of their group, with positions where they are edited there."""


class Where(NamedTuple):
    """Positions of a prompt of some length."""

    positions: tuple[int, ...]
    """Ascending, none of them 0."""
    new: bool = False
    """Every token behind the prompt too."""


class Edit(NamedTuple):
    """a -> scale a + add, for one feature at some positions."""

    layer: int
    feature: int
    where: Where
    scale: float
    add: float


def parse(
    text: str, n_tokens: int, n_layers: int, d_features: int, supernodes: Supernodes | None = None
) -> Iterator[Edit]:
    """The edits of one piece of text, for a prompt of n_tokens. UserError for what is none."""
    found = PATTERN.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"edit {text.strip()!r}: not of the form LAYER/INDEX@WHERE=VALUE; write 1/342@4=0 (set), 0/17@last*2 "
            "(scale) or 2/5@all+1.5 (add)"
        )
    value = number(found["value"], text)
    scale, add = {"=": (0.0, value), "*": (value, 0.0), "+": (1.0, value)}[found["how"]]
    said = None if found["where"] is None else where(found["where"], n_tokens)
    for place in features(found["what"], n_layers, d_features, supernodes):
        at = said
        if at is None:
            at = where("all" if place.position is None else str(place.position), n_tokens)
        yield Edit(place.layer, place.feature, at, scale, add)


def where(text: str, n_tokens: int) -> Where:
    """What `@WHERE` means for a prompt of n_tokens. UserError for a position that there is not, and for 0."""
    positions: set[int] = set()
    new = False
    for piece in (piece.strip() for piece in text.split(",")):
        if piece in ("all", "prompt", "new"):
            positions |= set(range(1, n_tokens)) if piece != "new" else set()
            new |= piece != "prompt"
        elif ":" in piece:
            positions |= set(_range(piece, n_tokens))
        else:
            positions.add(position(piece, n_tokens))
    if not positions and not new:
        raise UserError(f"@{text} names no position of the prompt's {n_tokens} tokens but 0, which has no features")
    return Where(tuple(sorted(positions)), new)


def position(text: str, n_tokens: int) -> int:
    """One position of a prompt: a number, negative from the end, or `last`. UserError as for `where`."""
    if text != "last" and not re.fullmatch(r"[+-]?\d+", text):
        raise UserError(f"@{text}: no position; give a number, 2:6, last, prompt, new or all")
    given = -1 if text == "last" else int(text)
    found = given + n_tokens if given < 0 else given
    if found not in range(n_tokens):
        raise UserError(f"@{text}: the prompt has {n_tokens} tokens; give 1 to {n_tokens - 1}, or -1 for the last")
    if found == 0:
        raise UserError(f"@{text}: position 0 has no features, it keeps its own MLP output; give 1 to {n_tokens - 1}")
    return found


def features(text: str, n_layers: int, d_features: int, supernodes: Supernodes | None = None) -> Iterator[Place]:
    """Features by LAYER/INDEX or by the name of their group, with commas. UserError for those that there are not."""
    for piece in _names(text, supernodes or {}):
        found = naming.place(piece)
        if supernodes is not None and piece in supernodes:
            places = list(supernodes[piece])
        elif found is not None and found.position is None:
            places = [found]
        else:
            known = f"; the supernodes are {', '.join(supernodes)}" if supernodes else ""
            raise naming.no_feature(repr(piece), f"LAYER/INDEX, or a name in supernodes=FILE{known}")
        naming.check_there([(place.layer, place.feature) for place in places], n_layers, d_features, f"{piece}: ")
        yield from places


def _names(text: str, supernodes: Supernodes) -> Iterator[str]:
    """What commas divide, but for the commas within the name of a group."""
    parts = text.split(",")
    while parts:
        ends = range(len(parts), 0, -1)
        n = next((end for end in ends if ",".join(parts[:end]).strip() in supernodes), 1)
        yield ",".join(parts[:n]).strip()
        parts = parts[n:]


def pieces(text: str) -> list[str]:
    """The edits of a list, with or without brackets and quotes: commas divide edits, and positions within one.

    >>> pieces("[1/3@2,5=0, 0/17@-1*2]")
    ['1/3@2,5=0', '0/17@-1*2']
    """
    inside = re.sub(r"['\"]", "", text.strip().removeprefix("[").removesuffix("]"))
    found: list[str] = []
    whole = ""
    for piece in inside.split(","):
        whole = f"{whole},{piece}" if whole else piece
        if re.search(r"[=*+]\s*[^=*+,]", whole):
            found.append(whole.strip())
            whole = ""
    return found + ([whole.strip()] if whole.strip() else [])


def read(text: str) -> list[str]:
    """What `edits=` holds: edits, or a YAML or JSON file with a list of them."""
    if not re.search(r"\.(ya?ml|json)$", text.strip()):
        return pieces(text)
    content = _loaded(Path(text.strip()), "edits")
    if not isinstance(content, list) or not all(isinstance(one, str) for one in content):
        raise UserError(f"{text}: holds no list of edits; write one a line, as in - 1/342@4=0")
    return content


def read_supernodes(file: Path, n_layers: int) -> dict[str, list[Place]]:
    """Groups by name, from {"name": ["0/17", "1/3@4", ...]}, or from a graph's JSON or the list in it,
    [["name", "LAYER_INDEX_POSITION", ...], ...]. Nodes that are no features (layer n_layers or more: logits) are left
    out. UserError for a file of another form."""
    content = _loaded(file, "supernodes")
    for key in ("qParams", "supernodes"):
        content = content[key] if isinstance(content, dict) and key in content else content
    if isinstance(content, list) and all(isinstance(one, dict) and {"label", "nodes"} <= one.keys() for one in content):
        content = {str(one["label"]): one["nodes"] for one in content}
    elif isinstance(content, list) and all(isinstance(one, list) and len(one) > 1 for one in content):
        content = {str(one[0]): one[1:] for one in content}
    if not isinstance(content, dict) or not all(isinstance(members, list) for members in content.values()):
        raise UserError(f'{file}: holds no supernodes; write {{"name": ["0/17", "1/3@4"]}}')
    return {str(name): [*_members(file, members, n_layers)] for name, members in content.items()}


def _members(file: Path, members: list[Any], n_layers: int) -> Iterator[Place]:
    for member in map(str, members):
        if node := re.fullmatch(r"(\d+)_(\d+)_(\d+)", member):
            if int(node[1]) < n_layers:
                yield Place(int(node[1]), int(node[2]), int(node[3]))
        elif found := naming.place(member):
            yield found
        elif not re.match(r"[A-Za-z]", member):
            raise naming.no_feature(f"{file}: {member!r}", "LAYER/INDEX or LAYER_INDEX_POSITION")


def _loaded(file: Path, what: str) -> Any:
    if not file.is_file():
        raise UserError(f"{what}={file}: there is no such file; give a YAML or JSON file")
    try:
        return yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{what}={file}: no YAML or JSON ({str(error).splitlines()[0]}); mend it") from error


def number(text: str, edit: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise UserError(f"edit {edit.strip()!r}: {text.strip()!r} is no number; give one, as in 1/342@4=0")
    return value


def _range(text: str, n_tokens: int) -> Iterator[int]:
    found = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text)
    if found is None:
        raise UserError(f"@{text}: no range; write 2:6 (2 to 5), :4 or 3:")
    first, stop = (int(one) if one else None for one in found.groups())
    for edge in (first, stop):
        if edge is not None and not -n_tokens <= edge <= n_tokens:
            raise UserError(f"@{text}: the prompt has {n_tokens} tokens; give positions 1 to {n_tokens - 1}")
    return (at for at in range(*slice(first, stop).indices(n_tokens)) if at > 0)


class Compiled:
    """Edits of n prompts side by side, for the tokens at positions `first` to `first + length` of each."""

    def __init__(
        self, edits: Sequence[Sequence[Edit]], n_prompt: int, first: int, length: int, d_features: int
    ) -> None:
        """edits: of each of n rows. n_prompt: tokens of the prompt; those behind it are generated."""
        self.d_features = d_features
        self.maps: dict[int, dict[int, tuple[float, float]]] = {}
        for row, of_row in enumerate(edits):
            for layer, feature, at, scale, add in of_row:
                behind = range(max(first, n_prompt), first + length) if at.new else ()
                for position in (*at.positions, *behind):
                    if first <= position < first + length:
                        key = (row * length + position - first) * d_features + feature
                        of_layer = self.maps.setdefault(layer, {})
                        before = of_layer.get(key, (1.0, 0.0))
                        of_layer[key] = (before[0] * scale, before[1] * scale + add)

    def apply(self, layer: int, pattern: Pattern, values: Tensor) -> Values:
        """The features of a layer with its edits made; the same objects where it has none."""
        if layer not in self.maps:
            return pattern, values
        device, maps = values.device, sorted(self.maps[layer].items())
        keys = torch.tensor([key for key, _ in maps], device=device)
        scale, add = torch.tensor([of for _, of in maps], dtype=values.dtype, device=device).unbind(1)
        old = pattern.tokens * self.d_features + pattern.indices  # ascending
        edited = torch.isin(old, keys)
        now = values.new_zeros(len(keys)).index_put((torch.searchsorted(keys, old[edited]),), values[edited])
        new = scale * now + add
        keep = new != 0
        all_keys = torch.cat([old[~edited], keys[keep]])
        order = all_keys.argsort()
        all_keys = all_keys[order]
        tokens, indices = all_keys // self.d_features, all_keys % self.d_features
        made = from_pairs(tokens, indices, pattern.n_tokens, pattern.n_features)
        return made, torch.cat([values[~edited], new[keep]])[order]
