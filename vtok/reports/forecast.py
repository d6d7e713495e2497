"""What `vtok.plan` foresees of a method's speed on the device at hand, in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Forecast:
    """The speed-up of a pass, predicted from passes that were timed for about a second.

    Attributes:
        batch_size: images of the pass that it is about.
        timed: batch sizes that were timed: `batch_size` itself, or smaller ones from which it was extrapolated.
        speedup: unpatched / patched time, the median over the rounds.
        low, high: the 95 % interval of that median, from the order of the rounds alone.
        step_ms: time of a pass, of the largest batch that was timed, spent deciding and moving tokens.
        patched_ms: time of the whole patched pass of that batch.
        steps: blocks that reduce.
        saved: share of the unpatched model's MACs that leave.
        rounds: of timing.
        device: where.
        threads: of torch's CPU operators.
    """

    batch_size: int
    timed: tuple[int, ...]
    speedup: float
    low: float
    high: float
    step_ms: float
    patched_ms: float
    steps: int
    saved: float
    rounds: int
    device: str
    threads: int

    @property
    def slower(self) -> bool:
        """Whether the whole interval lies below 1."""
        return self.high < 1

    @property
    def faster(self) -> bool:
        """Whether the whole interval lies above 1."""
        return self.low > 1

    @property
    def verdict(self) -> str:
        """What is foreseen."""
        return "faster" if self.faster else "SLOWER than unpatched" if self.slower else "not clearly faster"

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device == "cpu" else ""
        batches = " and ".join(map(str, self.timed))
        timed = "timed" if self.timed == (self.batch_size,) else f"from batch {batches}"
        text = (
            f"foreseen at batch {self.batch_size} ({self.device}{threads}; {timed}, {self.rounds} rounds): {self.verdict}, "
            f"{self.speedup:.2f}x [{self.low:.2f}, {self.high:.2f}]"
        )
        if self.faster:
            return text
        at = "" if self.timed == (self.batch_size,) else f" of {self.timed[-1]}"
        if not self.steps or not self.saved:
            return f"{text}: nothing leaves, so there is nothing to win; let more tokens go"
        blocks = f"{self.steps} block{'s' * (self.steps != 1)}"
        return (
            f"{text}: {100 * self.saved:.0f} % of the MACs leave, and choosing and moving tokens in {blocks} takes "
            f"{_ms(self.step_ms)} of the {_ms(self.patched_ms)} ms of the patched pass{at}. Larger batches, torch.compile, "
            "fewer blocks that reduce or a method that chooses with less work can win; vtok.benchmark measures it"
        )


def _ms(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"
