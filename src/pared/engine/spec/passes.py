"""The steps of a compression as data: what runs, what later blocks read, what is put in place."""

from dataclasses import dataclass
from typing import Literal

Action = Literal["evidence", "solve", "allocate", "install", "refit", "refine", "quantize"]
Runs = Literal["nothing", "forward", "backward", "backward, then forward"]
HandOn = Literal["dense", "compressed"]


@dataclass(frozen=True)
class PassSpec:
    """One step of a compression; all but ``allocate`` go over the blocks.

    Attributes:
        action: what is done: collect evidence for the allocation, decompose or prune, decide every site, put in place
            what was decomposed, refit, refine, store in few bits.
        runs: what runs on the calibration tokens.
        hand_on: what later blocks read: what the dense blocks output, or what was made of them.
        reference: whether the dense model runs alongside, for targets.
        installs: whether a solve puts its result in place at once, as the decisions are known.
    """

    action: Action
    runs: Runs = "nothing"
    hand_on: HandOn = "dense"
    reference: bool = False
    installs: bool = False

    @property
    def changes(self) -> bool:
        """Whether blocks are changed, so that each is committed when its group is complete."""
        return self.installs or self.action in ("install", "refit", "refine", "quantize")

    @property
    def beside(self) -> bool:
        """Whether a block may be visited beside the run of another: on the way back, if that changes nothing."""
        if self.runs == "backward":
            return not self.changes
        return self.runs.endswith("forward") and self.hand_on == "dense"

    @property
    def replaces(self) -> bool:
        """Whether every block is fitted behind the fitted ones, by itself, in place of what the pass before made."""
        return self.action in ("refit", "refine", "quantize") and self.hand_on == "compressed"

    def describe(self) -> dict[str, object]:
        """Return it as JSON has it."""
        told: dict[str, object] = {"action": self.action}
        if self.action != "allocate":
            told |= {"runs": self.runs}
        if self.runs.endswith("forward"):
            told |= {"hand_on": self.hand_on, "reference": self.reference}
        return told | ({"installs": self.installs} if self.action == "solve" else {})

    def __str__(self) -> str:
        if self.action == "allocate":
            return "allocate"
        how = "no data" if self.runs == "nothing" else self.runs
        behind = ", behind the compressed blocks" if self.hand_on == "compressed" else ""
        beside = ", with the dense model as reference" if self.reference else ""
        verb = "solve and install" if self.action == "solve" and self.installs else self.action
        return f"{verb} ({how}{behind}{beside})"


# Trains every block that the passes before have compressed, whatever they were.
REFINE = PassSpec("refine", "forward", "compressed", reference=True)
