"""edgeft: fine-tune a timm backbone, make it 8-bit fixed point, export exact integers, measure in and out of distribution.

The public names below are imported when first used, so that `import edgeft` needs no torch:

    config = edgeft.build_config(flags={"train.method": "lpft", "out": "runs/demo"})
    run = edgeft.train_quantize(config)
    edgeft.export(run.path, ["onnx"])
    edgeft.load(run.path).predict("cat.jpg").top(3)
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgeft.artifact import Artifact
    from edgeft.config import Config, build_config
    from edgeft.errors import EdgeftError
    from edgeft.exporting import export
    from edgeft.pipeline import train_quantize
    from edgeft.predicting import load
    from edgeft.progress import Progress

__version__ = "0.1.0"
__all__ = ["Artifact", "Config", "EdgeftError", "Progress", "__version__", "build_config", "export", "load", "train_quantize"]

_HOMES = {
    "Artifact": "edgeft.artifact",
    "Config": "edgeft.config",
    "EdgeftError": "edgeft.errors",
    "Progress": "edgeft.progress",
    "build_config": "edgeft.config",
    "load": "edgeft.predicting",
    "train_quantize": "edgeft.pipeline",
}


def __getattr__(name: str) -> Any:
    if name == "export":
        # The package itself, which can be called (VerbModule): importing exporting.export here would be undone by any later
        # `import edgeft.export`, because Python then binds the package to this name.
        return importlib.import_module("edgeft.export")
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeft' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class VerbModule(ModuleType):
    """The class of the package edgeft.export: a module that can be called, so that one name is both the verb and the package."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward to edgeft.exporting.export, whose signature and documentation hold."""
        return importlib.import_module("edgeft.exporting").export(*args, **kwargs)
