"""Suite cpu-latency: verified first, timed then, one row per compiler and runtime."""

import json
from pathlib import Path

import pytest

from benchmarks.cpu_latency import COLUMNS, OPENVINO, ORT, run
from edgeft.progress import Progress

pytestmark = pytest.mark.cc


def test_every_model_is_timed_on_the_same_net(compiler: str, tmp_path: Path) -> None:
    file = run(("edgeft_micro",), 32, tmp_path, n_rounds=3, n_calls=2, progress=Progress())
    result = json.loads(file.read_text())
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in result["rows"]]
    assert [row["model"] for row in rows][-2:] == [OPENVINO, ORT]
    assert all(row["model"].startswith("C, ") for row in rows[:-2])
    assert {row["net"] for row in rows} == {"edgeft_micro 32 px"}
    assert [row["time against OpenVINO"] for row in rows if row["model"] == OPENVINO] == [1.0]
    for row in rows:
        times = [time for calls in result["measurements"][0]["rounds_ms"][row["model"]] for time in calls]
        assert len(times) == 6
        assert min(times) <= row["median ms"] + 0.001
    assert result["measurements"][0]["arena_bytes"] >= result["measurements"][0]["arena_lower_bound"] > 0
