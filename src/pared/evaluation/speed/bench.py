"""Two models timed in turns, each in a process of its own: A B A B, medians with spread, ratios within a pair."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pared.data.lengths import positions_of
from pared.errors import ParedError
from pared.evaluation.speed.settings import Case, Settings
from pared.models.architecture import is_causal
from pared.models.source import find_model


@dataclass(frozen=True)
class Timed:
    """How fast models were in one case.

    Attributes:
        case: what was timed.
        seconds: by model, of every repeat.
        first_token: seconds to the first token by model, of every repeat; for decoding.
        ideal: how many times as fast the first model would be as the second by what is multiplied for a token; none for
            one model.
    """

    case: Case
    seconds: tuple[tuple[float, ...], ...]
    first_token: tuple[tuple[float, ...], ...]
    ideal: float | None

    def rates(self, model: int) -> tuple[float, ...]:
        """Return the tokens per second of a model, of every repeat."""
        return tuple(self.case.tokens / seconds for seconds in self.seconds[model])

    def tokens_per_second(self, model: int) -> float:
        """Return the median of a model."""
        return statistics.median(self.rates(model))

    @property
    def ratios(self) -> tuple[float, ...]:
        """How many times as fast the first model was as the second, in every pair."""
        if len(self.seconds) < 2:
            return ()
        return tuple(other / own for own, other in zip(*self.seconds, strict=True))


@dataclass(frozen=True)
class Bench:
    """What was measured.

    Attributes:
        models: what each is: parameters, bytes, FLOPs a token, memory.
        timed: by case.
    """

    models: tuple[dict[str, Any], ...]
    timed: tuple[Timed, ...]


def bench(names: list[str], settings: Settings, on_run: Callable[[], None] = lambda: None) -> Bench:
    """Time one model, or one against another.

    Every case is run once unmeasured by each and then in turns, so that what slows the machine down slows both.

    Args:
        names: of one or two models, dense or compressed.
        settings: how.
        on_run: called after every measured run.

    Raises:
        ParedError: a model is none, or not a causal language model; too few positions, or out of memory.
    """
    for name in names:
        require_fits(name, settings.cases)
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(name, settings)) for name in names]
        timed = []
        for number, case in enumerate(settings.cases):
            for worker in workers:
                worker.run(number)
            runs: list[list[dict[str, Any]]] = [[] for _ in workers]
            for _repeat in range(settings.repeats):
                for worker, own in zip(workers, runs, strict=True):
                    own.append(worker.run(number))
                    on_run()
            seconds = tuple(tuple(run["seconds"] for run in own) for own in runs)
            first = tuple(tuple(run["first_token"] for run in own if "first_token" in run) for own in runs)
            timed.append(Timed(case, seconds, first, _ideal([worker.about for worker in workers])))
        return Bench(tuple(worker.about | {"name": worker.name} for worker in workers), tuple(timed))


def _ideal(models: list[dict[str, Any]]) -> float | None:
    return None if len(models) < 2 else models[1]["multiplied"] / models[0]["multiplied"]


def require_fits(name: str, cases: tuple[Case, ...]) -> None:
    """Check, before a weight is read, that a model can run the cases.

    Raises:
        ParedError: it is not a causal language model, or has too few positions.
    """
    config = find_model(name).config()
    if not is_causal(config.architectures or []):
        raise ParedError(f"{name} is not a causal language model; speed is measured of those")
    positions = positions_of(config)
    for case in cases:
        needed = case.length + case.new
        if positions is not None and needed > positions:
            raise ParedError(f"case {case}: {needed} tokens, but {name} has {positions} positions; use a shorter one")


class _Worker:
    """The process of one model."""

    def __init__(self, name: str, settings: Settings) -> None:
        self.name, self._ran = name, False
        command = [sys.executable, "-m", "pared.evaluation.speed.worker", name, json.dumps(settings.to_json())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, text=True)  # fmt: skip
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, number: int) -> dict[str, Any]:
        """Run a case."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        reply = self._answer()
        memory = reply.pop("memory")
        if self._ran:
            memory.pop("resident", None)  # as the first run left it: until then weights may be on the disk only
        self.about["memory"] |= memory
        self._ran = True
        return reply

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise ParedError(f"{self.name}: {reply['error']}")
        return reply

    def _ended(self) -> ParedError:
        status = self._process.wait()
        assert self._process.stderr is not None
        last = self._process.stderr.read().strip().splitlines()[-1:]
        killed = "; killed, perhaps by the system, short of memory" if status == -9 else ""
        return ParedError(f"{self.name}: its process ended with status {status}{killed} ({''.join(last) or 'no word'})")
