"""Proof in exact arithmetic that an image with the target features exists near a witness."""
