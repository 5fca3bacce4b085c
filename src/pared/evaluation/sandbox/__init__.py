"""Untrusted programs, run within limits."""

from pared.evaluation.sandbox.run import ExecutionResult, Limits, run_program

__all__ = ["ExecutionResult", "Limits", "run_program"]
