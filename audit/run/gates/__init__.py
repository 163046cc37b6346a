"""Single sanity checks that are more than a comparison of two numbers."""
