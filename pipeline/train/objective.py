"""The training loss: a dict of terms, coefficients inside, whose sum is minimised and logged."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch import sparse_step
from pipeline.arch.base import Output, Transcoder
from pipeline.arch.matryoshka import Matryoshka
from pipeline.core import activations, density, losses
from pipeline.core.activations import Activation, Choosing, GroupMax, JumpReLU
from pipeline.core.options import LayerWeighting, LossOptions, PreActForm, Ramp, Shape, SparsityForm
from pipeline.core.sparse import Features, Sparse
from pipeline.errors import UserError
from pipeline.train import schedule
from pipeline.train.options import SparseStep

WIDER = 4
"""Multi-TopK's second reconstruction has so many times k features (Gao et al. 2024, A.3)."""


class Whole(NamedTuple):
    """Of a batch that comes in parts: what the terms which are no means over tokens need to know of all of it."""

    spread: float
    """mean_n |e - mean e|^2 of the errors e = y - y_hat."""
    l0: float
    """Active features of a token."""


class Objective:
    """A run's terms. `layer_variance` [M] is mean_n |y^m - mean y^m|^2 of the cache, in the transcoder's units, and
    `variance` V its sum; only inverse-variance weighting needs the former. `seed` decides what a term
    draws at a step."""

    def __init__(
        self,
        options: LossOptions,
        model: Transcoder,
        variance: float,
        n_steps: int,
        layer_variance: Tensor | None = None,
        seed: int = 0,
        sparse: SparseStep = SparseStep.auto,
    ) -> None:
        _check(options, model)
        self.sparse = sparse
        self.options, self.variance, self.n_steps, self.seed = options, variance, n_steps, seed
        self.weights = _layer_weights(options, model, layer_variance)
        self.trivial = variance
        """The reconstruction loss of predicting the means."""
        if self.weights is not None and layer_variance is not None:
            self.trivial = float((self.weights.to(layer_variance) * layer_variance).sum())
        self.wider: Choosing | None = None
        if options.multi_topk > 0:
            assert isinstance(model.activation, Choosing)
            rule = activations.build(model.activation.options, model.activation.n_layers, model.d_features)
            assert isinstance(rule, Choosing)
            self.wider = rule.to(model.b_dec.device)

    @property
    def controlled(self) -> bool:
        """Whether lambda of the sparsity penalty follows L0 instead of a schedule (`train/controller.py`)."""
        return self.options.target_l0 is not None and self.options.l0 == 0

    @property
    def penalises(self) -> bool:
        """Whether there is a sparsity penalty, and so a lambda."""
        return self.options.sparsity > 0 or self.controlled

    @property
    def needs_pre_acts(self) -> bool:
        """Whether a term reads every pre-activation, so that the sparse path cannot drop them."""
        return self.options.pre_act > 0

    def reads_whole(self, dead: Tensor) -> bool:
        """Whether a term of this step is no mean over tokens."""
        return self.options.l0 > 0 or (self.options.aux_k > 0 and bool(dead.any()))

    @property
    def reads_norms(self) -> bool:
        """Whether a term reads the decoder norms, which are computed once a step."""
        return self.penalises or (self.needs_pre_acts and self.options.pre_act_form == PreActForm.january)

    def forward(self, model: Transcoder, x: Tensor, step: int) -> Output:
        """The model's output with all that the terms of this step read. x [B, L, D] in the transcoder's units."""
        sizes = model.sizes(self.seed, step) if isinstance(model, Matryoshka) else []
        if self.sparse == SparseStep.never:
            return model(x, True, sizes) if isinstance(model, Matryoshka) else model(x, True)
        limits = density.ALWAYS if self.sparse == SparseStep.always else density.limits(model.b_dec)
        return sparse_step.forward(model, x, limits, self.needs_pre_acts, sizes)

    def lambda_at(self, step: int, log_lambda: float | None) -> float:
        """Coefficient of the sparsity penalty: the controller's, or the schedule's."""
        if not self.controlled:
            return self._now("sparsity", step)
        assert log_lambda is not None
        return math.exp(log_lambda)

    def __call__(
        self,
        model: Transcoder,
        out: Output,
        x: Tensor,
        y: Tensor,
        dead: Tensor,
        step: int,
        log_lambda: float | None = None,
        whole: Whole | None = None,
    ) -> dict[str, Tensor]:
        """x, y [B, M, D] in the transcoder's units; dead [L, F] bool; log_lambda the controller's; whole: of the batch
        that these tokens are a part of -> {term: []}."""
        options = self.options
        terms = {"reconstruction": losses.reconstruction(out.y_hat, y, self._weights_on(y))}
        if isinstance(model, Matryoshka) and model.nests:
            assert out.shorter, "the output of Objective.forward has the shorter prefixes"
            parts = [losses.reconstruction(part, y, self._weights_on(y)) for part in out.shorter]
            terms["prefixes"] = torch.stack(parts).sum()
        norms = model.decoder_norms() if self.reads_norms else None
        if self.penalises:
            assert norms is not None
            terms["sparsity"] = self.lambda_at(step, log_lambda) * self._sparsity(model.activation, out, norms)
        if options.l0 > 0:
            assert options.target_l0 is not None
            assert isinstance(model.activation, JumpReLU)
            active, unseen = active_features(model.activation, out)
            l0 = None if whole is None else whole.l0
            terms["l0"] = self._now("l0", step) * losses.l0_target(active, options.target_l0, unseen, l0)
        if options.pre_act > 0:
            assert out.pre_acts is not None
            terms["pre_act"] = self._now("pre_act", step) * self._pre_act(model, out.pre_acts, norms)
        if self.wider is not None:
            terms["multi_topk"] = self._now("multi_topk", step) * self._multi_topk(model, x, y)
        if options.aux_k > 0 and dead.any():
            error = (y - out.y_hat).detach()
            explained = explain_error(model, x, dead)
            spread = None if whole is None else whole.spread
            auxiliary = losses.aux_k(error, explained, int(dead.sum()), self.variance, spread)
            terms["aux_k"] = self._now("aux_k", step) * auxiliary
        return terms

    def _now(self, term: str, step: int) -> float:
        ramp: Ramp = getattr(self.options.schedule, term)
        return schedule.coefficient(getattr(self.options, term), ramp, step, self.n_steps)

    def _weights_on(self, y: Tensor) -> Tensor | None:
        return None if self.weights is None else self.weights.to(y)

    def _sparsity(self, rule: Activation, out: Output, norms: Tensor) -> Tensor:
        c = self.options.sparsity_c
        if self.options.sparsity_form == SparsityForm.l1:
            value, slope = losses.l1_sparsity(out.features, norms), 1.0
        else:
            value, slope = losses.tanh_sparsity(out.features, norms, c), c
        for layer, beyond in enumerate(out.beyond):
            if beyond is not None:
                # Features that are 0, where the penalty is as steep as this.
                assert isinstance(rule, JumpReLU)
                value = value + slope * (norms[layer] * rule.sum_beyond(beyond, layer)).sum() / out.y_hat.shape[0]
        return value

    def _pre_act(self, model: Transcoder, pre_acts: Tensor | Sequence[Tensor], norms: Tensor | None) -> Tensor:
        if self.options.pre_act_form == PreActForm.clt:
            return losses.pre_activation(pre_acts)
        assert isinstance(model.activation, JumpReLU)
        assert norms is not None
        return losses.pre_activation_january(pre_acts, model.activation.threshold, norms)

    def _multi_topk(self, model: Transcoder, x: Tensor, y: Tensor) -> Tensor:
        assert self.wider is not None
        assert isinstance(model.activation, Choosing)
        self.wider.k = [min(WIDER * k, model.d_features) for k in model.activation.k]
        out: Output = model.under(self.wider)(x)
        return losses.reconstruction(out.y_hat, y, self._weights_on(y))


