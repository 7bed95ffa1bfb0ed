"""From the words on a command line to a typed configuration, and to the stage that takes it.

The only room that knows Hydra. The words are made ready for it (`words.py`), composed with `conf/<command>.yaml` and
merged into the dataclass of the command (`composing.py`); `launch` then calls the `run(config)` of the command's stage
(`jobs.py`), once or for each job of a sweep (`sweeps.py`). What the user can mend is one line (`refusals.py`).
"""

from pipeline.config.completion import complete
from pipeline.config.composing import compose
from pipeline.config.launching import attempt, launch
from pipeline.config.request import Request

__all__ = ["Request", "attempt", "complete", "compose", "launch"]
