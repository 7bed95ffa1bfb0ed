"""Small random attribution graphs, built from counts alone: no model is behind them."""

import torch

from pipeline.interp.circuits.graph import Graph, Kind

N_LAYERS, D_FEATURES = 3, 11


def random_graph(
    seed: int = 0,
    n_tokens: int = 4,
    features: int = 9,
    extras: bool = True,
    errors: bool = True,
    dtype: torch.dtype = torch.float64,
    probability: tuple[float, ...] = (0.6, 0.25),
) -> Graph:
    """Every node of the kinds that clt graph makes, and effects only from where they can come: from lower layers and
    no later position. Rows sum to `value`."""
    draw = torch.Generator().manual_seed(seed)
    rows: list[tuple[Kind, int, int, int]] = []  # kind, layer, position, index
    spots = [(layer, p, i) for layer in range(N_LAYERS) for p in range(1, n_tokens) for i in range(D_FEATURES)]
    chosen = sorted(torch.randperm(len(spots), generator=draw)[:features].tolist())
    rows += [(Kind.feature, *spots[i]) for i in chosen]
    if errors:
        rows += [(Kind.error, layer, p, -1) for layer in range(N_LAYERS) for p in range(1, n_tokens)]
    rows += [(Kind.token, -1, p, 20 + p) for p in range(n_tokens)]
    if extras:
        rows += [(Kind.position, -1, p, -1) for p in range(n_tokens)]
        rows += [(Kind.position_0, layer, 0, -1) for layer in range(N_LAYERS)]
        rows += [(Kind.rest, 1, n_tokens - 1, -1)]
        rows += [(Kind.bias, layer, -1, -1) for layer in range(N_LAYERS + 1)]
    rows += [(Kind.logit, N_LAYERS, n_tokens - 1, 30 + i) for i in range(len(probability))]
    kind = [row[0] for row in rows]
    layer, position, index = (torch.tensor([row[i] for row in rows]) for i in (1, 2, 3))
    n = len(rows)
    is_target = torch.tensor([k in (Kind.feature, Kind.logit) for k in kind])
    # Errors and features of a layer are written behind what its features read, biases of a layer before it.
    own = torch.tensor([k in (Kind.bias, Kind.token, Kind.position) for k in kind])
    reaches = (layer[None] < layer[:, None]) | (own[None] & (layer[None] <= layer[:, None]))
    reaches &= position[None] <= position[:, None]
    reaches &= is_target[:, None] & torch.tensor([k != Kind.logit for k in kind])[None]
    edges = torch.where(reaches, torch.randn(n, n, generator=draw, dtype=torch.float64), 0.0).to(dtype)
    value = torch.where(is_target, edges.sum(dim=1), torch.nan)
    of_feature = torch.tensor([k == Kind.feature for k in kind])
    activation = torch.where(of_feature, 0.1 + torch.rand(n, generator=draw, dtype=torch.float64), 0.0).to(dtype)
    w = torch.zeros(n, dtype=dtype)
    if probability:
        w[-len(probability) :] = torch.tensor(probability, dtype=dtype)
    return Graph(
        tokens=torch.arange(20, 20 + n_tokens),
        texts=[f" t{p}" for p in range(n_tokens)],
        kind=kind,
        layer=layer,
        position=position,
        index=index,
        activation=activation,
        value=value,
        probability=w,
        edges=edges,
        n_layers=N_LAYERS,
        d_features=D_FEATURES,
        n_active=features + 5,
        meta={
            "labels": [f" out{i}" for i in range(len(probability))],
            "prompt": "t1 t2 t3",
            "settings": {"feature": None},
        },
    )
