"""Gradients kept as terms are the gradients that autograd would have written."""

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.core import deferred, losses
from pipeline.core.options import Kernels
from pipeline.core.sparse import bag, fixed_k
from tests import oracle


def test_terms_add_up_over_backward_passes_and_with_a_dense_gradient() -> None:
    table = oracle.normal(7, 4).requires_grad_()
    patterns = [fixed_k(torch.tensor([[2, 5], [0, 2]]), 7), fixed_k(torch.tensor([[1], [1], [6]]), 7)]
    values = [oracle.normal(4, seed=1), oracle.normal(3, seed=2)]

    def backward() -> None:
        for pattern, value in zip(patterns, values, strict=True):
            bag(pattern, value, table).square().sum().backward()
        table.square().sum().backward()

    backward()
    expected, table.grad = table.grad, None
    deferred.want(table)
    backward()
    assert table.grad is not None
    assert torch.equal(table.grad, 2 * table)  # the dense part alone
    assert len(deferred.terms(table)) == 2
    deferred.materialise(table)
    assert expected is not None
    assert oracle.normwise(table.grad, expected) < 1e-12
    assert deferred.terms(table) == []


def test_a_tensor_that_did_not_ask_gets_its_gradient_as_always() -> None:
    table, other = oracle.normal(7, 4).requires_grad_(), oracle.normal(7, 4).requires_grad_()
    deferred.want(other)
    pattern = fixed_k(torch.tensor([[2, 5]]), 7)
    bag(pattern, oracle.normal(2), table).sum().backward()
    (bag(pattern, oracle.normal(2), other * 2)).sum().backward()  # a table that is computed is no leaf
    assert table.grad is not None
    assert other.grad is not None
    assert deferred.terms(other) == []


def test_what_is_no_longer_wanted_is_materialised() -> None:
    table = oracle.normal(7, 4).requires_grad_()
    deferred.want(table)
    bag(fixed_k(torch.tensor([[2, 5]]), 7), oracle.normal(2), table).sum().backward()
    assert table.grad is None
    deferred.want(table, wanted=False)
    assert table.grad is not None
    assert not deferred.wanted(table)


def test_discarded_terms_leave_nothing() -> None:
    table = oracle.normal(7, 4).requires_grad_()
    deferred.want(table)
    bag(fixed_k(torch.tensor([[2, 5]]), 7), oracle.normal(2), table).sum().backward()
    deferred.discard([table])
    deferred.materialise(table)
    assert table.grad is None


def gradients(model: Transcoder, x: Tensor, y: Tensor, dense: bool) -> dict[str, Tensor]:
    model.zero_grad()
    losses.reconstruction(model(x, dense).y_hat, y).backward()
    for parameter in model.parameters():
        deferred.materialise(parameter)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "batchtopk_across", "groupmax"])
@pytest.mark.parametrize("architecture", ["clt", "skip", "tied", "crosscoder", "molt", "matryoshka", "per_layer"])
def test_the_gradients_of_every_architecture_are_the_dense_ones(
    architecture: str, activation: str, kernels: Kernels
) -> None:
    if not oracle.allowed(architecture, activation):
        pytest.skip("one feature space: nothing to compete across")
    model = oracle.transcoder(architecture, activation, dtype=torch.float32).train()
    x, y = (oracle.normal(13, 3, 6, seed=seed, dtype=torch.float32) for seed in (1, 2))
    expected = gradients(model, x, y, dense=True)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            deferred.want(parameter)
    got = gradients(model, x, y, dense=False)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert oracle.normwise(got[name], gradient) < 1e-6, name


def test_a_training_step_leaves_no_dense_gradient_of_the_tables() -> None:
    model = oracle.transcoder("clt", "topk", dtype=torch.float32).train()
    for parameter in [*model.encoders, *model.tables(0), *model.tables(1)]:
        deferred.want(parameter)
    x, y = (oracle.normal(13, 3, 6, seed=seed, dtype=torch.float32) for seed in (1, 2))
    losses.reconstruction(model(x).y_hat, y).backward()
    assert all(weight.grad is None and len(deferred.terms(weight)) == 1 for weight in model.encoders)
    assert all(table.grad is None and len(deferred.terms(table)) == 1 for table in model.tables(0))
    assert next(model.tables(2)).grad is not None
