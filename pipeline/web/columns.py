"""The headline numbers: where they stand in eval/metrics.json, what they mean, which way is better."""

import math
from dataclasses import dataclass
from typing import Literal

from pipeline.web.runs import Run, lookup

Interval = tuple[float, float]


@dataclass(frozen=True)
class Column:
    key: str
    """Its name in the CSV; key_low, key_high, key_exact, key_exact_low and key_exact_high stand beside it there."""

    title: str
    path: str
    """In eval/metrics.json, under the thresholds; `ci95.<path>` is the interval, `exact.<path>` the training rule's."""

    better: Literal[-1, 0, 1]
    """1: higher is better, -1: lower, 0: neither."""

    about: str
    unit: str = ""
    among: Literal["", "live", "mlp_out"] = ""
    """Which runs it compares: all, those replaced live, those that reconstruct the MLPs' outputs."""

    exact: str = ""
    """Path of the number under the rule of training, where it is not exact.<path>."""

    shown: bool = True
    """False: in the CSV and behind "all columns"."""

    log: bool = False
    """Plotted on a logarithmic axis."""

    count: bool = False
    """A whole number."""

    @property
    def exact_path(self) -> str:
        return self.exact or f"exact.{self.path}"

    @property
    def label(self) -> str:
        """For an axis."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    def value(self, run: Run) -> float | None:
        return run.number(self.path)

    def interval(self, run: Run) -> Interval | None:
        return interval_at(run, f"ci95.{self.path}")

    def value_exact(self, run: Run) -> float | None:
        return run.number(self.exact_path)

    def interval_exact(self, run: Run) -> Interval | None:
        path = f"ci95.{self.exact}" if self.exact else f"exact.ci95.{self.path}"
        return interval_at(run, path)

    def compares(self, run: Run) -> bool:
        """Whether the run's number stands beside those of others."""
        if self.among == "live":
            return lookup(run.metrics, "replacement.basis") == "live"
        return self.among != "mlp_out" or run.settings.get("arch.target", "mlp_out") == "mlp_out"


def interval_at(run: Run, path: str) -> Interval | None:
    """[low, high] at a path of eval/metrics.json; None where it is not whole."""
    bounds = run.numbers(path)
    if bounds is None or len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


L0 = Column("l0", "L0", "l0.total", 0, "mean number of active features of a token, all layers", "features a token")
KL = Column(
    "kl", "KL", "replacement.kl", -1, "KL(original || replaced), every MLP replaced, mean over tokens",
    "nats a token", "live", log=True,
)  # fmt: skip
FVU = Column(
    "fvu", "FVU", "fvu.pooled", -1, "squared error over the variance of the targets, pooled over layers",
    "", "mlp_out", log=True,
)  # fmt: skip
DEAD = Column("dead", "dead", "dead_fraction.total", -1, "share of features that never fired on these tokens")
TASKS = Column(
    "tasks", "tasks", "tasks.mean.threshold", 1, "mean accuracy on the built-in world's questions, replaced",
    "mean accuracy", "live", exact="tasks.mean.exact",
)  # fmt: skip
TOP1 = Column(
    "top1", "top-1", "replacement.top1", 1, "share of tokens with the same most likely next token", "agreement", "live"
)

COLUMNS = [
    L0,
    KL,
    FVU,
    TOP1,
    Column("delta_ce", "delta CE", "replacement.delta_ce", -1, "rise of the cross-entropy on the text", "nats", "live"),
    DEAD,
    TASKS,
    Column(
        "kl_recovered_mean_ablation", "KL recovered", "replacement.kl_recovered_mean_ablation", 1,
        "1 - KL / KL with every MLP's output at its mean", "", "live",
    ),
    Column("kl_median", "KL, median", "replacement.kl_median", -1, "median over tokens", "nats", "live", shown=False),
    Column("top5", "top-5", "replacement.top5", 1, "share of the original's five most likely next tokens that are "
           "among the replacement's five", "", "live", shown=False),
    Column("ce_recovered_mean_ablation", "CE recovered", "replacement.ce_recovered_mean_ablation", 1,
           "1 - delta CE / delta CE with every MLP's output at its mean", "", "live", shown=False),
    Column("kl_recovered_zero_ablation", "KL recovered (zero)", "replacement.kl_recovered_zero_ablation", 1,
           "1 - KL / KL with every MLP's output zero", "", "live", shown=False),
    Column("ce_recovered_zero_ablation", "CE recovered (zero)", "replacement.ce_recovered_zero_ablation", 1,
           "1 - delta CE / delta CE with every MLP's output zero", "", "live", shown=False),
    Column("explained_variance", "EV", "explained_variance.pooled", 1, "1 - FVU", "", "mlp_out", shown=False),
    Column("explained_variance_centred", "EV, centred", "explained_variance_centred.pooled", 1,
           "the same with the error's own mean removed", "", "mlp_out", shown=False),
    Column("cosine", "cosine", "cosine.pooled", 1, "between reconstruction and target", "", "mlp_out", shown=False),
    Column("bias", "bias", "bias.pooled", -1, "the constant part of the FVU", "", "mlp_out", shown=False),
    Column("relative_norm", "norm ratio", "relative_norm.pooled", 0, "mean |y_hat| over mean |y|", "", "mlp_out",
           shown=False),
    Column("dense", "dense", "dense_features.total", 0, "features that fire on more than a tenth of the tokens",
           "features", shown=False, count=True),
]  # fmt: skip
"""In the order of the table."""


def shown(value: float | None, like: float | None = None) -> str:
    """Three digits that count, of `like` where a number stands beside another; "" for None. Close below 1 they are
    those of what is missing."""
    if value is None:
        return ""
    size = abs(value if like is None else like)
    size = 1 - size if 0.99 < size < 1 else size
    digits = 0 if size == 0 else min(6, max(0, 2 - math.floor(math.log10(size))))
    text = f"{value:,.{digits}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def shown_interval(bounds: Interval | None, like: float | None) -> str:
    """[low, high], with the digits of the number that it belongs to; of a 0, with those of its wider end."""
    if bounds is None:
        return ""
    like = like or max(bounds, key=abs)
    return f"[{shown(bounds[0], like)}, {shown(bounds[1], like)}]"
