"""What the user may say about activations and losses. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass
from enum import StrEnum


class ThetaGrad(StrEnum):
    anthropic = "anthropic"
    gdm = "gdm"


class PreActForm(StrEnum):
    clt = "clt"
    january = "january"


class Schedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class ActivationOptions:
    """A field that the chosen activation does not use stays null; setting it is an error, not a silent no-op."""

    name: str
    """relu, jumprelu, topk, batchtopk, batchtopk_across."""

    k: int | None = None
    """topk: active features per token and layer. batchtopk: their mean over the batch. batchtopk_across: their mean
    over the batch and the layers, so that a token has k * n_layers in total."""

    threshold: float | None = None
    """jumprelu: initial threshold, in the units of pre_acts on normalised inputs."""

    bandwidth: float | None = None
    """jumprelu: width of the window |h - theta| < bandwidth / 2 in which thresholds get a gradient."""

    theta_grad: ThetaGrad | None = None
    """jumprelu: which published rule the thresholds learn by; the two differ by a factor theta."""


@dataclass
class LossOptions:
    """Coefficients of the terms whose sum is minimised; a term with coefficient 0 is not computed."""

    name: str
    """Name of the recipe; the coefficients below are what counts."""

    sparsity: float = 0.0
    """lambda of the tanh penalty sum tanh(c |W_dec| a)."""

    sparsity_c: float = 1.0
    """c inside the tanh."""

    sparsity_schedule: Schedule = Schedule.linear
    """How lambda comes to its value: constant, or linear or cosine from 0 over sparsity_ramp of the run."""

    sparsity_ramp: float = 1.0
    """Share of the run over which lambda rises."""

    pre_act: float = 0.0
    """Coefficient of the pre-activation penalty, which pulls silent features back to life."""

    pre_act_form: PreActForm = PreActForm.clt
    """clt: relu(-h). january: relu(theta - h) |W_dec|."""

    aux_k: float = 0.0
    """alpha of AuxK: dead features learn to explain the error of the live ones."""
