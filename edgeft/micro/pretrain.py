"""Reproduces the bundled weights: `python -m edgeft.micro.pretrain --out FILE` trains on an endless stream of `shapes`.

Accuracy stays at chance for the first few hundred steps; that is no reason to stop. One machine and one number of
threads give the same bytes each time; another processor sums in another order and gives other weights of equal worth.
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edgeft.data.shapes import GENERATOR_VERSION, PRETRAINING_CLASSES, pretraining_stream
from edgeft.micro import EdgeftMicro

BATCH = 128
PEAK_LR = 4e-3
WARM_UP = 0.15
WEIGHT_DECAY = 0.02
LABEL_SMOOTHING = 0.05
LOG_STEPS = 200


def pretrain(steps: int, seed: int) -> tuple[EdgeftMicro, float]:
    """A trained backbone in evaluation mode, and its accuracy on the fresh images of the last `LOG_STEPS` steps."""
    torch.manual_seed(seed)
    model = EdgeftMicro(PRETRAINING_CLASSES).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=WARM_UP)
    start = time.perf_counter()
    correct: list[float] = []
    for step, (images, labels) in enumerate(pretraining_stream(seed, BATCH, steps), 1):
        targets = torch.from_numpy(labels)
        logits = model(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        loss = cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        correct.append((logits.argmax(1) == targets).float().mean().item())
        if step % LOG_STEPS == 0 or step == steps:
            recent = correct[-LOG_STEPS:]
            elapsed_s = time.perf_counter() - start
            print(
                f"step {step:5d}  loss {loss.item():.3f}  accuracy {100 * sum(recent) / len(recent):5.1f} %  {elapsed_s:6.1f} s",
                flush=True,
            )
    recent = correct[-LOG_STEPS:]
    return model.eval(), sum(recent) / len(recent)


def bundled_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What the file holds: no head; convolutions in half precision, batch normalisation as it is (its variances can be tiny)."""
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}
    return {name: (value.half() if value.dim() == 4 else value).contiguous() for name, value in kept.items()}


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes of all tensors in the order of their names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(tensors[name].numpy().tobytes())
    return state.hexdigest()


def main() -> None:
    """Train, then write the weights with the facts needed to make them again."""
    parser = argparse.ArgumentParser(description="Pretrain edgeft_micro on generated shapes.")
    parser.add_argument("--steps", type=int, default=7000, help="optimiser steps of 128 images (default 7000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the images (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch; part of what makes the bytes (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, accuracy = pretrain(args.steps, args.seed)
    tensors = bundled_tensors(model)
    metadata = {
        "generator_version": str(GENERATOR_VERSION),
        "seed": str(args.seed),
        "steps": str(args.steps),
        "threads": str(args.threads),
        "torch": torch.__version__,
        "streaming_accuracy": f"{accuracy:.4f}",
        "sha256": digest(tensors),
    }
    save_file(tensors, args.out, metadata)
    print(f"wrote {args.out} ({args.out.stat().st_size} bytes, accuracy {100 * accuracy:.1f} %, sha256 {metadata['sha256']})")


if __name__ == "__main__":
    main()
