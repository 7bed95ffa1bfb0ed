"""The training loss: a dict of terms, coefficients inside, whose sum is minimised and logged."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch.base import Output, Transcoder
from pipeline.core import losses
from pipeline.core.activations import JumpReLU
from pipeline.core.options import LossOptions, PreActForm
from pipeline.errors import UserError
from pipeline.train.schedule import sparsity


class Objective:
    """A run's terms. `variance` is V = sum_m mean_n |y^m - mean y^m|^2 of the cache, in the transcoder's units."""

    def __init__(self, options: LossOptions, model: Transcoder, variance: float, n_steps: int) -> None:
        for name in ("sparsity", "pre_act", "aux_k", "sparsity_ramp"):
            if getattr(options, name) < 0:
                raise UserError(f"loss.{name}={getattr(options, name)} must not be negative")
        if options.sparsity_c <= 0:
            raise UserError(f"loss.sparsity_c={options.sparsity_c} must be above 0")
        january = options.pre_act > 0 and options.pre_act_form == PreActForm.january
        if january and not isinstance(model.activation, JumpReLU):
            raise UserError("loss.pre_act_form=january needs thresholds; use activation=jumprelu or pre_act_form=clt")
        self.options, self.variance, self.n_steps = options, variance, n_steps

    @property
    def needs_pre_acts(self) -> bool:
        """Whether a term reads every pre-activation, so that the sparse path cannot drop them."""
        return self.options.pre_act > 0

    def __call__(
        self, model: Transcoder, out: Output, x: Tensor, y: Tensor, dead: Tensor, step: int
    ) -> dict[str, Tensor]:
        """x, y [B, L, D] in the transcoder's units; dead [L, F] bool -> {term: []}."""
        options = self.options
        terms = {"reconstruction": losses.reconstruction(out.y_hat, y)}
        if options.sparsity > 0:
            penalty = losses.tanh_sparsity(out.features, model.decoder_norms(), options.sparsity_c)
            terms["sparsity"] = sparsity(options, step, self.n_steps) * penalty
        if options.pre_act > 0:
            assert out.pre_acts is not None
            terms["pre_act"] = options.pre_act * self._pre_act(model, out.pre_acts)
        if options.aux_k > 0 and dead.any():
            error = (y - out.y_hat).detach()
            terms["aux_k"] = options.aux_k * losses.aux_k(
                error, explain_error(model, x, dead), int(dead.sum()), self.variance
            )
        return terms

    def _pre_act(self, model: Transcoder, pre_acts: Tensor) -> Tensor:
        if self.options.pre_act_form == PreActForm.clt:
            return losses.pre_activation(pre_acts)
        assert isinstance(model.activation, JumpReLU)
        return losses.pre_activation_january(pre_acts, model.activation.threshold, model.decoder_norms())


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
        pre_acts = F.linear(read, model.encoders[source][ids], model.b_enc[source][ids])
        values, indices = pre_acts.topk(min(d_model // 2, ids.numel()), dim=1)
        z = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
        for target in model.targets(source):
            rows[target] = rows[target] + z @ model.table(source, target, ids)
    return torch.stack(rows, dim=1)