def _check(options: LossOptions, model: Transcoder) -> None:
    """UserError for coefficients and combinations that make no sense, before anything is computed."""
    rule = model.activation
    for name in ("sparsity", "l0", "pre_act", "aux_k", "multi_topk"):
        if getattr(options, name) < 0:
            raise UserError(f"loss.{name}={getattr(options, name)} must not be negative")
    for field in dataclasses.fields(options.schedule):
        schedule.check(getattr(options.schedule, field.name), f"loss.schedule.{field.name}")
    if options.sparsity_c <= 0:
        raise UserError(f"loss.sparsity_c={options.sparsity_c} must be above 0")
    if options.sparsity_form == SparsityForm.l1 and options.sparsity_c != LossOptions.sparsity_c:
        raise UserError("loss.sparsity_c has no meaning for loss.sparsity_form=l1; leave it out")
    january = options.pre_act > 0 and options.pre_act_form == PreActForm.january
    if january and not isinstance(rule, JumpReLU):
        raise UserError("loss.pre_act_form=january needs thresholds; use activation=jumprelu or pre_act_form=clt")
    untied = all(model.n_tables(source) == len(model.targets(source)) for source in range(model.n_sources))
    if options.resample_every is not None and (model.n_sources != model.dims.n_layers or not untied):
        raise UserError(
            "loss.resample_every needs an encoder for each layer and a decoder for each layer that it writes, which "
            f"arch={model.options.name} has not; leave it out"
        )
    if not 0 < options.resample_until <= 1:
        raise UserError(f"loss.resample_until={options.resample_until} is a share of the run and must lie in (0, 1]")
    if options.multi_topk > 0 and (not isinstance(rule, Choosing) or isinstance(rule, GroupMax)):
        raise UserError(
            f"loss.multi_topk={options.multi_topk} needs a k to multiply, which activation={rule.name} has not; "
            "use topk, batchtopk or batchtopk_across, or leave it out"
        )
    _check_target(options, model)


