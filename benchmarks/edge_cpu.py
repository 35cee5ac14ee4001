"""Suite edge-cpu: all fine-tuning methods in float and in every 8-bit form, over seeds, in and out of distribution, and their latency.

The grid is measured cell by cell; finished cells stay in a folder of records, so that it can be stopped and continued. They come in an
order that leaves something useful at any time: all float nets first, seed by seed, then the 8-bit forms of LP-FT, then those of the
others, latency last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import edge_cpu_latency
from benchmarks.edge_cpu_cells import FIRST, FLOAT, FORMS, LEAD, Bench, Cell, Records
from benchmarks.edge_cpu_results import SUITE, write_result
from benchmarks.record import Machine
from edgeft.bench.measuring import Plan
from edgeft.config import Config, build_config
from edgeft.errors import ConfigError
from edgeft.methods import METHODS
from edgeft.progress import Progress

DEFAULTS: dict[str, Any] = {"model.backbone": "mobilenetv2_100", "data.size": 64, "train.epochs": 4, "device": "cpu"}
SURGICAL_LAYERS = ("blocks.0", "blocks.1", "blocks.2")
"""What method surgical trains here: the first of MobileNetV2's seven groups of blocks, which its paper advises for shifts of the input."""


@dataclass(frozen=True)
class DataSet:
    """Image folders with one sub-folder per class: `source` is split into train, val and ID test, `shifted` are only tested on."""

    name: str
    source: Path
    shifted: tuple[Path, ...]

    @classmethod
    def parse(cls, text: str) -> "DataSet":
        """'NAME=DIR,SHIFTED,...'. Raises ConfigError when a part is missing."""
        name, equals, rest = text.partition("=")
        source, *shifted = rest.split(",")
        if not (name and equals and source and shifted and all(shifted)) or " " in name or "/" in name:
            raise ConfigError(
                f"'{text}' is not of the form NAME=DIR,SHIFTED[,SHIFTED...]", "example: PACS=pacs/photo,pacs/cartoon,pacs/sketch"
            )
        return cls(name, Path(source), tuple(map(Path, shifted)))


@dataclass(frozen=True)
class Grid:
    """Everything that the suite compares. `sets` are KEY=VALUE for all data sets, or NAME:KEY=VALUE for one."""

    data: tuple[DataSet, ...]
    seeds: tuple[int, ...]
    weights: Path | None
    sets: tuple[str, ...] = ()

    def cells(self) -> list[Cell]:
        """In the order in which they are measured."""
        methods = methods_of()
        floats = [Cell(data.name, method, seed) for data in self.data for seed in self.seeds for method in methods]
        ranked = sorted(methods, key=lambda method: method != LEAD)
        eight_bit = [
            Cell(data.name, method, seed, form) for method in ranked for data in self.data for seed in self.seeds for form in FORMS
        ]  # fmt: skip
        return floats + eight_bit

    def config(self, cell: Cell) -> Config:
        """The configuration of a cell's float net. Raises ConfigError for keys and values that there are not."""
        data = next(data for data in self.data if data.name == cell.data)
        given = {"model.pretrained": True} if self.weights is None else {"model.weights": str(self.weights)}
        layers = {"train.layers": SURGICAL_LAYERS} if cell.method == "surgical" else {}
        flags = {
            "data.source": str(data.source), "data.ood": [f"{path.name}={path}" for path in data.shifted],
            "train.method": cell.method, "seed": cell.seed,
        }  # fmt: skip
        return build_config(flags={**DEFAULTS, **given, **flags, **layers}, sets=self._sets_of(data.name))

    def _sets_of(self, name: str) -> list[str]:
        names = {data.name for data in self.data}
        split = [(text.partition(":"), text) for text in self.sets]
        return [own[2] if own[0] == name else text for own, text in split if own[0] == name or own[0] not in names]


def methods_of() -> list[str]:
    """All methods that need no more than images, those that the others are compared with first."""
    names = [entry.name for entry in METHODS if entry.extra is None]  # flyp starts from a net that reads texts
    return sorted(names, key=lambda method: FIRST.index(method) if method in FIRST else len(FIRST))


def wanted(name: str, only: Sequence[str]) -> bool:
    """Whether a cell is among those asked for: one of the texts has no word that is not in its name. Nothing asks for all."""
    return not only or any(set(text.split()) <= set(name.split()) for text in only)


def run(grid: Grid, records: Path, out: Path, *, only: Sequence[str] = (), again: bool = False, plan: Plan, progress: Progress) -> Path:
    """Measure the cells that are asked for and not recorded yet (all that are asked for: `again`), and write the result of all recorded.

    Raises ConfigError for wrong settings before anything is measured, and what measuring a cell raises.
    """
    if len({data.name for data in grid.data}) != len(grid.data) or not grid.data or not grid.seeds:
        raise ConfigError("data sets with names of their own and at least one seed are needed", "example: PACS=photo,cartoon --seeds 0,1")
    machine, store = Machine.look(torch.get_num_threads()), Records(records)
    configs = {cell: grid.config(cell) for cell in grid.cells()}
    bench = Bench(store, progress)
    chosen = [cell for cell in configs if wanted(cell.name, only)]
    for number, cell in enumerate(chosen, 1):
        progress.line(f"{SUITE}: {cell.name} ({number} of {len(chosen)})")
        _measure(cell, configs, store, bench, again=again)
    for data in grid.data:
        cell = Cell(data.name, LEAD, grid.seeds[0])
        if wanted(f"{data.name} {edge_cpu_latency.LATENCY}", only):
            progress.line(f"{SUITE}: {data.name} {edge_cpu_latency.LATENCY}")
            edge_cpu_latency.keep(store, cell, configs[cell], bench, plan, again=again, progress=progress)
    return write_result(out, machine, [data.name for data in grid.data], methods_of(), grid.seeds, configs, store)


def _measure(cell: Cell, configs: dict[Cell, Config], store: Records, bench: Bench, *, again: bool) -> None:
    base = Cell(cell.data, cell.method, cell.seed)
    config = configs[cell]
    tuned = store.find(base, config)
    if tuned is None or (again and cell == base):
        tuned = bench.float_net(base, config)
        _clear(base, configs, store, bench)
    if cell != base and (again or store.find(cell, FORMS[cell.form].config(config), tuned) is None):
        bench.eight_bit(cell, config, tuned)


def _clear(base: Cell, configs: dict[Cell, Config], store: Records, bench: Bench) -> None:
    """Delete the checkpoints of a data set and seed when its last float net is done."""
    beside = [cell for cell in configs if (cell.data, cell.seed, cell.form) == (base.data, base.seed, FLOAT)]
    if all(store.find(cell, configs[cell]) is not None for cell in beside):
        bench.clear(base)
