"""Recipes: how a fine-tuned float net becomes a fixed-point one. A registry only; importing it needs no torch."""

from edgeft.registry import Entry, Registry

RECIPES = Registry(
    "recipe",
    Entry("f8net-tiny", "calibration only: formats, equalisation, compensated rounding; no labels, no training", "edgeft.quant.stage:tiny"),
    Entry("f8net-finetune", "calibration, then a short QAT on folded batch norm (default)", "edgeft.quant.stage:finetune"),
    Entry(
        "f8net-conventional", "long QAT with learned clips (PACT) and batch norm in training, as F8Net trains its nets",
        "edgeft.quant.conventional:conventional",
    ),
)  # fmt: skip
"""Each entry is a function of a `stage.Job` that returns a `stage.Trained`."""
