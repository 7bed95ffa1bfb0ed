"""What names a feature: the tokens at which it is most active in its top contexts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

LABELLING = 3
"""Most tokens in a label."""
LEAST_SHARE = 0.15
"""Of a token in a label but the first: its part of the activation at the peaks of the top contexts."""


def top_tokens(examples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The tokens at the peaks of examples, [text, share of the activation there], the largest share first."""
    mass: Counter[str] = Counter()
    for example in examples:
        activations = example["tokens_acts_list"]
        at = max(range(len(activations)), key=activations.__getitem__)
        text = example["tokens"][at]
        mass[text.strip() or repr(text)] += activations[at]
    total = sum(mass.values())
    return [[text, float(f"{value / total:.3g}")] for text, value in mass.most_common(10)] if total else []


def label(tokens: Sequence[Sequence[Any]]) -> str:
    """Of the first of its `top_tokens`; empty for a feature that never fires."""
    named = [text for i, (text, share) in enumerate(tokens[:LABELLING]) if i == 0 or share >= LEAST_SHARE]
    return " / ".join(named)


def top_tokens_of(record: Mapping[str, Any] | None, n_tokens: int = LABELLING) -> list[str]:
    """The first `top_tokens` of a feature, from its JSON (ours or another project's); none for no JSON."""
    if record is None or not record["examples_quantiles"]:
        return []
    return [text for text, _ in top_tokens(record["examples_quantiles"][0]["examples"])[:n_tokens]]
