"""What of a model is decided: sites that share a basis, the layers of experts one by one, and experts as a whole."""
