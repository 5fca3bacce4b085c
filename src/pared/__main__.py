"""``python -m pared``: the command line, as launchers of several processes start it."""

from pared.cli.main import main

if __name__ == "__main__":
    main()
