"""Slow versions of the numerics, written from the formulas: one token, layer, feature and dimension at a time.

They read like the sums in the papers and share no code with the package; only the small random transcoders to compare
them with, at the end, are the package's. Tensors in float64 where not said otherwise.
Axes: B tokens, L layers, M target layers, D d_model, F features of a layer. W_dec[l] is [F, L - l, D], its slot j
writes layer l + j.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipeline.arch import table
from pipeline.arch.base import Dims, Transcoder
from pipeline.arch.options import ArchOptions, Tie
from pipeline.arch.table import ARCHS
from pipeline.core import activations
from pipeline.core.activations import Activation
from pipeline.core.options import ActivationOptions, ThetaGrad

Weights = Mapping[str, Tensor]
"""By their names in files."""

Pairs = set[tuple[int, int, int]]
"""(token, layer, feature)"""

Maps = Sequence[Sequence[Tensor]]
"""By layer and transform."""


# Encoder and decoder


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """h_i^l = W_enc,i^l . x^l + b_i^l.  [B, L, D], [L, F, D], [L, F] -> [B, L, F]"""
    n_tokens, n_layers, n_features = x.shape[0], x.shape[1], W_enc.shape[1]

    def layer(b: int, l: int) -> Tensor:
        return torch.stack([x[b, l] @ W_enc[l, i] + b_enc[l, i] for i in range(n_features)])

    return torch.stack([torch.stack([layer(b, l) for l in range(n_layers)]) for b in range(n_tokens)])


def decode(features: Tensor, W_dec: Sequence[Tensor], b_dec: Tensor) -> Tensor:
    """y_hat^m = b_dec^m + sum_{l <= m} sum_i a_i^l W_dec,i^{l -> m}.  [B, L, F] -> [B, L, D]"""
    n_layers = b_dec.shape[0]
    values = features.tolist()
    tokens = []
    for b in range(features.shape[0]):
        layers = []
        for m in range(n_layers):
            y = b_dec[m]
            for l in range(m + 1):
                for i, value in enumerate(values[b][l]):
                    if value != 0:
                        y = y + features[b, l, i] * W_dec[l][i, m - l]
            layers.append(y)
        tokens.append(torch.stack(layers))
    return torch.stack(tokens)


SUMS = {"clt", "per_layer", "skip", "tied", "sae", "crosscoder", "matryoshka"}
"""Architectures that `reconstruct` knows: sums over features of what each adds."""


def writes(options: ArchOptions, l: int, m: int) -> bool:
    """Whether features of source l write layer m."""
    if options.name in ("clt", "matryoshka"):
        return l <= m and (options.max_reach is None or m - l <= options.max_reach)
    return {"tied": l <= m, "crosscoder": True}.get(options.name, l == m)


def sent_row(options: ArchOptions, weights: Weights, l: int, m: int, i: int, a: Tensor) -> Tensor:
    """What feature i of source l, with value a, adds to layer m. Names and shapes are those of the files."""
    if options.name != "tied":
        return a * weights[f"W_dec.{l}"][i, m if options.name == "crosscoder" else m - l]
    sent = a * weights[f"scale.{l}"][i, m - l] if options.scale else a
    if options.offset and a.item() > 0:
        sent = sent + weights[f"offset.{l}"][i, m - l]
    if options.tie == Tie.source:
        return weights["y_scale"][m] * sent * weights["W_tied"][l, i]
    return sent * weights["W_tied"][m, i]


def reconstruct(options: ArchOptions, weights: Weights, features: Tensor, x: Tensor) -> Tensor:
    """y_hat^m = b_dec^m + [W_skip^m x^m] + what each active feature adds, for any architecture that is a sum over its
    features. features [B, S, F], x [B, L, D] -> [B, L, D]"""
    b_dec, values = weights["b_dec"], features.tolist()
    tokens = []
    for b in range(features.shape[0]):
        layers = []
        for m in range(b_dec.shape[0]):
            y = b_dec[m]
            if options.skip:
                y = y + torch.stack([row @ x[b, m] for row in weights["W_skip"][m]])
            for l in range(features.shape[1]):
                for i, value in enumerate(values[b][l]):
                    if value != 0 and writes(options, l, m):
                        y = y + sent_row(options, weights, l, m, i, features[b, l, i])
            layers.append(y)
        tokens.append(torch.stack(layers))
    return torch.stack(tokens)


def encode_all(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """A crosscoder: h_i = sum_l W_enc,i^l . x^l + b_i.  [B, L, D], [L, F, D], [1, F] -> [B, 1, F]"""
    per_layer = encode(x, W_enc, torch.zeros(W_enc.shape[:2], dtype=x.dtype))
    return (sum(h for h in per_layer.unbind(1)) + b_enc[0])[:, None]


def decoder_norms(W_dec: Sequence[Tensor]) -> Tensor:
    """|W_dec,i^l|: L2 norm of feature i's rows, concatenated over its targets. -> [L, F]"""
    return torch.stack([torch.stack([row.reshape(-1).norm() for row in W]) for W in W_dec])


