"""The stages of an attack on the label, one after another, and which images are within their reach."""
