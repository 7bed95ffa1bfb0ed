"""The worst contexts: their text, a token the darker the more the prediction after it differs."""

import math
from typing import Any

from pipeline.web.columns import shown
from pipeline.web.runs import Run, lookup

LEVELS = 8


def worst(run: Run, most: int) -> tuple[list[dict[str, Any]], str]:
    """[{context, kl, tokens: [{text, level, kl}]}], and the KL of the darkest level. level None: not scored."""
    found = (run.metrics or {}).get("worst_contexts")
    if not isinstance(found, list) or not found:
        return [], ""
    found = found[:most]
    darkest = max((kl for context in found for kl in context["kl_per_token"] if kl is not None), default=0.0)
    return [_context(context, darkest) for context in found], shown(darkest)


def _context(context: dict[str, Any], darkest: float) -> dict[str, Any]:
    texts, kl = context["tokens"], context["kl_per_token"]
    before = [None] * (len(texts) - len(kl))  # position 0 is not scored
    tokens = [_token(text, at, darkest) for text, at in zip(texts, [*before, *kl], strict=False)]
    words = not any(text != text.strip() for text in texts)  # the tokenizer puts the spaces between them
    return {"context": lookup(context, "context"), "kl": shown(lookup(context, "kl")), "tokens": tokens, "words": words}


def _token(text: str, kl: float | None, darkest: float) -> dict[str, Any]:
    if kl is None:
        return {"text": text, "level": None}
    # The root, so that what lies between nothing and the worst is seen.
    share = math.sqrt(max(0.0, kl) / darkest) if darkest > 0 else 0.0
    level = round(share * LEVELS)
    return {"text": text, "level": level or None, "kl": f"{kl:.3g} nats"}
