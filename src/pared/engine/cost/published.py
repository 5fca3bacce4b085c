"""Machines that are not at hand, by published figures: a lower bound of arithmetic and memory, times what is reached.

An operation takes what the slower of its arithmetic and its memory traffic takes (the roofline model, Williams et al.,
CACM 2009). Peaks are the vendors'; which share of a peak is reached is an assumption, stated here and in the output.
"""

from dataclasses import dataclass, field

from pared.memory import Available
from pared.operations import ITEMSIZE, Operation

TERA = 1e12


@dataclass(frozen=True)
class Published:
    """A machine by its data sheet. Satisfies :class:`pared.engine.cost.rates.Rates`.

    Attributes:
        machine: what it is, in words.
        peak: floating point operations a second by dtype.
        bandwidth: bytes a second of its memory.
        memory: how much of it there is.
        disk: bytes a second of its disk; an assumption.
        source: of the peaks and the bandwidth.
        reached: share of the peak by kind of operation; an assumption.
        default: share that any other kind reaches.
        streamed: share of the bandwidth that is reached.
        call: seconds that starting any operation takes at least.
    """

    machine: str
    peak: dict[str, float]
    bandwidth: float
    memory: Available
    disk: float
    source: str
    reached: dict[str, float] = field(default_factory=dict)
    default: float = 0.4
    streamed: float = 0.7
    call: float = 5e-6
    computed: bool = True

    @property
    def assumptions(self) -> str:
        """What is assumed besides the data sheet, in words."""
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in self.reached.items())
        return (
            f"{self.default:.0%} of the peak in matrix products ({kinds}), {self.streamed:.0%} of the memory's "
            f"bandwidth, a disk of {self.disk / 1e9:g} GB/s"
        )

    def seconds(self, operation: Operation) -> float:
        """Return the seconds that an operation takes, as often as it happens."""
        if operation.kind in ("read", "write"):
            return operation.bytes / self.disk * operation.times
        peak = self.peak.get(operation.dtype, self.peak["float32"]) * self.reached.get(operation.kind, self.default)
        once = max(operation.flops / peak, operation.bytes / (self.bandwidth * self.streamed), self.call)
        return once * operation.times

    def slowdown(self) -> None:
        """Return None: a GPU runs one thing at a time."""

    def compute_dtype(self, asked: str, model_dtype: str) -> str:
        """Return what blocks compute in: bfloat16, where it is free to choose."""
        return asked if asked in ITEMSIZE else ("bfloat16" if model_dtype == "float32" else model_dtype)


H100 = Published(
    machine="one NVIDIA H100 SXM",
    peak={
        "bfloat16": 989 * TERA,
        "float16": 989 * TERA,
        "float32": 67 * TERA,
        "float64": 67 * TERA,
    },
    bandwidth=3.35 * TERA,
    memory=Available(80 * 10**9, "the 80 GB of an H100"),
    disk=2e9,
    source="NVIDIA H100 Tensor Core GPU data sheet (SXM: 989 TFLOP/s bfloat16 dense, 67 TFLOP/s float64 tensor core, "
    "67 TFLOP/s float32, 3.35 TB/s)",
    # A symmetric eigenproblem is half matrix-vector products and a divide and conquer on the host; of channels one goes
    # after the other.
    reached={
        "eigh": 0.015,
        "plain eigh": 0.015,
        "eigenvalues": 0.006,
        "cholesky": 0.2,
        "qr": 0.05,
        "pivot": 0.05,
        "channels": 0.02,
    },
)
MACHINES = {"h100": H100}
