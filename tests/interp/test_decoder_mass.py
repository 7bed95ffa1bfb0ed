"""To which layers features write, against loops over tokens, features and layers."""

import pytest
import torch

from pipeline.arch.options import ArchOptions, Tie
from pipeline.core.activations import FixedThreshold
from pipeline.interp import decoder_mass
from tests import oracle

B, L, F, D = 7, 3, 11, 6

VARIANTS = {
    "clt": oracle.arch_options("clt"),
    "clt, next layer": oracle.arch_options("clt", max_reach=1),
    "per_layer": oracle.arch_options("per_layer"),
    "skip": oracle.arch_options("skip"),
    "tied": oracle.arch_options("tied"),
    "tied, offset": oracle.arch_options("tied", offset=True),
    "tied to target, offset": oracle.arch_options("tied", tie=Tie.target, offset=True),
    "sae": oracle.arch_options("sae"),
    "matryoshka": oracle.arch_options("matryoshka"),
}


def transcoder(options: ArchOptions):
    return oracle.transcoder(options, FixedThreshold(oracle.normal(L, F, seed=3).abs()), dtype=torch.float64)


@pytest.mark.parametrize("batch_tokens", [2, 100])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_what_is_written_is_a_sum_over_tokens_and_active_features(name: str, batch_tokens: int) -> None:
    options = VARIANTS[name]
    model, x, context = transcoder(options), oracle.normal(B, L, D), torch.tensor([0, 0, 0, 1, 1, 3, 3])
    features, weights = model(x, True).features, model.weights()
    expected = torch.zeros(4, L, L, dtype=torch.float64)
    for b in range(B):
        for l in range(L):
            for i in range(F):
                if features[b, l, i] == 0:
                    continue
                for m in range(L):
                    if oracle.writes(options, l, m):
                        row = oracle.sent_row(options, weights, l, m, i, features[b, l, i])
                        expected[context[b], l, m] += row.square().sum().sqrt()
    assert expected[0].diagonal().min() > 0, "something is active in each layer"
    got = decoder_mass.by_context(model, lambda rows: x[rows], context, 4, batch_tokens)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    own = decoder_mass.shares(got.sum(dim=0))["own"]
    one = name in ("per_layer", "skip", "sae")
    assert own == 1 if one else own < 1


def test_a_transform_writes_what_it_makes_of_its_input() -> None:
    model, x = transcoder(oracle.arch_options("molt")), oracle.normal(B, L, D)
    features = model(x, True).features
    expected = torch.zeros(L, L, dtype=torch.float64)
    for l in range(L):
        for t in range(F):
            alone = torch.zeros_like(features)
            alone[:, l, t] = features[:, l, t]
            expected[l, l] += (model.decode(alone, x) - model.b_dec)[:, l].norm(dim=1).sum()
    got = decoder_mass.by_context(model, lambda rows: x[rows], torch.zeros(B, dtype=torch.int64), 1, 100)[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert decoder_mass.shares(got)["own"] == 1


def test_decoders_count_all_features_alike() -> None:
    model = transcoder(VARIANTS["clt, next layer"])
    expected = torch.zeros(L, L, dtype=torch.float64)
    for l, W in enumerate(model.W_dec):
        for slot in range(W.shape[1]):
            expected[l, l + slot] = sum(row.square().sum().sqrt() for row in W[:, slot])
    torch.testing.assert_close(decoder_mass.of_decoders(model), expected, rtol=1e-12, atol=0)
    assert expected[0, 2] == 0, "beyond the reach"


def test_shares_by_hand() -> None:
    found = decoder_mass.shares(torch.tensor([[1.0, 3.0], [0.0, 6.0]]))
    assert found == {
        "matrix": [[1, 3], [0, 6]],
        "of_source": [[0.25, 0.75], [0, 1]],
        "of_target": [[1, 0], [1 / 3, 2 / 3]],
        "own": 0.7,
        "by_distance": [0.7, 0.3],
    }


def test_without_writes_there_are_no_shares() -> None:
    found = decoder_mass.shares(torch.zeros(2, 2))
    assert found["own"] is None
    assert found["of_source"] == [[None, None], [None, None]]


def test_one_feature_space_over_all_layers_has_no_matrix() -> None:
    model = oracle.transcoder(oracle.arch_options("crosscoder"), FixedThreshold(torch.zeros(1, F)))
    assert "arch=crosscoder has one feature space" in (decoder_mass.no_matrix(model) or "")
    assert decoder_mass.no_matrix(transcoder(VARIANTS["clt"])) is None
