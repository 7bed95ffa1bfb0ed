"""Where the time between two lines of timings.jsonl went."""

import time


class Clock:
    """Counts the time of a run's own steps and of the waits for their batches: where several runs take turns, the steps
    of the others are not in it."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.seconds = self.waited = 0.0
        self.steps = 0

    def step_begins(self, waited: float) -> None:
        """waited: seconds until its batch was there."""
        self.began = time.perf_counter()
        self.waited += waited
        self.seconds += waited
        self.steps += 1

    def step_ends(self) -> None:
        self.seconds += time.perf_counter() - self.began

    def record(self, step: int, batch_tokens: int) -> dict[str, object]:
        """The line of a step that is not yet at its end, and begin anew."""
        now = time.perf_counter()
        elapsed = self.seconds + now - self.began
        line: dict[str, object] = {
            "step": step,
            "tokens_per_s": self.steps * batch_tokens / elapsed,
            "step_ms": 1e3 * elapsed / self.steps,
            "data_ms": 1e3 * self.waited / self.steps,
        }
        self.began, self.seconds, self.waited, self.steps = now, 0.0, 0.0, 0
        return line
