"""The evaluation suite: what a classifier does in and out of distribution, and what fixed point changed, over any Runner.

`metrics`, `paired`, `calibration` and `detection` are formulas on arrays; `corruptions` and `shifts` change images; `labelmaps` and `sets`
say what the images of other sets mean; `recording` keeps logits on disk; `suite` puts all of it into the report of `results`.
"""
