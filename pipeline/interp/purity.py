"""Does one feature stand for one country? On held-out text of the built-in world.

    share_i(c) = activation of feature i on tokens that name country c / its activation on all tokens

For each country one feature is chosen on one half of the text: the highest share among the features that are active
on at least half of the tokens that name c. Its share on the other half is what counts, since the best of many shares
is too high on the text that it was the best on. A country for which no feature can be chosen counts as 0, as does a
feature that never fires on the other half.

    mean       of the shares over all countries
    pure       countries whose feature has a share of at least 0.8
    active_on  mean over countries of the part of the tokens that name c on which its feature is active
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.activations import FixedThreshold
from pipeline.data.world import facts
from pipeline.interp.edits import Sides
from pipeline.interp.world_text import Mass, Text, inputs

ACTIVE_ON = 0.5
PURE = 0.8
N_COUNTRIES = len(facts.COUNTRIES)


def choose(mass: Mass) -> Tensor:
    """For each country the feature with the highest share, counted over all sources; -1: none. int64 [C]"""
    share = (mass.activation / mass.activation.sum(dim=-1, keepdim=True)).nan_to_num(0.0)[..., :N_COUNTRIES]
    share = share.where(mass.active_on() >= ACTIVE_ON, 0.0).flatten(0, 1)
    best, feature = share.max(dim=0)
    return feature.where(best > 0, -1)


@torch.inference_mode()
def score(sides: Sides, feature: Tensor, text: Text, batch_tokens: int) -> dict[str, Any]:
    """Of the features chosen for each country, int64 [C], on text that they were not chosen on."""
    n_tokens = torch.zeros(N_COUNTRIES, dtype=torch.float64)
    total, own, fires = torch.zeros(3, N_COUNTRIES, dtype=torch.float64)
    for x, country in inputs(sides, text, batch_tokens, "purity"):
        values = _values(sides, x, feature.clamp(min=0)).double().cpu()
        here = F.one_hot(country.cpu(), N_COUNTRIES + 1)[:, :N_COUNTRIES].double()
        n_tokens += here.sum(dim=0)
        total += values.sum(dim=0)
        own += (values * here).sum(dim=0)
        fires += ((values > 0) * here).sum(dim=0)
    found = feature >= 0
    share, active_on = (
        torch.where(found, part / whole, 0.0).nan_to_num(0.0) for part, whole in ((own, total), (fires, n_tokens))
    )
    return {
        "mean": float(share.mean()),
        "pure": int((share >= PURE).sum()),
        "n_countries": N_COUNTRIES,
        "n_tokens": int(n_tokens.sum()),
        "active_on": float(active_on.mean()),
        "countries": {
            country.name: _country(sides, int(feature[c]), float(share[c]), float(active_on[c]), int(n_tokens[c]))
            for c, country in enumerate(facts.COUNTRIES)
        },
    }


def _country(sides: Sides, feature: int, share: float, active_on: float, n_tokens: int) -> dict[str, Any]:
    source, number = divmod(feature, sides.transcoder.d_features)
    where = {"layer": source, "feature": number} if feature >= 0 else {"layer": None, "feature": None}
    return {**where, "share": share, "active_on": active_on, "n_tokens": n_tokens}


def _values(sides: Sides, x: Tensor, feature: Tensor) -> Tensor:
    """Activations of single features, counted over all sources. x [B, L, D], feature [C] -> [B, C]"""
    model, rule = sides.transcoder, sides.transcoder.activation
    assert isinstance(rule, FixedThreshold)
    read = model.inputs(x)
    values = x.new_zeros(len(x), len(feature))
    for source in range(model.n_sources):
        mine = (feature // model.d_features == source).nonzero().squeeze(1)
        ids = feature[mine] % model.d_features
        pre_acts = model.pre_acts_of(read[source], source, ids)
        values[:, mine] = pre_acts.where(pre_acts > rule.threshold[source][ids], 0.0)
    return values
