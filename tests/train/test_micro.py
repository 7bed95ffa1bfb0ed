"""A step in parts is the step: the gradients and the log of the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.arch.base import Transcoder
from pipeline.arch.options import Site
from pipeline.core.activations import ACTIVATIONS
from pipeline.core.normalize import Scaling
from pipeline.core.options import LossOptions, PreActForm, SparsityForm
from pipeline.data.loader import Batch
from pipeline.train import micro, optim
from pipeline.train.inputs import Inputs
from pipeline.train.loop import Trainer
from pipeline.train.objective import Objective
from pipeline.train.options import OptimOptions
from pipeline.train.run_plan import Plan
from tests import oracle

B, L, F, D = 12, 3, 11, 6
DEAD = [(0, 5), (0, 6), (1, 2), (2, 10)]
DOUBLE = torch.float64

TERMS = {
    "topk": [
        LossOptions("mse"),
        LossOptions("auxk", aux_k=1 / 4),
        LossOptions("both", aux_k=1 / 4, multi_topk=1 / 8, layer_weights=[1.0, 3.0, 0.5]),
    ],
    "groupmax": [LossOptions("auxk", aux_k=1 / 4)],
    "relu": [LossOptions("l1", sparsity=0.3, sparsity_form=SparsityForm.l1), LossOptions("control", target_l0=9)],
    "jumprelu": [
        LossOptions("tanh", sparsity=0.3, pre_act=0.2, aux_k=1 / 4),
        LossOptions("l0", l0=2.0, target_l0=7.5, pre_act=0.1, pre_act_form=PreActForm.january),
    ],
}


def _id(value: object) -> str:
    return str(getattr(value, "name", value))


def batch() -> Batch:
    rows = [oracle.normal(B, L, D, seed=seed, dtype=torch.float32).bfloat16() for seed in (1, 2)]
    return Batch(rows[0], rows[1], torch.arange(B))


def trainer(directory: Path, architecture: str, activation: str, loss: LossOptions, n: int, **plan: int) -> Trainer:
    torch.manual_seed(0)
    model = oracle.transcoder(architecture, activation, seed=3, dtype=DOUBLE).train()
    for layer, feature in DEAD:
        with torch.no_grad():
            model.b_enc[layer % model.n_sources, feature] = -100.0
    zero, scale = torch.zeros(L, D, dtype=DOUBLE), oracle.normal(L, D, seed=9, dtype=DOUBLE).abs() + 0.5
    scaling = Scaling(zero, scale, zero, scale)
    inputs = Inputs(None, scaling, torch.device("cpu"), Site.resid_mid, model.options.target)

    numbers = {"resample_steps": 0, "last_resample": 8} | plan
    plans = Plan(8, B, B, 8, 1, 1, seed=0, y_variance=torch.ones(L, D), accumulate=n, **numbers)
    objective = Objective(loss, model, 7.25, 8, torch.tensor([2.0, 4.0, 1.25], dtype=DOUBLE))
    options = OptimOptions("adam", lr=0.01)
    made = Trainer(directory, model, optim.build(model.parameters(), options), objective, inputs, plans, options)
    made.state.tokens_since_fired += B  # everything counts as dead that does not fire in a step
    made.state.tokens_since_fired[:, ::2] = 0
    return made


def gradients(model: Transcoder) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize(("activation", "loss"), [(a, loss) for a in TERMS for loss in TERMS[a]], ids=_id)
def test_parts_give_the_gradients_and_the_log_of_the_whole(
    tmp_path: Path, activation: str, loss: LossOptions, n: int
) -> None:
    one, parts = trainer(tmp_path, "clt", activation, loss, 1), trainer(tmp_path, "clt", activation, loss, n)
    taken = [made.step(batch(), 0.01) for made in (one, parts)]
    one.state.step = parts.state.step = 1
    expected, got = gradients(one.model), gradients(parts.model)
    assert expected.keys() == got.keys()
    for name in expected:
        assert oracle.normwise(got[name], expected[name]) < 1e-11, name
    assert taken[0].terms.keys() == taken[1].terms.keys()
    lines = [made.record(took, 0.01) for made, took in zip((one, parts), taken, strict=True)]
    assert lines[1] == pytest.approx(lines[0], rel=1e-9)
    assert torch.equal(one.state.tokens_since_fired, parts.state.tokens_since_fired)
    assert taken[1].reconstruction == pytest.approx(float(taken[0].terms["reconstruction"]))


def test_terms_that_are_no_means_over_tokens_are_there_to_be_tested(tmp_path: Path) -> None:
    aux = trainer(tmp_path, "clt", "topk", LossOptions("auxk", aux_k=1 / 4), 3)
    assert aux.objective.reads_whole(aux.objective.counted(aux.dead()))
    assert not aux.objective.reads_whole([0, 0, 0])
    whole = micro.whole(aux.objective, aux.model, aux.inputs, batch(), 3, [1, 1, 1], 0)
    assert whole is not None
    x, y = aux.inputs(*batch()[:2])
    error = (y - aux.objective.forward(aux.model, x, 0).y_hat).detach()
    assert whole.spread == pytest.approx(float((error - error.mean(dim=0)).square().sum()) / B)


def test_what_the_rule_remembers_is_of_the_pass_that_teaches(tmp_path: Path) -> None:
    made = trainer(tmp_path, "clt", "batchtopk", LossOptions("auxk", aux_k=1 / 4), 4)
    assert made.objective.reads_whole(made.objective.counted(made.dead()))
    made.step(batch(), 0.01)
    assert made.model.activation.ema_weight.tolist() == pytest.approx([1 - 0.999**4] * L)
    assert made.model.activation.training


@pytest.mark.parametrize("activation", ["batchtopk", "batchtopk_across"])
def test_tokens_compete_within_a_part(tmp_path: Path, activation: str) -> None:
    made = trainer(tmp_path, "clt", activation, LossOptions("mse"), 4)
    k = made.model.activation.k[0]
    seen = []
    forward = made.objective.forward
    made.objective.forward = lambda *words: seen.append(forward(*words)) or seen[-1]  # type: ignore[method-assign]
    made.step(batch(), 0.01)
    assert len(seen) == 4
    assert max(map(micro.active, seen)) == B // 4 * k * L, "where enough are positive"


def test_dead_features_are_restarted_from_the_whole_batch(tmp_path: Path) -> None:
    loss = LossOptions("mse")
    runs = [trainer(tmp_path, "clt", "topk", loss, n, resample_steps=1) for n in (1, 3)]
    for made in runs:
        made.step(batch(), 0.01)
    for name, tensor in runs[0].model.state_dict().items():
        assert oracle.normwise(runs[1].model.state_dict()[name], tensor) < 1e-9, name


def test_every_rule_is_either_equal_in_parts_or_one_of_competition() -> None:
    assert set(ACTIVATIONS) == {*TERMS, "batchtopk", "batchtopk_across"}
