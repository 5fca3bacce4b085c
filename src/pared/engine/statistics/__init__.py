"""The statistics of a compression: collected or read again, kept until their turn, and as methods read them."""
