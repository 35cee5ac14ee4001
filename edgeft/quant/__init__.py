"""The fixed-point stage: formats, training graph, calibration and lowering. Registries only; importing it needs no torch."""

import logging

from edgeft.registry import Entry, Registry

# Brevitas pulls this module in, and on a machine without a GPU it warns of a compiler that nothing here uses.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

QUANTIZERS = Registry(
    "quantizer",
    Entry("std", "fraction from the deviation: floor(log2(c / sigma)), c = 40 signed, 70 unsigned (F8Net)", "edgeft.quant.f8net:std_frac"),
    Entry("grid", "fraction of least squared rounding and saturation error", "edgeft.quant.f8net:grid_frac"),
    Entry("minmax", "largest fraction that saturates nothing", "edgeft.quant.f8net:minmax_frac"),
)

BACKBONES = Registry(
    "backbone",
    Entry("edgeft_micro", "embedded: MobileNetV2-like, 0.1 M parameters, 48 px, weights bundled", "edgeft.micro:edgeft_micro"),
    *(
        Entry(name, summary, "timm:create_model")
        for name, summary in {
            "mobilenetv1_100": "MobileNetV1 1.0", "mobilenetv2_100": "MobileNetV2 1.0",
            "resnet18": "ResNet-18", "resnet50": "ResNet-50",
        }.items()
    ),
)  # fmt: skip
