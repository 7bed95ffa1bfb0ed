"""What replacing the MLPs does to the model's predictions: each number defined here once.

P are the original's predictions at a position, Q those of the model with its MLPs replaced; means are over the scored
positions (not position 0, not padding) in float64.

    kl          KL(P || Q) = sum over tokens v of P(v) (log P(v) - log Q(v)), in nats
    kl_median   the median of the positions' KL
    top1        share of positions where both have the same most likely token
    top5        share of P's five most likely tokens that are among Q's five; with one in place of five it is top1
    ce          -log of the probability of the next token, over the positions whose next token is scored too
    delta_ce    ce of Q - ce of P
    recovered   1 - kl / (kl of an ablation), and 1 - delta_ce / (delta_ce of an ablation)

Among equally likely tokens the lowest id counts as the most likely.
"""

import torch
from torch import Tensor

from pipeline.core.metrics import Sums, Tree, ratios

ELEMENTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}
"""Positions x vocabulary that are in float64 at a time. 2 MB a copy stay in a CPU's caches; a GPU wants more at once,
134 MB a copy."""

BEST = 5

SUMS = ("kl_sum", "top1_sum", "top5_sum", "ce_original_sum", "ce_replaced_sum", "n_tokens", "n_next")
"""Of a context."""


class Predictions:
    """The original's predictions on some contexts, with what does not depend on who is compared with them."""

    def __init__(self, logits: Tensor, scored: Tensor, next_token: Tensor, has_next: Tensor) -> None:
        """logits [n, T, V]; scored, has_next: bool [n, T]; next_token int64 [n, T]."""
        self.shape = scored.shape
        self.scored, self.has_next = scored.cpu(), (scored & has_next).cpu()
        self.logits = logits.flatten(0, 1)
        scored, next_token, has_next = (t.to(logits.device).flatten() for t in (scored, next_token, has_next))
        size = max(1, ELEMENTS_AT_ONCE.get(logits.device.type, 2**24) // logits.shape[-1])
        self.rows = scored.nonzero().squeeze(1).split(size)
        self.known = [has_next[rows] for rows in self.rows]
        """Which of them have a next token that is known."""
        self.targets = [next_token[rows][known] for rows, known in zip(self.rows, self.known, strict=True)]
        parts = [self.logits[rows].double() for rows in self.rows]
        self.log_total = [part.logsumexp(dim=-1) for part in parts]
        self.ce = [self._cross_entropy(i, part, self.log_total[i]) for i, part in enumerate(parts)]
        self.best = [best(self.logits[rows]) for rows in self.rows]

    def _cross_entropy(self, part: int, logits: Tensor, log_total: Tensor) -> Tensor:
        """Of the known rows of a part, from the logits [k, V] of all its rows and their logsumexp [k]."""
        known = self.known[part].nonzero().squeeze(1)
        return log_total[known] - logits[known, self.targets[part]]

    def against(self, replaced: Tensor) -> dict[str, Tensor]:
        """Of each position, [n, T] float64: kl, top1, top5, ce_original, ce_replaced; 0 where it has none. replaced
        [n, T, V]"""
        replaced = replaced.flatten(0, 1)
        names = ("kl", "top1", "top5", "ce_original", "ce_replaced")
        found = {
            name: torch.zeros(self.scored.numel(), dtype=torch.float64, device=self.logits.device) for name in names
        }
        for i, rows in enumerate(self.rows):
            log_p, other = self.logits[rows].double(), replaced[rows]
            log_q = other.double()
            total_p, total_q = self.log_total[i], log_q.logsumexp(dim=-1)
            chosen = best(other)
            found["top1"][rows] = (self.best[i][:, 0] == chosen[:, 0]).double()
            shared = (self.best[i][:, :, None] == chosen[:, None, :]).sum(dim=(1, 2))
            found["top5"][rows] = shared.double() / chosen.shape[1]
            found["ce_original"][rows[self.known[i]]] = self.ce[i]
            found["ce_replaced"][rows[self.known[i]]] = self._cross_entropy(i, log_q, total_q)
            probabilities = (log_p - total_p[:, None]).exp_()
            # The totals are constants of a row: taken off the sum, not off each logit.
            found["kl"][rows] = torch.linalg.vecdot(probabilities, log_p.sub_(log_q)) - (total_p - total_q)
        return {name: values.view(self.shape).cpu() for name, values in found.items()}


class Divergence:
    """The numbers of this file for one replacement, context by context. Memory: one float64 a position."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._scored: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}

    @classmethod
    def of_rows(cls, rows: Tensor) -> "Divergence":
        """What was measured on contexts, from their `rows`."""
        found, length = cls(), (rows.shape[1] - len(SUMS)) // 2
        kl, scored, sums = rows.split([length, length, len(SUMS)], dim=1)
        found._kl, found._scored = [kl], [scored.bool()]
        found._sums = {name: [values] for name, values in zip(SUMS, sums.unbind(1), strict=True)}
        return found

    def rows(self, length: int) -> Tensor:
        """All of it, a row for each context of `length` tokens. float64 [C, 2 T + len(SUMS)]"""
        if not self._kl:
            return torch.zeros(0, 2 * length + len(SUMS), dtype=torch.float64)
        kl, scored = self.per_token()
        sums = torch.stack([torch.cat(self._sums[name]) for name in SUMS], dim=1)
        return torch.cat([kl, scored.double(), sums], dim=1)

    def update(self, original: Tensor, replaced: Tensor, scored: Tensor, next_token: Tensor, has_next: Tensor) -> None:
        """Some more contexts. original, replaced: logits [n, T, V]; scored, has_next: bool [n, T]; next_token int64
        [n, T]."""
        self.add(Predictions(original, scored, next_token, has_next), replaced)

    def add(self, original: Predictions, replaced: Tensor) -> None:
        """The same where several replacements are compared with one original."""
        found = original.against(replaced)
        self._kl.append(found["kl"])
        self._scored.append(original.scored)
        sums = {f"{name}_sum": values.sum(dim=1) for name, values in found.items()}
        sums |= {"n_tokens": original.scored.sum(dim=1).double(), "n_next": original.has_next.sum(dim=1).double()}
        for name, values in sums.items():
            self._sums.setdefault(name, []).append(values)

    def per_token(self) -> tuple[Tensor, Tensor]:
        """(KL of each position float64 [C, T], 0 where it is not scored; which are, bool [C, T])"""
        return torch.cat(self._kl), torch.cat(self._scored)

    def sums(self) -> dict[str, Tensor]:
        """Of each context [C]: n_tokens, n_next, kl_sum, top1_sum, top5_sum, ce_original_sum, ce_replaced_sum; and for
        positions 1 and later [C, T - 1]: kl_position (the KL itself) and n_position (1 where it is scored)."""
        kl, scored = self.per_token()
        positions = {"kl_position": kl[:, 1:], "n_position": scored[:, 1:].double()}
        return {name: torch.cat(parts) for name, parts in self._sums.items()} | positions

    def _mean(self, name: str, count: str = "n_tokens") -> float:
        return float(torch.cat(self._sums[name]).sum() / torch.cat(self._sums[count]).sum())

    @property
    def n(self) -> int:
        return int(torch.cat(self._sums["n_tokens"]).sum())

    @property
    def n_next(self) -> int:
        return int(torch.cat(self._sums["n_next"]).sum())

    @property
    def kl(self) -> float:
        return self._mean("kl_sum")

    @property
    def kl_median(self) -> float:
        """The mean of the middle two, where their number is even. Like percentiles of L0, it has no interval."""
        kl, scored = self.per_token()
        ordered = kl[scored].sort().values
        return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)

    @property
    def top1(self) -> float:
        return self._mean("top1_sum")

    @property
    def top5(self) -> float:
        return self._mean("top5_sum")

    @property
    def ce_original(self) -> float:
        return self._mean("ce_original_sum", "n_next")

    @property
    def ce_replaced(self) -> float:
        return self._mean("ce_replaced_sum", "n_next")

    @property
    def delta_ce(self) -> float:
        return self.ce_replaced - self.ce_original


def replacement_numbers(sums: Sums, ablated: dict[str, Sums]) -> Tree:
    """Every number of a replacement that is a ratio of sums, from those of `Divergence.sums` and of the baselines (the
    key `zero_ablation` gives kl_zero_ablation). Leaves have the sums' leading axes; NaN where a denominator is 0."""
    own = _means(sums)
    numbers: Tree = {name: own[name] for name in ("kl", "top1", "top5", "ce_original", "ce_replaced", "delta_ce")}
    numbers["kl_by_position"] = ratios(sums["kl_position"], sums["n_position"])
    others = {name: _means(baseline) for name, baseline in ablated.items()}
    for name, other in others.items():
        numbers |= {f"{key}_{name}": other[key] for key in ("kl", "top1", "delta_ce")}
    for key, label in (("kl", "kl"), ("delta_ce", "ce")):
        for name, other in others.items():
            numbers[f"{label}_recovered_{name}"] = 1 - ratios(own[key], other[key])
    return numbers


def _means(sums: Sums) -> dict[str, Tensor]:
    found = {name: ratios(sums[f"{name}_sum"], sums["n_tokens"]) for name in ("kl", "top1", "top5")}
    found |= {name: ratios(sums[f"{name}_sum"], sums["n_next"]) for name in ("ce_original", "ce_replaced")}
    return found | {"delta_ce": found["ce_replaced"] - found["ce_original"]}


def best(logits: Tensor, k: int = BEST) -> Tensor:
    """The k largest (all, where there are fewer) of each row in descending order, the lowest index first among equals,
    to which logits of low precision often come. [n, V] -> int64 [n, k]"""
    k = min(k, logits.shape[-1])
    values, found = logits.topk(min(k + 1, logits.shape[-1]), dim=-1)  # among equals it takes any
    tied = (values[:, 1:] == values[:, :-1]).any(dim=-1).nonzero().squeeze(1)
    found = found[:, :k]
    if len(tied):
        found[tied] = _best_of_equals(logits[tied], k)
    return found


def _best_of_equals(logits: Tensor, k: int) -> Tensor:
    # float32 as integers in the same order, the index below. + 0.0: no -0.
    bits = (logits.float() + 0.0).contiguous().view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    ordered -= torch.arange(logits.shape[-1], device=logits.device)
    return ordered.topk(k, dim=-1).indices
