"""Other runtimes that can run an exported file here, beyond the one that its target is made for."""

import importlib.util
from pathlib import Path

from edgeft.runner import LayerRunner


def in_openvino(path: Path, target: str) -> list[LayerRunner]:
    """OpenVINO with the file, where it is installed (extra `openvino`)."""
    if importlib.util.find_spec("openvino") is None:
        return []
    from edgeft.export.openvino_runner import OpenVinoRunner

    return [OpenVinoRunner(path, name=f"{target} (in OpenVINO)")]
