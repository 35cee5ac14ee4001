"""Reproducible comparisons; they import edgeft and nothing imports them."""