def _check_target(options: LossOptions, model: Transcoder) -> None:
    rule, target = model.activation, options.target_l0
    if options.l0 > 0 and not isinstance(rule, JumpReLU):
        raise UserError(
            f"loss.l0={options.l0} teaches thresholds, which activation={rule.name} has not; use activation=jumprelu"
        )
    if options.l0 > 0 and target is None:
        raise UserError(f"loss.l0={options.l0} needs a number to aim at; add loss.target_l0=64")
    if target is None:
        return
    if isinstance(rule, Choosing):
        raise UserError(
            f"loss.target_l0={target} has no meaning for activation={rule.name}, whose k fixes L0; use activation.k"
        )
    most = rule.n_layers * model.d_features
    if not 0 < target < most:
        raise UserError(f"loss.target_l0={target} must lie between 0 and the {most} features there are")
    if options.l0 > 0 and options.sparsity > 0:
        raise UserError(
            "loss.l0 and loss.sparsity would both act on L0, and loss.target_l0 says which is to reach it; set "
            "loss.l0=0 for the controller of loss.sparsity, or loss.sparsity=0 for the penalty loss.l0"
        )
    if options.l0 == 0 and options.schedule.sparsity != Ramp(Shape.linear):
        raise UserError("loss.target_l0 sets lambda itself, so loss.schedule.sparsity has no meaning; leave it out")


def _layer_weights(options: LossOptions, model: Transcoder, layer_variance: Tensor | None) -> Tensor | None:
    """w_m of the reconstruction, None where all are 1. -> [M]"""
    given, n = options.layer_weights, model.dims.n_layers
    if given is None:
        if options.layer_weighting == LayerWeighting.equal:
            return None
        assert layer_variance is not None
        if not (layer_variance > 0).all():
            raise UserError("loss.layer_weighting=inverse_variance: a layer's outputs never vary; use equal")
        return layer_variance.mean() / layer_variance
    if options.layer_weighting != LayerWeighting.equal:
        raise UserError(
            f"loss.layer_weights and loss.layer_weighting={options.layer_weighting} both weigh layers; leave one out"
        )
    if len(given) != n or min(given) < 0 or max(given) == 0:
        raise UserError(
            f"loss.layer_weights={list(given)} must be {n} numbers, one for each layer that is written, none negative "
            "and not all 0"
        )
    return torch.tensor(list(given), dtype=torch.float64)


def active_features(rule: JumpReLU, out: Output) -> tuple[Features, Tensor]:
    """What is 1 where a feature is active, with the thresholds' gradient; and 0 [], with that of pairs not in it."""
    gated = out.pre_acts if out.gated is None else out.gated
    assert isinstance(gated, Tensor | Sparse)
    counts = [rule.count_beyond(one, i).sum() for i, one in enumerate(out.beyond) if one is not None]
    return rule.active(gated), torch.stack(counts).sum() if counts else out.y_hat.new_zeros(())


def explain_error(model: Transcoder, x: Tensor, dead: Tensor) -> Tensor:
    """AuxK's e_hat: the min(d/2, n_dead) most active dead features of each token and layer, decoded without a bias.

    x [B, L, D], dead [S, F] bool, S the model's feature spaces -> [B, L, D]
    """
    n_layers, d_model = model.dims
    rows = [x.new_zeros(x.shape[0], d_model) for _ in range(n_layers)]
    for source, read in enumerate(model.inputs(x)):
        ids = dead[source].nonzero().squeeze(1)
        if not ids.numel():
            continue
        pre_acts = F.linear(read, model.encoders[source][ids], model.b_enc[source][ids].to(read.dtype))
        z = pre_acts.relu()
        if ids.numel() > d_model // 2:
            values, indices = z.topk(d_model // 2, dim=1)
            z = torch.zeros_like(z).scatter(1, indices, values)
        for target, part in model.write_rows(z, ids, source, read):
            rows[target] = rows[target] + part
    return torch.stack(rows, dim=1)
