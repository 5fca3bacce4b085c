"""The mathematics of few bits: weights rounded to whole numbers times a scale, and what that is expected to cost."""
