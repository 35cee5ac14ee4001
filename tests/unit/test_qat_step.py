"""The suite qat-step at tiny settings."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import qat_peers, qat_step
from benchmarks.nets import Case, fixed_point, random_classifier, random_images
from benchmarks.tables import Result
from edgeft.progress import Progress
from edgeft.quant.plan import run_float

MICRO = Case("edgeft_micro", 48, 4)


def test_qat_step(tmp_path: Path) -> None:
    file = qat_step.run([MICRO], tmp_path, n_rounds=1, progress=Progress(False))
    result, tree = Result.read(file), json.loads(file.read_text(encoding="utf-8"))
    assert [row[2] for row in result.rows] == list(qat_step.SHOWN)
    assert result.rows[0][4] == 1.0
    (record,) = tree["measurements"]
    ms = {name: found[0] for name, found in record["ms"].items()}
    moving = next(row for row in result.rows if row[2] == qat_step.MOVING)
    assert moving[3] == pytest.approx(0.2 * ms[qat_step.FORMATS] + 0.8 * ms[qat_step.FROZEN], abs=0.06)
    kept = record["kept_bytes"]
    assert 0 < kept[qat_step.FOLDED] < kept[qat_step.FROZEN] < kept[qat_step.STOCK]


def test_peers_of_a_qat_step_are_the_same_net() -> None:
    net, _ = fixed_point(random_classifier(MICRO))
    images = torch.from_numpy(random_images(4, MICRO.size, seed=7).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        wanted = run_float(net.plan, images)
        torch.testing.assert_close(qat_peers.FoldedNet(net.plan)(images), wanted)
        stock = qat_peers.StockNet(net, collect_steps=1).train()
        for _ in range(3):
            close = stock(images)
    assert float((close - wanted).norm() / wanted.norm()) < 0.5
    assert [name.replace("/", ".") for name in stock.quantizers] == [point.name for point in net.points]
