"""Untrusted programs, run within limits."""

from pared.evaluation.sandbox.run import Limits, Ran, run_program

__all__ = ["Limits", "Ran", "run_program"]
