"""What `clt eval` prints: the headline numbers of metrics.json with their intervals, both rules beside each other."""

from typing import Any

from pipeline.core.metrics import Tree

ROWS = [
    ("L0, all layers", ("l0", "total")),
    ("dead features", ("dead_fraction", "total")),
    ("dense features", ("dense_features", "total")),
    ("explained variance", ("explained_variance", "pooled")),
    ("cosine", ("cosine", "pooled")),
    ("norm, relative", ("relative_norm", "pooled")),
    ("KL, nats per token", ("replacement", "kl")),
    ("  median token", ("replacement", "kl_median")),
    ("  of zero ablation", ("replacement", "kl_zero_ablation")),
    ("  of mean ablation", ("replacement", "kl_mean_ablation")),
    ("  recovered of mean abl.", ("replacement", "kl_recovered_mean_ablation")),
    ("top-1 agreement", ("replacement", "top1")),
    ("top-5 agreement", ("replacement", "top5")),
    ("CE of the model, nats", ("replacement", "ce_original")),
    ("delta CE, nats", ("replacement", "delta_ce")),
    ("  recovered of mean abl.", ("replacement", "ce_recovered_mean_ablation")),
]
"""Label, and where the number stands: in metrics.json and again in its `ci95`."""

WIDTH = 26
"""Of a label, and of a column."""


def table(metrics: Tree) -> list[str]:
    """metrics.json as lines of text."""
    replaced, exact = metrics["replacement"] or {}, metrics["exact"]
    sides = [metrics] if exact is None else [metrics, exact]
    about = f"{metrics['n_tokens']:,} tokens in {metrics['n_contexts']:,} contexts, split {metrics['split']}"
    brackets = "; in brackets 95 % intervals over contexts" if metrics["ci95"] else ""
    heads = ["thresholds", "exact rule"][: len(sides)]
    lines = [about + brackets, _line("", heads)]
    for label, place in ROWS:
        cells = [_cell(side, place) for side in sides]
        if any(cells):
            lines.append(_line(label, cells))
    lines += [*_tasks(metrics), *_swaps(metrics)]
    if not replaced:
        lines.append(f"no replacement: {metrics['no_replacement']}")
    if "note" in replaced:
        lines.append(f"replacement is {replaced['basis']}: {replaced['note']}")
    return [*lines, _by_layer(metrics)]


def _tasks(metrics: Tree) -> list[str]:
    if not metrics["tasks"] or not metrics["replacement"]:
        return []
    mean = metrics["tasks"]["mean"]
    cells = [_shown(mean["threshold"])] + ([_shown(mean["exact"])] if "exact" in mean else [])
    return [_line("task accuracy", cells), _line("  of the model itself", [_shown(mean["original"])])]


def _swaps(metrics: Tree) -> list[str]:
    """Of the built-in world: do answers follow when one country's features take the place of another's?"""
    swaps, ends = (((side or {}).get("world") or {}).get("country_swap") or {} for side in (metrics, metrics["ci95"]))
    lines: list[str] = []
    for relation, swap in swaps.items():
        side = {"swap": swap["features"], "ci95": {"swap": (ends.get(relation) or {}).get("features")}}
        label = "country swap, followed" if not lines else ""
        lines.append(_line(label, [f"{_cell(side, ('swap', 'follows'))} of {swap['n']} ({relation})"]))
    return lines


def _by_layer(metrics: Tree) -> str:
    explained, l0 = metrics["explained_variance"]["per_layer"], metrics["l0"]["per_layer"]
    if len(l0) != len(explained):  # one feature space over all layers
        return "by layer, explained variance: " + ", ".join(map(_shown, explained))
    pairs = [f"{fires:.1f} / {_shown(ev)}" for fires, ev in zip(l0, explained, strict=True)]
    return "by layer, L0 / explained variance: " + ", ".join(pairs)


def _line(label: str, cells: list[str]) -> str:
    return f"{label:{WIDTH}}{''.join(f'{cell:{WIDTH}}' for cell in cells)}".rstrip()


def _cell(side: Tree, place: tuple[str, str]) -> str:
    value = _at(side, place)
    ends = _at(side["ci95"] or {}, place)
    if value is None:
        return ""
    return _shown(value) + (f" [{_shown(ends[0])}, {_shown(ends[1])}]" if ends else "")


def _at(tree: Tree, place: tuple[str, str]) -> Any:
    return (tree.get(place[0]) or {}).get(place[1])


def _shown(value: float | None) -> str:
    """Four decimals, fewer of what is large."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.{4 if abs(value) < 10 else 1}f}"
