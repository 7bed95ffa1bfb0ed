"""Parameter counts, and the width that fits a number of them."""

from dataclasses import replace

import pytest

from pipeline.arch import size, table
from pipeline.arch.base import Dims
from pipeline.arch.options import ArchOptions
from pipeline.core import activations
from pipeline.core.options import ActivationOptions
from pipeline.errors import UserError
from tests import oracle

DIMS = Dims(3, 10)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_the_count_is_that_of_a_real_transcoder(architecture: str, activation: str) -> None:
    options, rule = oracle.arch_options(architecture, d_features=22), oracle.activation_options(activation)
    built = table.build(options, DIMS, activations.build(rule, table.n_sources(options, DIMS), 22))
    assert size.n_parameters(options, DIMS, rule) == sum(p.numel() for p in built.parameters())


def test_the_count_of_a_clt_by_hand() -> None:
    # 3 encoders and 6 decoders of 24 x 10, biases 3 x 24 and 3 x 10; thresholds are learned too.
    options = ArchOptions("clt", d_features=24)
    assert size.n_parameters(options, DIMS, oracle.activation_options("topk")) == 9 * 240 + 72 + 30
    assert size.n_parameters(options, DIMS, oracle.activation_options("jumprelu")) == 9 * 240 + 72 + 30 + 72


@pytest.mark.parametrize("wanted", [3000, 10_000, 2_000_000])
@pytest.mark.parametrize("architecture", sorted(table.ARCHS))
def test_the_width_is_the_largest_that_fits(architecture: str, wanted: int) -> None:
    options, rule = oracle.arch_options(architecture), oracle.activation_options("topk")
    width, step = size.d_features_for(options, DIMS, rule, wanted), 11 if architecture == "molt" else 1
    assert width % step == 0
    assert size.n_parameters(replace(options, d_features=width), DIMS, rule) <= wanted
    assert size.n_parameters(replace(options, d_features=width + step), DIMS, rule) > wanted


def test_the_width_divides_into_the_groups_of_groupmax() -> None:
    options, rule = oracle.arch_options("molt"), ActivationOptions("groupmax", k_per_layer=[4, 6, 1])
    width = size.d_features_for(options, DIMS, rule, 40_000)
    assert width % (11 * 12) == 0
    assert size.n_parameters(replace(options, d_features=width + 132), DIMS, rule) > 40_000


def test_options_that_a_narrow_transcoder_could_not_have_do_not_narrow_the_search() -> None:
    options = ArchOptions("matryoshka", random_prefixes=30)
    plain = size.d_features_for(ArchOptions("clt"), DIMS, oracle.activation_options("topk"), 20_000)
    annealed = ActivationOptions("topk", k=20, k_start=40, k_anneal=0.5)
    assert size.d_features_for(options, DIMS, annealed, 20_000) == plain > 40


def test_prefixes_that_fix_the_width_are_refused() -> None:
    options = ArchOptions("matryoshka", d_features=8, prefixes=[4, 8])
    with pytest.raises(UserError, match=r"arch.prefixes=\[4, 8\] fixes arch.d_features.*leave out"):
        size.d_features_for(options, DIMS, oracle.activation_options("topk"), 500)


def test_too_few_parameters_are_refused() -> None:
    with pytest.raises(UserError, match=r"arch.d_features=1, the least there is, more than 50"):
        size.d_features_for(ArchOptions("clt"), DIMS, oracle.activation_options("topk"), 50)
