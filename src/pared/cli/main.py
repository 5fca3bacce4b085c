"""The entry point: signals are handled before anything that takes long is imported."""

import gc
import signal
import sys

from pared.importing import when_imported


def main() -> None:
    """Run the command line; a termination is handled like Ctrl-C, so that nothing half-made stays.

    A command that a signal ended has the exit code that shells give it: 130 for Ctrl-C, 143 for a termination.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell that starts it with & ignores Ctrl-C
        signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    import_without_collecting()
    try:
        from pared.cli.commands import app
        from pared.memory import keep_freed

        keep_freed()
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code: object = 1
    except SystemExit as end:
        code = end.code
    if received and code:
        code = 128 + received[0]
    sys.exit(code)  # type: ignore[arg-type]


def import_without_collecting() -> None:
    """Collect no garbage until torch and transformers are imported, and never look at what they made then.

    Thousands of modules make none, and looking for it took a third of the time of a dry run.
    """

    def collect(_: object) -> None:
        gc.freeze()
        gc.enable()

    gc.disable()
    when_imported("transformers.modeling_utils", collect)


if __name__ == "__main__":
    main()
