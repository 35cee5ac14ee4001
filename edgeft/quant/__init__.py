"""The fixed-point stage: formats, training graph, calibration and lowering. Registries only; importing it needs no torch."""

import logging

from edgeft.quant.backbones import proven_backbones
from edgeft.registry import Entry, Registry

# Brevitas pulls this module in, and on a machine without a GPU it warns of a compiler that nothing here uses.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

QUANTIZERS = Registry(
    "quantizer",
    Entry("std", "fraction from the deviation: floor(log2(c / sigma)), c = 40 signed, 70 unsigned (F8Net)", "edgeft.quant.f8net:std_frac"),
    Entry("grid", "fraction of least squared rounding and saturation error", "edgeft.quant.f8net:grid_frac"),
    Entry("l4", "fraction of least error to the fourth power, which saturates less than 'grid'", "edgeft.quant.f8net:grid_frac"),
    Entry("minmax", "largest fraction that saturates nothing", "edgeft.quant.f8net:minmax_frac"),
    Entry(
        "search",
        "layer by layer from 'l4': fraction +- 1 where that brings the scores nearer to the float net's",
        "edgeft.quant.calibration.search:search",
    ),
    Entry(
        "pact", "learned clips coupled to the format, as published (recipe f8net-conventional only)", "edgeft.quant.pact:PublishedFormats"
    ),
)

BACKBONES = Registry(
    "backbone",
    Entry("edgeft_micro", "embedded: MobileNetV2-like, 0.1 M parameters, 48 px, weights bundled", "edgeft.micro:edgeft_micro"),
    *(Entry(row.name, row.summary, "timm:create_model") for row in proven_backbones()),
)
"""The embedded backbone, and timm's that were proven to lower; others made of the same operators lower too."""
