"""Formats and rounded weights of a plan from a few images, without labels."""
