"""What the user may say about several processes. Free of torch, so that the command line starts at once."""

from dataclasses import dataclass

PATIENCE_S = 24 * 3600.0
"""How long a rank waits where others do pieces of work for hours that it does not do."""


@dataclass
class DistOptions:
    """Ranks are the processes that torchrun or Slurm starts. They form a grid: those of a row share the features of one
    transcoder, those of a column the tokens of one batch."""

    name: str = "single"
    """single, ddp, feature_shard or mesh."""

    features: int | None = 1
    """Ranks that share the features, each holding its rows of the weights. Null: all that `data` leaves."""

    data: int | None = 1
    """Ranks that share the tokens of a batch, each holding all weights of its row. Null: all that `features` leaves."""

    timeout_s: float = 600.0
    """Seconds after which a rank that waits for the others gives up. One that dies is noticed at once."""

    world: int | None = None
    """With --dry-run and in clt plan: how many ranks to plan for, started or not. Null: those that were started."""