def decode_molt(features: Tensor, x: Tensor, U: Maps, V: Maps, offset: Maps, b_dec: Tensor) -> Tensor:
    """y_hat^l = b_dec^l + sum_t a_t^l U_t (V_t x^l + offset_t), transform by transform.

    U[l][t] [D, r_t], V[l][t] [r_t, D], offset[l][t] [r_t].  [B, L, F], [B, L, D] -> [B, L, D]
    """
    values = features.tolist()
    tokens = []
    for b in range(x.shape[0]):
        layers = []
        for l in range(x.shape[1]):
            y = b_dec[l]
            for t, value in enumerate(values[b][l]):
                if value != 0:
                    y = y + features[b, l, t] * (U[l][t] @ (V[l][t] @ x[b, l] + offset[l][t]))
            layers.append(y)
        tokens.append(torch.stack(layers))
    return torch.stack(tokens)


# Activations: which pairs are active, and with what value


def top_k(h: Tensor, k: int | Sequence[int]) -> Pairs:
    """For each token and layer the k largest of relu(h); ties to the lowest index; never a value that is not > 0."""
    chosen: Pairs = set()
    for b in range(h.shape[0]):
        for l in range(h.shape[1]):
            row = h[b, l].tolist()
            order = sorted(range(len(row)), key=lambda i: (-row[i], i))
            chosen |= {(b, l, i) for i in order[: _of(k, l)] if row[i] > 0}
    return chosen


def group_max(h: Tensor, k: int | Sequence[int]) -> Pairs:
    """For each token, layer and one of k groups of neighbours the largest of relu(h); ties to the lowest index."""
    chosen: Pairs = set()
    for b in range(h.shape[0]):
        for l in range(h.shape[1]):
            row, size = h[b, l].tolist(), h.shape[2] // _of(k, l)
            for start in range(0, len(row), size):
                best = max(range(start, start + size), key=lambda i: (row[i], -i))
                chosen |= {(b, l, best)} if row[best] > 0 else set()
    return chosen


def batch_top_k(h: Tensor, k: int | Sequence[int]) -> Pairs:
    """For each layer the k B largest of relu(h) over the batch; ties to the lowest (token, feature)."""
    n_tokens, n_layers, _ = h.shape
    values = h.tolist()
    chosen: Pairs = set()
    for l in range(n_layers):
        pairs = [(-value, b, i) for b in range(n_tokens) for i, value in enumerate(values[b][l])]
        chosen |= {(b, l, i) for value, b, i in sorted(pairs)[: _of(k, l) * n_tokens] if value < 0}
    return chosen


def batch_top_k_across(h: Tensor, k: int) -> Pairs:
    """The k B L largest of relu(h) over batch and layers; ties to the lowest (token, layer, feature)."""
    n_tokens, n_layers, _ = h.shape
    tokens = enumerate(h.tolist())
    pairs = [(-value, b, l, i) for b, token in tokens for l, row in enumerate(token) for i, value in enumerate(row)]
    return {(b, l, i) for value, b, l, i in sorted(pairs)[: k * n_tokens * n_layers] if value < 0}


