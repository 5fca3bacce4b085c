"""What is measured of a model, kept beside it as it comes, and compared with that of another."""
