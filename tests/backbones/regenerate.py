"""Prove timm's convolutional backbones one by one and write the table of those that lower; `python -m tests.backbones.regenerate --help`.

The table is edgeft/quant/backbones.csv; names that are refused, with the reason, go to refused.csv beside this file. Both are written
after every network, so that the run can be stopped and resumed.
"""

import argparse
import csv
import fnmatch
import gc
import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch

from edgeft.errors import EdgeftError
from edgeft.quant.backbones import ProvenBackbone, proven_backbones
from tests.backbones.prove import family_of, prove_at_smallest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "edgeft" / "quant" / "backbones.csv"
REFUSED = Path(__file__).parent / "refused.csv"
MAX_PARAMETERS = 70e6
ATTENTION = {
    "beit", "cait", "coat", "convit", "crossvit", "davit", "deepseek_vit", "deit", "efficientvim", "efficientvit_mit", "efficientvit_msra",
    "eva", "focalnet", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "levit", "maxxvit", "mlp_mixer", "mvitv2", "naflexvit", "nest",
    "nextvit", "pit", "pvt_v2", "qwen3_vit", "sequencer", "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit",
    "tnt", "twins", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "visformer",
    "vitamin", "volo", "xcit",
}  # fmt: skip
"""Families that cannot do without softmax attention or layer norm; they are not tried."""


def candidates(patterns: list[str]) -> Iterator[str]:
    """Names to try: of every family the first, then of every family the second, and so on."""
    families: dict[str, list[str]] = {}
    for name in timm.list_models(exclude_filters=["*_gn", "*_gn_*", "*evos*", "*_bit", "*_frn", "edgeft_*"]):
        family = family_of(name)
        if family not in ATTENTION and (not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)):
            families.setdefault(family, []).append(name)
    rounds = itertools.zip_longest(*(names for _, names in sorted(families.items())))
    return (name for together in rounds for name in together if name is not None)


def parameters_of(name: str) -> int:
    """Number of parameters, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())


def write(file: Path, fields: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    """Write a CSV file anew."""
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerows([fields, *rows])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", nargs="*", default=[], help="patterns of names to try; default: every convolutional backbone")
    parser.add_argument("--resume", action="store_true", help="leave out what either file already has")
    args = parser.parse_args()
    torch.set_num_threads(1)
    proven = {row.name: row for row in proven_backbones()} if TABLE.exists() else {}
    refused = {row["name"]: row["reason"] for row in csv.DictReader(REFUSED.open(encoding="utf-8"))} if REFUSED.exists() else {}
    for name in candidates(args.names):
        if (args.resume and (name in proven or name in refused)) or parameters_of(name) > MAX_PARAMETERS:
            continue
        started = time.monotonic()
        proven.pop(name, None)
        refused.pop(name, None)
        try:
            proven[name] = prove_at_smallest(name)
        except EdgeftError as error:
            refused[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(name, refused.get(name, "proven"), f"{time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        write(TABLE, ProvenBackbone._fields, (proven[key] for key in sorted(proven, key=lambda key: (proven[key].family, key))))
        write(REFUSED, ("name", "reason"), sorted(refused.items()))
        gc.collect()


if __name__ == "__main__":
    main()
