"""The numbers of a run, and what is due after which of its steps."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Plan:
    """The numbers of a run, resolved."""

    n_steps: int
    batch_tokens: int
    dead_window: int
    """Tokens without firing after which a feature is dead."""
    checkpoint_steps: int
    keep_checkpoints: int
    log_steps: int
    resample_steps: int
    """Steps between resamplings of dead features; 0 for none."""
    last_resample: int
    """No resampling after so many steps."""
    seed: int
    y_variance: Tensor
    """[L, D] variance of the targets over the cache, in the model's units."""
    accumulate: int = 1
    """Parts of a batch that go through the model one after the other."""
    keep_best: int = 0
    diverged: float | None = None
    """See `train/health.py`."""
    held_out_steps: int = 0
    """Steps between measures on held-out text; 0 for none."""

    @property
    def part_tokens(self) -> int:
        """Tokens that go through the model at once, and compete where tokens do."""
        return self.batch_tokens // self.accumulate

    def logs(self, done: int) -> bool:
        """Whether the step that makes it so many is logged."""
        return done % self.log_steps == 0 or done == self.n_steps or self.measures(done)

    def measures(self, done: int) -> bool:
        """Whether held-out text is measured after it."""
        every = self.held_out_steps
        return every > 0 and (done % every == 0 or done == self.n_steps)

    def saves(self, done: int) -> bool:
        """Whether the checkpoint after so many steps is one of the run's own."""
        return done % self.checkpoint_steps == 0 or done == self.n_steps

    def resamples(self, done: int) -> bool:
        """Whether dead features begin again with it."""
        every = self.resample_steps
        return every > 0 and done % every == 0 and done <= self.last_resample