def _of(k: int | Sequence[int], l: int) -> int:
    return k if isinstance(k, int) else k[l]


SELECTIONS = {"topk": top_k, "batchtopk": batch_top_k, "batchtopk_across": batch_top_k_across}
"""By the names of the table of activations."""


def at_pairs(h: Tensor, chosen: Pairs) -> Tensor:
    """h at the chosen pairs, 0 elsewhere; differentiable in h. [B, L, F] -> [B, L, F]"""
    mask = torch.zeros_like(h)
    for pair in chosen:
        mask[pair] = 1.0
    return h * mask


def above(h: Tensor, theta: Tensor) -> Tensor:
    """JumpReLU: a = h 1[h > theta], strictly.  [B, L, F], [L, F] -> [B, L, F]"""
    a = torch.zeros_like(h)
    for b in range(h.shape[0]):
        for l in range(h.shape[1]):
            for i in range(h.shape[2]):
                if h[b, l, i].item() > theta[l, i].item():
                    a[b, l, i] = h[b, l, i]
    return a


def jumprelu_gradients(h: Tensor, theta: Tensor, eps: float, g: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """dL/dh = g 1[h > theta], and dL/dt with t = log theta, K = 1[|h - theta| < eps / 2]:

    anthropic: dL/dt = -g theta K / eps.   gdm: dL/dtheta = -g theta K / eps, so that dL/dt = -g theta^2 K / eps.
    h, g [B, L, F], theta [L, F] -> [B, L, F], [L, F]
    """
    dh, dt = torch.zeros_like(h), torch.zeros_like(theta)
    for b in range(h.shape[0]):
        for l in range(h.shape[1]):
            for i in range(h.shape[2]):
                value, level, grad = float(h[b, l, i]), float(theta[l, i]), float(g[b, l, i])
                dh[b, l, i] = grad if value > level else 0.0
                if abs(value - level) < eps / 2:
                    dt[l, i] += -grad * level / eps * (level if rule == "gdm" else 1.0)
    return dh, dt


# Losses: means over tokens, sums over everything else


def reconstruction(y_hat: Tensor, y: Tensor) -> Tensor:
    """sum_m mean_n |y^m - y_hat^m|^2"""
    n_tokens, n_layers, _ = y.shape
    per_layer = [sum((y[n, m] - y_hat[n, m]).pow(2).sum() for n in range(n_tokens)) / n_tokens for m in range(n_layers)]
    return torch.stack([torch.as_tensor(term) for term in per_layer]).sum()


def weighted_reconstruction(y_hat: Tensor, y: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_m w_m mean_n |y^m - y_hat^m|^2"""
    layers = [w * reconstruction(y_hat[:, m : m + 1], y[:, m : m + 1]) for m, w in enumerate(weights)]
    return torch.stack(layers).sum()


def l1_sparsity(features: Tensor, norms: Tensor) -> Tensor:
    """mean_n sum_{l,i} |W_dec,i^l| a_i^l"""
    total = torch.zeros((), dtype=features.dtype)
    for n in range(features.shape[0]):
        for l in range(features.shape[1]):
            for i in range(features.shape[2]):
                total = total + norms[l, i] * features[n, l, i]
    return total / features.shape[0]


def l0_target(h: Tensor, theta: Tensor, eps: float, target: float) -> tuple[float, Tensor]:
    """(L0 / target - 1)^2, and its derivative by t = log theta, with d 1[h > theta] / dt = -theta K / eps.

    h [B, L, F], theta [L, F] -> (value, [L, F])
    """
    mean = sum(l0(above(h, theta))) / h.shape[0]
    slope = torch.zeros_like(theta)
    for n in range(h.shape[0]):
        for l in range(h.shape[1]):
            for i in range(h.shape[2]):
                if abs(float(h[n, l, i] - theta[l, i])) < eps / 2:
                    slope[l, i] -= theta[l, i] / eps / h.shape[0]
    return (mean / target - 1) ** 2, 2 * (mean / target - 1) / target * slope


def tanh_sparsity(features: Tensor, norms: Tensor, c: float) -> Tensor:
    """mean_n sum_{l,i} tanh(c |W_dec,i^l| a_i^l)"""
    n_tokens, n_layers, n_features = features.shape
    total = torch.zeros((), dtype=features.dtype)
    for n in range(n_tokens):
        for l in range(n_layers):
            for i in range(n_features):
                total = total + torch.tanh(c * norms[l, i] * features[n, l, i])
    return total / n_tokens


def pre_activation(h: Tensor) -> Tensor:
    """mean_n sum_{l,i} relu(-h)"""
    return torch.tensor(sum(max(0.0, -value) for value in h.reshape(-1).tolist()) / h.shape[0], dtype=h.dtype)


def pre_activation_january(h: Tensor, theta: Tensor, norms: Tensor) -> Tensor:
    """mean_n sum_{l,i} relu(theta - h) |W_dec,i|"""
    total = 0.0
    for n in range(h.shape[0]):
        for l in range(h.shape[1]):
            for i in range(h.shape[2]):
                total += max(0.0, float(theta[l, i] - h[n, l, i])) * float(norms[l, i])
    return torch.tensor(total / h.shape[0], dtype=h.dtype)


def error_from_dead(h: Tensor, W_dec: Sequence[Tensor], dead: Tensor) -> Tensor:
    """AuxK's e_hat: z = relu of the min(d/2, n_dead) largest h among a layer's dead features; e_hat = W_dec z, all
    targets, no bias.  [B, L, F], dead bool [L, F] -> [B, L, D]"""
    d_model = W_dec[0].shape[2]
    chosen: Pairs = set()
    for b in range(h.shape[0]):
        for l in range(h.shape[1]):
            ids = [i for i in range(h.shape[2]) if dead[l, i]]
            row = h[b, l].tolist()
            order = sorted(ids, key=lambda i: (-row[i], i))
            chosen |= {(b, l, i) for i in order[: min(d_model // 2, len(ids))] if row[i] > 0}
    return decode(at_pairs(h, chosen), W_dec, torch.zeros(h.shape[1], d_model, dtype=h.dtype))


def aux_k(error: Tensor, error_hat: Tensor, n_dead: int, variance: float) -> Tensor:
    """min(1, n_dead / (d/2)) V |e - e_hat|^2 / |e - mean e|^2, sums over all tokens and targets; alpha apart."""
    n_tokens, n_layers, d_model = error.shape
    top = bottom = torch.zeros((), dtype=error.dtype)
    for m in range(n_layers):
        mean = sum(error[n, m] for n in range(n_tokens)) / n_tokens
        for n in range(n_tokens):
            top = top + (error[n, m] - error_hat[n, m]).pow(2).sum()
            bottom = bottom + (error[n, m] - mean).pow(2).sum()
    return min(1.0, n_dead / (d_model / 2)) * variance * top / bottom


# Normalisation


def folded(
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Sequence[Tensor],
    b_dec: Tensor,
    m: Tensor,
    s: Tensor,
    M: Tensor,
    S: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """From x' = (x - m)/s, y = S y' + M (each [L, D]) to the model's units:

    W_enc = W'_enc / s (columns); b_enc = b'_enc - W_enc m; W_dec[l][:, j] = W'_dec[l][:, j] S_{l+j}; b_dec = S b' + M.
    """
    n_layers, n_features, d_model = W_enc.shape
    new_enc, new_b_enc = W_enc.clone(), b_enc.clone()
    new_dec = [W.clone() for W in W_dec]
    new_b_dec = b_dec.clone()
    for l in range(n_layers):
        for i in range(n_features):
            for d in range(d_model):
                new_enc[l, i, d] = W_enc[l, i, d] / s[l, d]
            new_b_enc[l, i] = b_enc[l, i] - sum(new_enc[l, i, d] * m[l, d] for d in range(d_model))
            for j in range(n_layers - l):
                for d in range(d_model):
                    new_dec[l][i, j, d] = W_dec[l][i, j, d] * S[l + j, d]
        for d in range(d_model):
            new_b_dec[l, d] = S[l, d] * b_dec[l, d] + M[l, d]
    return new_enc, new_b_enc, new_dec, new_b_dec


# Metrics, over the whole split at once


def fvu(y_hat: Tensor, y: Tensor) -> tuple[float, list[float]]:
    """sum_n |y - y_hat|^2 / sum_n |y - y_bar|^2: (pooled over layers, of each layer)"""
    n_tokens, n_layers, _ = y.shape
    errors, totals = [], []
    for m in range(n_layers):
        mean = sum(y[n, m] for n in range(n_tokens)) / n_tokens
        errors.append(sum(float((y[n, m] - y_hat[n, m]).pow(2).sum()) for n in range(n_tokens)))
        totals.append(sum(float((y[n, m] - mean).pow(2).sum()) for n in range(n_tokens)))
    return sum(errors) / sum(totals), [e / t for e, t in zip(errors, totals, strict=True)]


def l0(features: Tensor) -> list[int]:
    """Active features of each token, over all layers."""
    return [sum(value > 0 for value in token.reshape(-1).tolist()) for token in features]


def percentile(values: Sequence[int], q: int) -> int:
    """The smallest value that at least q % of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, -(-q * len(ordered) // 100) - 1)]


def kl(original: Sequence[float], replaced: Sequence[float]) -> float:
    """KL(P_original || P_replaced) in nats, of two logit vectors."""
    p, q = softmax(original), softmax(replaced)
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(value - max(logits)) for value in logits]
    return [w / sum(weights) for w in weights]


# Comparisons


def normwise(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, of the tensors as vectors; 0 / 0 counts as 0."""
    got, expected = got.detach().double(), expected.detach().double()
    difference = float((got - expected).norm())
    return difference / float(expected.norm()) if difference else 0.0


# Small transcoders to test


def activation_options(name: str) -> ActivationOptions:
    """Settings for any entry of the table of activations, each option that it needs set."""
    # The usual F = 11 is prime: a group is a feature, or all of them are one group.
    k = 1 if name == "groupmax" else 2
    values = {"k": k, "threshold": 0.3, "bandwidth": 1.0, "theta_grad": ThetaGrad.anthropic}
    return ActivationOptions(
        name, **{option: values[option] for option in activations.USES[name] - activations.OPTIONAL}
    )


def allowed(architecture: str, activation: str) -> bool:
    """Whether the two go together: in one feature space over all layers nothing can compete across."""
    return not (activation == "batchtopk_across" and ARCHS[architecture].sources(Dims(3, 6)) == 1)


def arch_options(architecture: str, **options: Any) -> ArchOptions:
    """An architecture's options, with those that it fixes or must have set, and a width of 11."""
    # 2 transforms of rank 6, 3 of rank 4, 6 of rank 2, or as many times that; 1 of rank 3 and 3 of rank 1.
    ranks = [6, 4, 2] if options.get("d_features", 11) % 11 == 0 else [3, 1]
    needs: dict[str, dict[str, Any]] = {"molt": {"ranks": ranks}}
    fixed = ARCHS[architecture].fixed | needs.get(architecture, {})
    return ArchOptions(architecture, **{"d_features": 11, **fixed, **options})


def transcoder(
    architecture: str | ArchOptions = "clt",
    activation: str | Activation = "topk",
    n_layers: int = 3,
    d_features: int = 11,
    d_model: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Transcoder:
    """Every parameter random, in float64 unless told otherwise, in evaluation mode."""
    options = architecture if isinstance(architecture, ArchOptions) else arch_options(architecture)
    options, dims = replace(options, d_features=d_features), Dims(n_layers, d_model)
    if isinstance(activation, str):
        n_sources = table.n_sources(options, dims)
        activation = activations.build(activation_options(activation), n_sources, d_features)
    model = table.build(options, dims, activation).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model.eval()


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
