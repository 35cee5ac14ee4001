"""Peak resident memory of a fresh process that opens a model and runs it, libraries included. Run as a program it is that process."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors

from edgeft.bench.opening import Spec, open_model
from edgeft.runner import Images

N_CALLS = 3


def peak_bytes(spec: Spec, samples: Path, batch: int) -> int | None:
    """Peak of a child process that runs `batch` images of a safetensors file; None where it fails or the system does not say."""
    order = json.dumps({"spec": asdict(spec), "samples": str(samples), "batch": batch})
    done = subprocess.run([sys.executable, "-m", "edgeft.bench.memory", order], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    return int(lines[-1]) if done.returncode == 0 and lines and lines[-1].isdigit() else None


def repeated(images: Images, batch: int) -> Images:
    """A batch of so many images, the given ones over and over."""
    return np.resize(images, (batch, *images.shape[1:]))


def _here() -> int | None:
    """Peak of this process in bytes. Not getrusage: a child starts with the peak of the process that made it."""
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8"), re.MULTILINE) if status.is_file() else None
    return int(found[1]) * 1024 if found else None


def main(order: str) -> None:
    """Open and run the model that a JSON text describes, and print the peak in bytes as the last line."""
    tree = json.loads(order)
    images = safetensors.load_file(tree["samples"])["images"]
    call = open_model(Spec(**tree["spec"])).prepare(repeated(images, tree["batch"]))
    for _ in range(N_CALLS):
        call()
    print(_here())


if __name__ == "__main__":
    main(sys.argv[1])
