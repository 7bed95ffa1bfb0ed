"""Parameter counts, and the width that fits a number of them."""

from dataclasses import replace

import pytest

from pipeline.arch import size, table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.errors import UserError
from tests import oracle

DIMS = Dims(3, 10)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_the_count_is_that_of_a_real_transcoder(architecture: str, activation: str) -> None:
    options, rule = (
        ArchOptions(architecture, d_features=24, **table.ARCHS[architecture].fixed),
        oracle.activation_options(activation),
    )
    built = table.build(options, DIMS, activations.build(rule, table.n_sources(options, DIMS), 24))
    assert size.n_parameters(options, DIMS, rule) == sum(p.numel() for p in built.parameters())


def test_the_count_of_a_clt_by_hand() -> None:
    # 3 encoders and 6 decoders of 24 x 10, biases 3 x 24 and 3 x 10; thresholds are learned too.
    options = ArchOptions("clt", d_features=24)
    assert size.n_parameters(options, DIMS, oracle.activation_options("topk")) == 9 * 240 + 72 + 30
    assert size.n_parameters(options, DIMS, oracle.activation_options("jumprelu")) == 9 * 240 + 72 + 30 + 72


@pytest.mark.parametrize("wanted", [500, 10_000, 2_000_000])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_the_width_is_the_largest_that_fits(architecture: str, wanted: int) -> None:
    options, rule = oracle.arch_options(architecture), oracle.activation_options("topk")
    width = size.d_features_for(options, DIMS, rule, wanted)
    assert size.n_parameters(replace(options, d_features=width), DIMS, rule) <= wanted
    assert size.n_parameters(replace(options, d_features=width + 1), DIMS, rule) > wanted


def test_too_few_parameters_are_refused() -> None:
    with pytest.raises(UserError, match="a single feature, more than 50"):
        size.d_features_for(ArchOptions("clt"), DIMS, oracle.activation_options("topk"), 50)
