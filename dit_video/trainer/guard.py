"""Steps that would spoil the weights are left out, by all ranks alike."""

import math
from dataclasses import dataclass

MEMORY, FIRST = 0.99, 100
"""Of the running mean of the gradient norm's logarithm: what it keeps at a step, and the steps before it is asked."""


class NonFiniteError(ValueError):
    """Steps of which the loss or gradient is no number, or much too large, have followed one another; the weights are as before them."""


@dataclass
class Guard:
    """Judges steps by their loss and gradient norm, which all ranks know alike; its state goes into checkpoints."""

    spike: float | None = None  # a gradient norm so many times the running one is a spike; none: only what is no number
    in_a_row: int = 10  # so many steps left out one after another stop the run
    mean: float = 0.0
    seen: int = 0
    row: int = 0

    def problem(self, loss: float, norm: float) -> str | None:
        """Why the weights should not follow this step; none: they should."""
        problem = None
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(norm):
            problem = f"the gradient norm is {norm}"
        elif self.spike and self.seen >= FIRST and norm > self.spike * math.exp(self.mean):
            problem = f"the gradient norm is {norm:.3g}, {norm / math.exp(self.mean):.3g} times its running mean"
        self.row = 0 if problem is None else self.row + 1
        if problem is None and norm > 0:  # it is 0 where a step had no clip
            memory = min(MEMORY, self.seen / (self.seen + 1))
            self.mean, self.seen = memory * self.mean + (1 - memory) * math.log(norm), self.seen + 1
        return problem

    def state(self) -> dict[str, float]:
        return {"mean": self.mean, "seen": self.seen, "row": self.row}

    def restore(self, state: dict[str, float]) -> None:
        """Undoes state; a checkpoint without one begins anew."""
        self.mean, self.seen, self.row = float(state.get("mean", 0)), int(state.get("seen", 0)), int(state.get("row", 0))
