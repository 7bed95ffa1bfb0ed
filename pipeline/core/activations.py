"""Activation rules by name: from pre-activations to features.

relu, jumprelu                                       each pre-activation alone           (`core/gates.py`)
topk, groupmax, batchtopk, batchtopk_across          a few chosen by comparing them      (`core/topk.py`)
"""

import dataclasses

from pipeline.core.gates import FixedThreshold, JumpReLU, ReLU
from pipeline.core.options import ActivationOptions
from pipeline.core.peers import ALONE, Peers
from pipeline.core.products import largest
from pipeline.core.rule import Activation
from pipeline.core.topk import BatchTopK, BatchTopKAcross, Choosing, GroupMax, TopK
from pipeline.errors import UserError

__all__ = [
    "ACTIVATIONS",
    "OPTIONAL",
    "USES",
    "Activation",
    "BatchTopK",
    "BatchTopKAcross",
    "Choosing",
    "FixedThreshold",
    "GroupMax",
    "JumpReLU",
    "ReLU",
    "TopK",
    "build",
    "check_batch",
    "largest",
]

ACTIVATIONS: dict[str, type[Activation]] = {
    "relu": ReLU,
    "jumprelu": JumpReLU,
    "topk": TopK,
    "groupmax": GroupMax,
    "batchtopk": BatchTopK,
    "batchtopk_across": BatchTopKAcross,
}

USES = {
    "relu": set[str](),
    "jumprelu": {"threshold", "bandwidth", "theta_grad"},
    "topk": {"k", "k_per_layer", "k_start", "k_anneal", "rank"},
    "groupmax": {"k", "k_per_layer", "rank"},
    "batchtopk": {"k", "k_per_layer", "k_start", "k_anneal", "rank"},
    "batchtopk_across": {"k", "k_start", "k_anneal", "rank"},
}
"""The options that each rule reads."""

OPTIONAL = {"k_per_layer", "k_start", "k_anneal", "rank"}
"""Those that may be left out."""


def build(options: ActivationOptions, n_layers: int, d_features: int, peers: Peers = ALONE) -> Activation:
    """The activation named in the options, for d_features of the features that it and its peers have. UserError for an
    unknown name or an option that it does not use."""
    if options.name not in ACTIVATIONS:
        raise UserError(f"activation.name={options.name} does not exist; choose one of {', '.join(ACTIVATIONS)}")
    for field in dataclasses.fields(options)[1:]:
        if getattr(options, field.name) is not None and field.name not in USES[options.name]:
            raise UserError(f"activation.{field.name} has no meaning for activation={options.name}; leave it out")
    return ACTIVATIONS[options.name](options, n_layers, d_features, peers)


def check_batch(activation: Activation, batch_tokens: int) -> None:
    """UserError for a rule in which tokens compete when a batch is one token."""
    if activation.name == "batchtopk" and batch_tokens == 1:
        raise UserError(
            "activation=batchtopk lets the tokens of a batch compete, and train.batch_tokens=1 leaves nothing to "
            "compete with; use activation=topk, which is the same then, or larger batches"
        )
