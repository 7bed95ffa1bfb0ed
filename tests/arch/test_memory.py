"""Pre-activations of the sparse training step lie in one place, layer after layer and step after step."""

import torch

from tests import oracle


def test_a_step_takes_the_memory_of_the_one_before() -> None:
    model = oracle.transcoder("clt", "topk").train()
    x = oracle.normal(5, 3, 6)
    model(x)
    assert model._aside is not None
    place = model._aside.data_ptr()
    model(2 * x)
    assert model._aside.data_ptr() == place
    assert model._aside.shape == (5, 16)  # whole cache lines
    model(oracle.normal(7, 3, 6))
    assert model._aside.shape == (7, 16)


def test_it_changes_no_feature() -> None:
    for rule in ("topk", "batchtopk", "batchtopk_across", "groupmax"):
        model, x = oracle.transcoder("clt", rule).train(), oracle.normal(5, 3, 6)
        first = model.choose(x).dense()
        expected = model.eval().choose(x).dense()
        assert torch.equal(first, expected), rule
        assert (expected > 0).any(), rule


def test_a_rule_that_compares_layers_has_one_for_each() -> None:
    model = oracle.transcoder("clt", "batchtopk_across").train()
    model(oracle.normal(5, 3, 6))
    assert model._aside is None


def test_a_look_at_the_model_under_inference_mode_is_no_hindrance_to_training() -> None:
    model, x = oracle.transcoder("clt", "topk").train(), oracle.normal(5, 3, 6)
    with torch.inference_mode():
        model(x)
    model(x).y_hat.sum().backward()
