"""Each architecture finds the dictionary of data that it is made for.

Inputs of the layers are independent: x^l is a sum of a few of 12 directions with positive coefficients z^l, and y^m is
what the same coefficients times the true decoders give. Recovered is the mean, over true features, of the largest
cosine between their decoder rows, concatenated over the targets, and those of a learned feature of the same source.

A skip transcoder is left out: with fewer true features than dimensions y is linear in x, and its path alone does it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.arch import init_random, init_rows, table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import Tie
from pipeline.core import activations
from pipeline.core.options import ActivationOptions
from tests import oracle

L, D, TRUE, ACTIVE, LEARNED = 3, 16, 12, 2, 18
STEPS, BATCH = 500, 256

CASES: list[tuple[str, dict[str, Any]]] = [
    ("clt", {}),
    ("clt", {"max_reach": 1}),
    ("per_layer", {}),
    ("tied", {}),
    ("tied", {"tie": Tie.target}),
    ("sae", {}),
    ("crosscoder", {}),
]


def directions(*shape: int, generator: torch.Generator) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


class World:
    """True encoders [S][L_in, TRUE, D] and decoders [S][TRUE, M, D] of the architecture's own form."""

    def __init__(self, model: Transcoder) -> None:
        self.model, self.generator = model, torch.Generator().manual_seed(0)
        options = model.options
        self.directions = directions(model.dims.n_layers, TRUE, D, generator=self.generator)
        self.decoders = []
        shared = directions(L, TRUE, D, generator=self.generator)
        for source in range(model.n_sources):
            targets = model.targets(source)
            rows = directions(TRUE, len(targets), D, generator=self.generator)
            if options.name == "tied":
                scale = 0.5 + torch.rand(TRUE, len(targets), 1, generator=self.generator)
                tables = [shared[source if options.tie == Tie.source else target] for target in targets]
                rows = scale * torch.stack(tables, dim=1)
            if options.name == "sae":
                rows = self.directions[source][:, None]
            self.decoders.append(rows)

    def batch(self, n: int) -> tuple[Tensor, Tensor]:
        """x, y [n, L, D]"""
        model = self.model
        z = torch.zeros(n, model.n_sources, TRUE)
        on = torch.rand(n, model.n_sources, TRUE, generator=self.generator).topk(ACTIVE, dim=2).indices
        z.scatter_(2, on, 0.5 + torch.rand(n, model.n_sources, ACTIVE, generator=self.generator))
        x, y = torch.zeros(n, L, D), torch.zeros(n, L, D)
        for source in range(model.n_sources):
            for layer in model.reads(source):
                x[:, layer] += z[:, source] @ self.directions[layer]
            for slot, target in enumerate(model.targets(source)):
                y[:, target] += z[:, source] @ self.decoders[source][:, slot]
        return x, y


def recovered(model: Transcoder, world: World) -> float:
    scores = []
    for learned, true in zip(model.W_dec, world.decoders, strict=True):
        cosines = F.normalize(true.flatten(1), dim=1) @ F.normalize(learned.detach().flatten(1), dim=1).T
        scores.append(cosines.max(dim=1).values.mean())
    return float(torch.stack(scores).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_a_planted_dictionary_is_found(architecture: str, options: dict[str, Any]) -> None:
    chosen = oracle.arch_options(architecture, d_features=LEARNED, **options)
    rule = activations.build(ActivationOptions("topk", k=ACTIVE), table.n_sources(chosen, Dims(L, D)), LEARNED)
    model = table.build(chosen, Dims(L, D), rule)
    world = World(model)
    init_random.uniform(model, torch.Generator().manual_seed(1))
    before = recovered(model, world)
    init_rows.from_data(model, *world.batch(1024), torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, 2 * (1 - step / STEPS))
        x, y = world.batch(BATCH)
        loss = (model(x).y_hat - y).square().sum() / BATCH
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    assert before < 0.6, "by chance"
    assert recovered(model, world) > 0.9
