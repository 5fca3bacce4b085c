"""Untrusted programs, run within limits, and the tests that judge them from outside."""

from pared.evaluation.sandbox.reference import definitions, used_names
from pared.evaluation.sandbox.run import ExecutionResult, Limits, Program, run_program

__all__ = ["ExecutionResult", "Limits", "Program", "definitions", "run_program", "used_names"]
