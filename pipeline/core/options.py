"""What the user may say about activations and losses. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass, field
from enum import StrEnum


class ThetaGrad(StrEnum):
    anthropic = "anthropic"
    gdm = "gdm"


class PreActForm(StrEnum):
    clt = "clt"
    january = "january"


class Rank(StrEnum):
    value = "value"
    norm = "norm"


class Shape(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    delayed = "delayed"


class SparsityForm(StrEnum):
    tanh = "tanh"
    l1 = "l1"


class Kernels(StrEnum):
    """How the operations of `core/products.py` are computed."""

    auto = "auto"
    torch = "torch"
    compiled = "compiled"
    triton = "triton"


class LayerWeighting(StrEnum):
    equal = "equal"
    inverse_variance = "inverse_variance"


@dataclass
class ActivationOptions:
    """A field that the chosen activation does not use stays null; setting it is an error, not a silent no-op."""

    name: str
    """relu, jumprelu, topk, groupmax, batchtopk, batchtopk_across."""

    k: int | None = None
    """topk, groupmax: active features per token and layer. batchtopk: their mean over the batch. batchtopk_across:
    their mean over the batch and the layers, so that a token has k * n_layers in total."""

    k_per_layer: list[int] | None = None
    """topk, groupmax, batchtopk: k for each layer of features, with k=null."""

    k_start: int | None = None
    """topk, batchtopk, batchtopk_across: k of the first step, from which it falls to k. Goes with k_anneal."""

    k_anneal: float | None = None
    """Share of the run over which k falls linearly from k_start."""

    rank: Rank | None = None
    """topk, groupmax, batchtopk, batchtopk_across: what features are compared by. value: relu(h), also when null.
    norm: relu(h) |W_dec|."""

    threshold: float | None = None
    """jumprelu: initial threshold, in the units of pre_acts on normalised inputs."""

    bandwidth: float | None = None
    """jumprelu: width of the window |h - theta| < bandwidth / 2 in which thresholds get a gradient."""

    theta_grad: ThetaGrad | None = None
    """jumprelu: which published rule the thresholds learn by; the two differ by a factor theta."""


@dataclass
class Ramp:
    """How a coefficient comes to its value."""

    shape: Shape = Shape.constant
    """constant: there at once. linear, cosine: from 0 over `length`. delayed: 0 for `delay`, then linear over `length`
    of what is left."""

    length: float = 1.0
    """Share of the run, or of what follows the delay, over which it rises."""

    delay: float = 0.0
    """delayed: share of the run before the rise begins."""


@dataclass
class Schedules:
    """One for each coefficient."""

    sparsity: Ramp = field(default_factory=lambda: Ramp(Shape.linear))
    l0: Ramp = field(default_factory=lambda: Ramp(Shape.linear))
    pre_act: Ramp = field(default_factory=Ramp)
    aux_k: Ramp = field(default_factory=Ramp)
    multi_topk: Ramp = field(default_factory=Ramp)


@dataclass
class LossOptions:
    """Coefficients of the terms whose sum is minimised; a term with coefficient 0 is not computed."""

    name: str
    """Name of the recipe; the coefficients below are what counts."""

    sparsity: float = 0.0
    """lambda of the sparsity penalty. With target_l0 the controller begins at a fiftieth of it."""

    sparsity_form: SparsityForm = SparsityForm.tanh
    """tanh: sum tanh(c |W_dec| a). l1: sum |W_dec| a."""

    sparsity_c: float = 1.0
    """c inside the tanh."""

    l0: float = 0.0
    """Coefficient of (L0 / target_l0 - 1)^2, for jumprelu."""

    target_l0: float | None = None
    """Active features of a token, all layers together, to aim at (relu, jumprelu): by the penalty above where l0 is
    set, else by a controller that sets lambda of the sparsity penalty during the run."""

    pre_act: float = 0.0
    """Coefficient of the pre-activation penalty, which pulls silent features back to life."""

    pre_act_form: PreActForm = PreActForm.clt
    """clt: relu(-h). january: relu(theta - h) |W_dec|."""

    aux_k: float = 0.0
    """alpha of AuxK: dead features learn to explain the error of the live ones."""

    multi_topk: float = 0.0
    """Coefficient of the reconstruction from 4k features in place of k (1/8 in Gao et al.), for topk and batchtopk."""

    layer_weights: list[float] | None = None
    """Weight of each layer's reconstruction error."""

    layer_weighting: LayerWeighting = LayerWeighting.equal
    """equal: every layer's error as it is. inverse_variance: divided by the variance of the layer's targets, so that
    layers count by the share that is not explained; scaled so that predicting the means costs what it does with
    equal."""

    resample_every: str | None = None
    """Tokens between resamplings of dead features (100k); null for none."""

    resample_until: float = 0.5
    """Share of the run after which nothing is resampled, so that the last ones have time to learn."""

    schedule: Schedules = field(default_factory=Schedules)
    """How each coefficient comes to its value."""
