"""Where tensors have their features: said of every tensor of every architecture and rule, and true."""

from dataclasses import replace

import pytest
import torch

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.rows import FeatureRows, joined
from pipeline.arch.table import ARCHS
from pipeline.core import activations
from pipeline.core.activations import ACTIVATIONS, FixedThreshold
from pipeline.core.options import Rank
from pipeline.dist.shard import Shard, shards
from tests import oracle

B, L, D = 5, 3, 6
F, WIDE = 22, 44
"""None of their lengths is that of another axis, in transforms neither."""

PAIRS = [(name, rule) for name in sorted(ARCHS) for rule in sorted(ACTIVATIONS) if oracle.allowed(name, rule)]

VARIANTS = {
    "clt": [{"skip": True}, {"max_reach": 1}],
    "tied": [{"offset": True}, {"tie": "target", "skip": True}],
    "matryoshka": [{"prefixes": [3, 9, F]}],
}


def shape_of(architecture: str, rule: str, d_features: int) -> Transcoder:
    return oracle.transcoder(architecture, rule, L, d_features, D)


@pytest.mark.parametrize(("architecture", "rule"), PAIRS)
def test_the_axis_of_features_is_the_one_that_grows_with_them(architecture: str, rule: str) -> None:
    small, wide = shape_of(architecture, rule, F), shape_of(architecture, rule, WIDE)
    kinds = [
        (small.state_dict(), wide.state_dict(), small.feature_rows),
        (small.weights(), wide.weights(), small.stored_rows),
    ]
    for before, after, rows_of in kinds:
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            sizes = enumerate(zip(tensor.shape, after[name].shape, strict=True))
            grown = [axis for axis, (a, b) in sizes if a != b]
            rows, more = rows_of(name, F), rows_of(name, WIDE)
            assert grown == ([] if rows is None else [rows.axis]), name
            if rows is not None and more is not None:
                assert rows.length == tensor.shape[rows.axis], name
                assert more.length == after[name].shape[rows.axis], name
    for name in small.state_dict():
        rows = small.feature_rows(name, F)
        assert small.feature_axis(name) == (None if rows is None else rows.axis)


def test_a_tensor_that_nothing_is_said_of_is_refused() -> None:
    model = shape_of("clt", "topk", F)
    for name in ("scales.0", "activation.new", "W_new"):
        with pytest.raises(KeyError):
            model.feature_axis(name)


def part_of(model: Transcoder, shard: Shard) -> Transcoder:
    """A transcoder with the features of a shard, its tensors cut out as the rows say."""
    options = replace(model.options, d_features=shard.n, prefixes=None, random_prefixes=None)
    part = table.build(options, model.dims, FixedThreshold(torch.zeros(model.n_sources, shard.n).double())).double()
    cut = {}
    for name, tensor in model.state_dict().items():
        rows = model.feature_rows(name, shard.d_features)
        cut[name] = tensor
        if rows is not None:
            cut[name] = torch.cat([tensor.narrow(rows.axis, r.start, len(r)) for r in rows.of(shard.ranges)], rows.axis)
    part.load_state_dict(cut)
    return part.eval()


@pytest.mark.parametrize(
    ("architecture", "more"),
    [(name, more) for name in sorted(ARCHS) for more in ({}, *VARIANTS.get(name, []))],
    ids=str,
)
@torch.no_grad()
def test_a_part_of_the_rows_is_a_part_of_the_features_and_the_parts_are_the_whole(
    architecture: str, more: dict[str, object]
) -> None:
    options = oracle.arch_options(architecture, d_features=F, **more)
    n_sources = table.n_sources(options, Dims(L, D))
    whole = oracle.transcoder(options, FixedThreshold(torch.zeros(n_sources, F).double()), L, F, D)
    for name, buffer in whole.named_buffers():
        if name in ("offset", "y_scale"):
            buffer.copy_(oracle.normal(*buffer.shape, seed=5))
    x = oracle.normal(B, L, D)
    out, sums = whole(x), torch.zeros(B, L, D).double()
    base = whole.decode(torch.zeros_like(out.features), x)
    found = shards(options, oracle.activation_options("topk"), n_sources, 2)
    for shard in found:
        part = part_of(whole, shard)
        own, ids = part(x), shard.ids()
        assert torch.allclose(own.features, out.features[:, :, ids])
        assert torch.allclose(part.decoder_norms(), whole.decoder_norms()[:, ids])
        sums += own.y_hat - base
        for name, tensor in part.weights().items():
            rows = whole.stored_rows(name, F)
            of_whole = whole.weights()[name]
            if rows is not None:
                of_whole = of_whole.index_select(
                    rows.axis, torch.cat([torch.tensor(r) for r in map(list, rows.of(shard.ranges))])
                )
            assert torch.equal(tensor, of_whole), name
    assert torch.allclose(sums + base, out.y_hat)


def test_the_norms_that_a_rule_ranks_by_are_rows() -> None:
    rule = activations.build(replace(oracle.activation_options("topk"), rank=Rank.norm), L, F)
    rule.fixed_norms = torch.zeros(L, F)
    model = oracle.transcoder("clt", rule, L, F, D)
    assert model.feature_axis("activation.fixed_norms") == 1


def test_rows_of_features_that_have_several_one_or_none() -> None:
    rows = FeatureRows(0, ((2, 3), (3, 0), (4, 1)))
    assert rows.length == 10
    assert rows.of([range(9)]) == [range(10)]
    assert rows.of([range(1, 2), range(4, 7)]) == [range(3, 8)]
    assert rows.of([range(1), range(6, 8)]) == [range(3), range(7, 9)]
    assert rows.of([range(2, 5)]) == []


def test_ranges_that_follow_each_other_are_one() -> None:
    assert joined([range(2, 4), range(4, 4), range(4, 6), range(1, 2)]) == [range(2, 6), range(1, 2)]
