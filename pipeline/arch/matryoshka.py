"""Matryoshka cross-layer transcoder: the first m features of each layer reconstruct alone, for several m at once
(Bussmann, Nabeshima, Karvonen, Nanda 2025, "Learning Multi-Level Features with Matryoshka Sparse Autoencoders",
arXiv 2503.17547; here with the decoders of a CLT, "Circuit Tracing").

    a^l = activation(W_enc^l x^l + b_enc^l), over all F features
    y_hat_m^n = b_dec^n + sum_{l <= n <= l + max_reach} sum_{i < m} a_i^l W_dec,i^{l -> n}

    loss = |y - y_hat_F|^2 + sum over the shorter prefixes m < F of |y - y_hat_m|^2

the sum over prefixes as in the paper (not their mean), each term a mean over tokens and a sum over layers and
dimensions. Short prefixes must do without the rest, so that the first features stay general and are not absorbed by the
later, special ones. Which features are active is decided over all F at once, and the finished transcoder is a CLT.

Prefixes are fixed, or drawn at each step: n - 1 different ones below F with probability of m proportional to
sqrt(m) - sqrt(m - 1), which is the authors' truncated Pareto distribution (power 1/2), and F.

Parameters: L encoders and R decoders of F D weights, R the pairs of layers (source, target) in reach, L F + L D biases.
With max_reach=0 that is 2 L F D + L F + L D; without a limit R = L (L + 1) / 2.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.arch.base import Encoded, Output
from pipeline.arch.clt import CLT
from pipeline.arch.options import ArchOptions
from pipeline.core.sparse import Features, bag, from_pairs, of_layer
from pipeline.errors import UserError

SHARES = (1 / 32, 3 / 32, 7 / 32, 15 / 32)
"""Shorter prefixes as shares of F: the paper's 2048, 6144, 14336 and 30720 of 65536."""


class Matryoshka(CLT):
    uses: ClassVar[frozenset[str]] = frozenset({"max_reach", "prefixes", "random_prefixes"})

    @classmethod
    def check(cls, options: ArchOptions) -> None:
        F, sizes, n = options.d_features, options.prefixes, options.random_prefixes
        if sizes is not None and n is not None:
            raise UserError("arch.prefixes and arch.random_prefixes exclude each other; set one of them to null")
        if sizes is not None and (not sizes or sizes[-1] != F):
            raise UserError(f"arch.prefixes={sizes} must end at arch.d_features={F}; make {F} the last of them")
        if sizes is not None and (sizes[0] < 1 or any(a >= b for a, b in itertools.pairwise(sizes))):
            raise UserError(f"arch.prefixes={sizes} must be at least 1 and ascend; sort them and name each once")
        if n is not None and not 1 <= n <= F:
            raise UserError(f"arch.random_prefixes={n} must lie between 1 and arch.d_features={F}")

    @property
    def nests(self) -> bool:
        """Whether there is a prefix shorter than F."""
        return len(self.usual_sizes()) > 1 if self.options.random_prefixes is None else self.options.random_prefixes > 1

    def usual_sizes(self) -> list[int]:
        """The fixed prefixes, ascending, the last F; the published shares where they are drawn or not given."""
        return usual_sizes(self.options)

    def sizes(self, seed: int, step: int) -> list[int]:
        """The prefixes of a step, ascending, the last F: a function of its arguments alone."""
        n, F = self.options.random_prefixes, self.d_features
        if n is None:
            return self.usual_sizes()
        # Not one generator for the run: a resumed run needs none of the earlier draws.
        uniform = random.Random(f"prefixes/{seed}/{step}")
        drawn: set[int] = set()
        while len(drawn) < n - 1:
            # The inverse of the distribution function sqrt(m / (F - 1)).
            drawn.add(max(1, math.ceil((F - 1) * uniform.random() ** 2)))
        return [*sorted(drawn), F]

    def nested(self, features: Features, sizes: Sequence[int]) -> list[Tensor]:
        """y_hat [B, L, D] from the first m features of each layer, for each m of `sizes`, which ascend.

        Each feature's contribution is computed once: a prefix is the one before it and a slice of features.
        """
        if not sizes:
            return []
        widths = [b - a for a, b in itertools.pairwise([0, *sizes])]
        rest = self.d_features - sizes[-1]
        zero = torch.zeros((), dtype=self.b_dec.dtype, device=self.b_dec.device)
        slices = [[zero] * self.dims.n_layers for _ in widths]
        for layer in range(self.n_sources):
            parts = _cut(features, layer, widths)
            for target, table in zip(self.targets(layer), self.tables(layer), strict=True):
                # One split, not slices: its gradient is one tensor put together, not as many full ones added up.
                for rows, write, piece in zip(slices, parts, table.split([*widths, rest]), strict=False):
                    rows[target] = rows[target] + write(piece)
        return [torch.stack(rows, dim=1) + self.b_dec for rows in itertools.accumulate(slices, _added)]

    def forward(self, x: Tensor, need_pre_acts: bool = False, sizes: Sequence[int] = ()) -> Output:
        """x [B, L, D] -> Output; with `sizes` (ascending, the last F) it has the shorter prefixes' reconstructions."""
        return self.decoded(self.activate(x, need_pre_acts), x, sizes)

    def decoded(self, encoded: Encoded, x: Tensor, sizes: Sequence[int] = ()) -> Output:
        if not sizes:
            return super().decoded(encoded, x)
        assert sizes[-1] == self.d_features
        *shorter, y_hat = self.nested(encoded.features, sizes)
        return Output(encoded.pre_acts, encoded.features, y_hat, tuple(shorter), encoded.gated, encoded.beyond)


def usual_sizes(options: ArchOptions) -> list[int]:
    """`Matryoshka.usual_sizes` of these options."""
    if options.prefixes is not None:
        return list(options.prefixes)
    shorter = {max(1, int(share * options.d_features)) for share in SHARES}
    return [*sorted(shorter - {options.d_features}), options.d_features]


def _added(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _cut(features: Features, layer: int, widths: Sequence[int]) -> list[Callable[[Tensor], Tensor]]:
    """A layer's features in consecutive slices of so many: for each what it writes, [B, D], from its decoder rows."""
    one = of_layer(features, layer)
    if isinstance(one, Tensor):
        return [part.matmul for part in one[:, : sum(widths)].split(list(widths), dim=1)]
    pattern, values = one
    parts: list[Callable[[Tensor], Tensor]] = []
    for a, b in itertools.pairwise([0, *itertools.accumulate(widths)]):
        here = ((pattern.indices >= a) & (pattern.indices < b)).nonzero().squeeze(1)
        inside = from_pairs(pattern.tokens[here], pattern.indices[here] - a, pattern.n_tokens, b - a)
        parts.append(partial(bag, inside, values[here]))
    return parts
