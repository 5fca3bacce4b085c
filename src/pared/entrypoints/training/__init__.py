"""What a training starts from, and the perplexity before and after it."""
