"""The families of compressions at work, as passes over the blocks: ranks, widths, zeros and experts."""
