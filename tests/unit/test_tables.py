"""Generated tables: content, order, refusals, and that the committed ones are not stale."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plot import digest
from benchmarks.tables import PAGE, README, RESULTS, Result, fill, page, read_all, read_plots, table
from edgeft.errors import ConfigError

TREE: dict[str, Any] = {
    "suite": "shapes", "title": "Methods on shapes", "hardware": "2 cores", "date": "2025-01-02", "versions": {"torch": "2.0"},
    "columns": ["method", "ID"], "rows": [["LP", 92.7], ["a|b", 94.8]], "notes": ["Five seeds."],
}  # fmt: skip
TABLE = "| method | ID |\n| --- | ---: |\n| LP | 92.7 |\n| a\\|b | 94.8 |\n\n2 cores; 2025-01-02; torch 2.0. Five seeds."


def save(folder: Path, name: str, **changes: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps(TREE | changes))
    return file


def test_committed_tables_are_what_the_results_give() -> None:
    results, plots = read_all(), read_plots()
    assert PAGE.read_text(encoding="utf-8") == page(results, plots), "run: make tables"
    text = README.read_text(encoding="utf-8")
    assert text == fill(text, results, plots), "run: make tables"
    assert {plot.file for plot in plots} == set(RESULTS.glob("*.svg")), "run: make tables"
    assert all(digest(plot.data) in plot.file.read_text(encoding="utf-8") for plot in plots), "run: make tables"


def test_table(tmp_path: Path) -> None:
    assert table(Result.read(save(tmp_path, "a.json"))) == TABLE


def test_the_readme_gets_the_newest_result_of_a_suite(tmp_path: Path) -> None:
    save(tmp_path, "a.json", date="2024-01-01", rows=[["old", 1]])
    save(tmp_path, "b.json")
    save(tmp_path, "c.json", suite="other", rows=[["other", 2]])
    text = "before\n<!-- table:shapes -->\nstale\n<!-- /table:shapes -->\nafter"
    assert fill(text, read_all(tmp_path), []) == f"before\n<!-- table:shapes -->\n{TABLE}\n<!-- /table:shapes -->\nafter"


def test_the_page_has_every_result_newest_first(tmp_path: Path) -> None:
    save(tmp_path, "a.json", date="2024-01-01", title="Old")
    save(tmp_path, "b.json", title="New")
    text = page(read_all(tmp_path), [])
    assert text.index("## New") < text.index("## Old")


def test_a_result_with_several_tables_and_a_plot(tmp_path: Path) -> None:
    one = {key: TREE[key] for key in ("title", "columns", "rows", "notes")} | {"n_lead_rows": 1}
    tree = {key: TREE[key] for key in ("suite", "hardware", "date", "versions")}
    plot = {"title": "Speed", "methods": [], "rows": []}
    tree |= {"tables": [one | {"name": "a"}, one | {"name": "b", "title": "Other"}], "plot": plot}
    (tmp_path / "r.json").write_text(json.dumps(tree))
    results, plots = read_all(tmp_path), read_plots(tmp_path)
    assert [(result.suite, result.title) for result in results] == [("shapes-a", "Methods on shapes"), ("shapes-b", "Other")]
    text = fill("<!-- table:shapes-b -->\n<!-- /table:shapes-b -->\n<!-- plot:shapes -->\n<!-- /plot:shapes -->", results, plots)
    assert "| LP | 92.7 |" in text
    assert "94.8" not in text
    assert text.endswith("<!-- plot:shapes -->\n![Speed](benchmarks/results/r.svg)\n<!-- /plot:shapes -->")
    assert page(results, plots).endswith("## Speed\n\n![Speed](results/r.svg)\n")
    with pytest.raises(ConfigError, match=r"README\.md asks for plot 'absent', and no result has that suite"):
        fill("<!-- plot:absent -->\n<!-- /plot:absent -->", results, plots)
    tree["tables"][1]["rows"] = [["LP"]]
    (tmp_path / "r.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"'r\.json': row 1 has 1 cells, there are 2 columns"):
        read_all(tmp_path)


def test_a_marked_table_without_result_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "a.json")
    with pytest.raises(ConfigError, match=r"README\.md asks for table 'absent', and no result has that suite"):
        fill("<!-- table:absent -->\n<!-- /table:absent -->", read_all(tmp_path), [])


def test_bad_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'a\.json': row 1 has 1 cells, there are 2 columns"):
        Result.read(save(tmp_path, "a.json", rows=[["LP"]]))
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"'b\.json' is not a benchmark result: KeyError\('suite'\)"):
        Result.read(tmp_path / "b.json")
