"""What the user may say about uses of a replacement model. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass


@dataclass
class GenerateOptions:
    n_tokens: int = 32
    """Most tokens that are added to the prompt. It ends earlier at an end of text and at the model's last position."""

    temperature: float = 0.0
    """Divides the logits before a token is drawn; 0 takes the most likely one (greedy)."""

    top_k: int | None = None
    """Draw among the k most likely tokens. Null: among all."""

    top_p: float | None = None
    """Draw among the fewest most likely tokens whose probabilities add up to this. Null: among all."""

    seed: int = 0
    """Of the random numbers, which are the same ones for the original and the replacement."""

    layers: list[int] | None = None
    """The layers whose MLPs are replaced, counted from 0 at the first that the transcoder reads. Null: all."""

    keep_error: bool = False
    """Add what the transcoder misses on the original's activations, at each token. Nothing being changed, the
    replacement then is the original: a check."""

    kv_cache: bool = True
    """Keep keys and values of earlier tokens. No effect on the result; false computes all tokens again at each one."""
