"""Which coefficients of a loss make sense, alone, together and with a transcoder."""

import dataclasses

from pipeline.arch.base import Transcoder
from pipeline.core.activations import Choosing, GroupMax, JumpReLU
from pipeline.core.options import LossOptions, PreActForm, Ramp, Shape, SparsityForm
from pipeline.errors import UserError
from pipeline.train import schedule


def check(options: LossOptions, model: Transcoder) -> None:
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
