"""Features take the values that they have at another place: of the same prompt, or of another one."""

import torch

from pipeline.errors import UserError
from pipeline.interp.original import Prompt
from pipeline.interp.replacement import ReplacementModel
from pipeline.interp.steering import feature_edits
from pipeline.interp.steering.feature_edits import Edit, Supernodes, Where
from pipeline.interp.steering.intervene import Before, unedited
from pipeline.interp.steering.intervene_options import InterveneOptions, SwapOptions


@torch.inference_mode()
def swap(
    model: ReplacementModel,
    prompt: Prompt,
    options: SwapOptions,
    how: InterveneOptions,
    supernodes: Supernodes | None = None,
) -> list[Edit]:
    """The edits that set each chosen feature, at one position of a prompt, to its activation at another: on the
    original or in the replacement, as `how` says. A feature that is inactive there is set to 0. UserError for places
    and features that there are not."""
    if options.features is None:
        raise UserError("swap.from_prompt and swap.at say where features come from; add swap.features=all, or some")
    here = model.tokens(prompt)
    there = here if options.from_prompt is None else model.tokens(options.from_prompt)
    at = feature_edits.position(options.at, here.shape[1])
    from_at = feature_edits.position(options.from_at or options.at, there.shape[1])
    if options.from_prompt is None and at == from_at:
        raise UserError(f"swap.at={options.at} is the same place; add swap.from_prompt='other text' or swap.from_at=3")
    own, other = (_at(unedited(model, one, how), place) for one, place in ((here, at), (there, from_at)))
    if options.features == "all":
        wanted = sorted(own.keys() | other.keys())
    else:
        places = feature_edits.features(options.features, model.lm.n_layers, model.transcoder.d_features, supernodes)
        wanted = list(dict.fromkeys((place.layer, place.feature) for place in places))
    return [Edit(layer, feature, Where((at,)), 0.0, other.get((layer, feature), 0.0)) for layer, feature in wanted]


def _at(before: Before, position: int) -> dict[tuple[int, int], float]:
    """(layer, feature) -> activation, of those that are active at a position of one context."""
    found: dict[tuple[int, int], float] = {}
    for layer, (pattern, values) in enumerate(before.features):
        first, last = (int(edge) for edge in pattern.offsets[position : position + 2])
        ids, amounts = pattern.indices[first:last].tolist(), values[first:last].tolist()
        found |= {(layer, feature): amount for feature, amount in zip(ids, amounts, strict=True) if amount}
    return found
