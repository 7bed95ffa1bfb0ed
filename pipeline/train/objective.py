"""The training loss: a dict of terms, coefficients inside, whose sum is minimised and logged."""

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
from pipeline.core.activations import Activation, Choosing, JumpReLU
from pipeline.core.options import LayerWeighting, LossOptions, PreActForm, Ramp, SparsityForm
from pipeline.core.sparse import Features, Sparse
from pipeline.dist import sharded
from pipeline.dist.sharded import Ranks
from pipeline.errors import UserError
from pipeline.train import loss_checks, schedule
from pipeline.train.options import SparseStep

WIDER = 4
"""Multi-TopK's second reconstruction has so many times k features (Gao et al. 2024, A.3)."""


BY_FEATURE = frozenset({"sparsity", "pre_act"})
"""Terms that are sums over features: each rank has those of its own."""


class Whole(NamedTuple):
    """Of a batch that comes in parts, or lies on several ranks: what the terms which are no means over tokens need to
    know of all of it."""

    spread: float
    """mean_n |e - mean e|^2 of the errors e = y - y_hat."""
    l0: float
    """Active features of a token."""


class Objective:
    """A run's terms. `layer_variance` [M] is mean_n |y^m - mean y^m|^2 of the cache, in the transcoder's units, and
    `variance` V its sum; only inverse-variance weighting needs the former. `seed` decides what a term
    draws at a step. `ranks`: the others that hold features of the same transcoder, or share its tokens."""

    def __init__(
        self,
        options: LossOptions,
        model: Transcoder,
        variance: float,
        n_steps: int,
        layer_variance: Tensor | None = None,
        seed: int = 0,
        sparse: SparseStep = SparseStep.auto,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = sharded.alone(model) if ranks is None else ranks
        loss_checks.check(options, self.ranks.whole)
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
            rule = activations.build(
                model.activation.options, model.activation.n_layers, model.d_features, model.activation.peers
            )
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

    def reads_whole(self, n_dead: Sequence[int]) -> bool:
        """Whether a term of this step is no mean over tokens. n_dead: of each source, features of all ranks."""
        return self.options.l0 > 0 or self.explains(n_dead)

    def counted(self, dead: Tensor) -> list[int]:
        """Dead features of each source, bool [S, F] -> [S]; empty where no term asks."""
        return count(dead) if self.options.aux_k > 0 else []

    def explains(self, n_dead: Sequence[int]) -> bool:
        """Whether dead features are to explain the error in this step."""
        return self.options.aux_k > 0 and any(n_dead)

    @property
    def reads_norms(self) -> bool:
        """Whether a term reads the decoder norms, which are computed once a step."""
        return self.penalises or (self.needs_pre_acts and self.options.pre_act_form == PreActForm.january)

    def forward(self, model: Transcoder, x: Tensor, step: int) -> Output:
        """The model's output with all that the terms of this step read. x [B, L, D] in the transcoder's units."""
        whole = self.ranks.whole
        sizes = self.ranks.here(whole.sizes(self.seed, step)) if isinstance(whole, Matryoshka) else []
        if self.sparse == SparseStep.never:
            return self.ranks.output(model(x, True, sizes) if isinstance(model, Matryoshka) else model(x, True))
        limits = density.ALWAYS if self.sparse == SparseStep.always else density.limits(model.b_dec)
        return self.ranks.output(sparse_step.forward(model, x, limits, self.needs_pre_acts, sizes))

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
        n_dead: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """x, y [B, M, D] in the transcoder's units; dead [L, F] bool; log_lambda the controller's; whole: of the batch
        that these tokens are a part of; n_dead: dead features of each source, on all ranks -> {term: []}.

        A term is that of these tokens. Of several feature ranks each has it in full, but for the terms in `BY_FEATURE`,
        which are sums over its own features."""
        options = self.options
        n_dead = self.counted(dead) if n_dead is None else n_dead
        terms = {"reconstruction": losses.reconstruction(out.y_hat, y, self._weights_on(y))}
        if isinstance(self.ranks.whole, Matryoshka) and self.ranks.whole.nests:
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
        if self.explains(n_dead):
            error = (y - out.y_hat).detach()
            (explained,) = self.ranks.summed([explain_error(model, x, dead)], "aux_k")
            spread = None if whole is None else whole.spread
            auxiliary = losses.aux_k(error, explained, sum(n_dead), self.variance, spread)
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
        self.wider.k = [min(WIDER * k, self.ranks.whole.d_features) for k in model.activation.k]
        out: Output = model.under(self.wider)(x)
        (y_hat,) = self.ranks.summed([out.y_hat], "multi_topk")
        return losses.reconstruction(y_hat, y, self._weights_on(y))


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


def count(dead: Tensor) -> list[int]:
    """Dead features of each source. bool [S, F] -> [S]"""
    found: list[int] = dead.sum(dim=1).tolist()
    return found


def active_features(rule: JumpReLU, out: Output) -> tuple[Features, Tensor]:
    """What is 1 where a feature is active, with the thresholds' gradient; and 0 [], with that of pairs not in it."""
    gated = out.pre_acts if out.gated is None else out.gated
    assert isinstance(gated, Tensor | Sparse)
    counts = [rule.count_beyond(one, i).sum() for i, one in enumerate(out.beyond) if one is not None]
    return rule.active(gated), torch.stack(counts).sum() if counts else out.y_hat.new_zeros(())


def explain_error(model: Transcoder, x: Tensor, dead: Tensor) -> Tensor:
    """AuxK's e_hat: the min(d/2, n_dead) most active dead features of each token and layer, decoded without a bias.

    Where features lie on several ranks, the most active of all of them, and what those that are here write.
    x [B, L, D], dead [S, F] bool, S the model's feature spaces -> [B, L, D]
    """
    n_layers, d_model = model.dims
    rows = [x.new_zeros(x.shape[0], d_model) for _ in range(n_layers)]
    inputs, ids = model.inputs(x), [layer.nonzero().squeeze(1) for layer in dead]

    def activations_of(source: int) -> Tensor:
        weight, bias = model.encoders[source][ids[source]], model.b_enc[source][ids[source]]
        return F.linear(inputs[source], weight, bias.to(weight.dtype)).relu()

    dead_ones = ((activations_of(source), ids[source]) for source in range(model.n_sources))
    for source, z in enumerate(model.activation.peers.strongest(dead_ones, d_model // 2)):
        if ids[source].numel():
            for target, part in model.write_rows(z, ids[source], source, inputs[source]):
                rows[target] = rows[target] + part
    return torch.stack(rows, dim=1)
