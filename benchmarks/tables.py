"""Generate benchmarks/RESULTS.md, the plots and what is marked in README.md from benchmarks/results/*.json: python -m benchmarks.tables.

A table in README.md stands between <!-- table:SUITE --> and <!-- /table:SUITE --> and shows the suite's newest result, a plot between
<!-- plot:SUITE --> and <!-- /plot:SUITE -->. The tables of a suite that has several are called SUITE-NAME.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeft.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent / "RESULTS.md"
README = ROOT / "README.md"
_MARKED = re.compile(r"(<!-- (?P<what>table|plot):(?P<suite>[\w.-]+) -->\n).*?(<!-- /(?P=what):(?P=suite) -->)", re.DOTALL)

Cell = str | int | float


@dataclass(frozen=True)
class Result:
    """One measured suite: what, where, when and with which versions; `notes` are sentences that belong to the table.

    README.md shows the first `n_lead_rows` rows, or all where that is None; RESULTS.md always shows all.
    """

    suite: str
    title: str
    hardware: str
    date: str
    versions: dict[str, str]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    n_lead_rows: int | None = None

    @classmethod
    def read(cls, file: Path) -> "Result":
        """Read a result with one table. Raises ConfigError when a key is missing or a row does not fit the columns."""
        return cls.from_json(_tree(file), file.name)

    @classmethod
    def from_json(cls, tree: Any, name: str) -> "Result":
        """The result in the JSON values of the file `name`; other keys are for readers of the file. Raises ConfigError as `read`."""
        try:
            known = {field.name: tree[field.name] for field in dataclasses.fields(cls) if field.name != "n_lead_rows"}
            lists = {"columns": tuple(tree["columns"]), "rows": tuple(map(tuple, tree["rows"])), "notes": tuple(tree["notes"])}
            result = cls(**(known | lists), n_lead_rows=tree.get("n_lead_rows"))
        except (AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"'{name}' is not a benchmark result: {error!r}") from error
        for number, row in enumerate(result.rows, 1):
            if len(row) != len(result.columns):
                raise ConfigError(f"'{name}': row {number} has {len(row)} cells, there are {len(result.columns)} columns")
        return result


@dataclass(frozen=True)
class Plot:
    """What `benchmarks.plot` draws of a result, and the file that it is drawn into, beside the result's own."""

    suite: str
    date: str
    data: dict[str, Any]
    file: Path

    def image(self, folder: str) -> str:
        """As Markdown shows it; `folder` is that of the results, from where the text is."""
        return f"![{self.data['title']}]({folder}/{self.file.name})"


def _tree(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{file.name}' is not a benchmark result: {error!r}") from error


def read_tables(tree: Any, name: str) -> list[Result]:
    """All tables in the JSON values of the file `name`. Raises ConfigError as `Result.read`."""
    if not isinstance(tree, dict) or "tables" not in tree:
        return [Result.from_json(tree, name)]
    return [Result.from_json(tree | entry | {"suite": f"{tree['suite']}-{entry['name']}"}, name) for entry in tree["tables"]]


def read_all(folder: Path = RESULTS) -> list[Result]:
    """All tables, by suite and then newest first."""
    found = [table for file in sorted(folder.glob("*.json")) for table in read_tables(_tree(file), file.name)]
    newest_first = sorted(found, key=lambda result: result.date, reverse=True)
    return sorted(newest_first, key=lambda result: result.suite)


def read_plots(folder: Path = RESULTS) -> list[Plot]:
    """All plots, newest first."""
    trees = [(file, _tree(file)) for file in sorted(folder.glob("*.json"))]
    found = [Plot(tree["suite"], tree["date"], tree["plot"], file.with_suffix(".svg")) for file, tree in trees if tree.get("plot")]
    return sorted(found, key=lambda plot: plot.date, reverse=True)


def table(result: Result) -> str:
    """A Markdown table with its conditions below it; numbers are aligned right."""
    right = [all(isinstance(row[i], int | float) for row in result.rows) for i in range(len(result.columns))]
    lines = [_row(result.columns), _row(tuple("---:" if numbers else "---" for numbers in right)), *map(_row, result.rows)]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines += ["", " ".join([f"{result.hardware}; {result.date}; {versions}.", *result.notes])]
    return "\n".join(lines)


def _row(cells: tuple[Cell, ...]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def page(results: list[Result], plots: list[Plot]) -> str:
    """The whole of RESULTS.md."""
    parts = ["# Results", "Generated from `results/*.json` by `make tables`; do not edit."]
    parts += [f"## {result.title}\n\n{table(result)}" for result in results]
    parts += [f"## {plot.data['title']}\n\n{plot.image('results')}" for plot in plots]
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: list[Result], plots: list[Plot]) -> str:
    """`text` with every marked table and plot replaced. Raises ConfigError for a marked suite that has no result."""
    newest: dict[str, dict[str, Any]] = {
        "table": {result.suite: result for result in reversed(results)},
        "plot": {plot.suite: plot for plot in reversed(plots)},
    }

    def replace(match: re.Match[str]) -> str:
        what, suite = match["what"], match["suite"]
        if suite not in newest[what]:
            raise ConfigError(f"README.md asks for {what} '{suite}', and no result has that suite", f"suites: {', '.join(newest[what])}")
        found = newest[what][suite]
        if isinstance(found, Plot):
            return f"{match[1]}{found.image('benchmarks/results')}\n{match[4]}"
        lead = dataclasses.replace(found, rows=found.rows[: found.n_lead_rows])
        return f"{match[1]}{table(lead)}\n{match[4]}"

    return _MARKED.sub(replace, text)


def main() -> None:
    """Write all of them."""
    from benchmarks.plot import svg

    results, plots = read_all(), read_plots()
    PAGE.write_text(page(results, plots), encoding="utf-8")
    README.write_text(fill(README.read_text(encoding="utf-8"), results, plots), encoding="utf-8")
    for plot in plots:
        plot.file.write_text(svg(plot.data), encoding="utf-8")


if __name__ == "__main__":
    main()
