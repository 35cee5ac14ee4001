"""Generate benchmarks/RESULTS.md and the marked tables of README.md from benchmarks/results/*.json: python -m benchmarks.tables.

A table in README.md stands between <!-- table:SUITE --> and <!-- /table:SUITE --> and shows the suite's newest result.
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
_MARKED = re.compile(r"(<!-- table:(?P<suite>[\w.-]+) -->\n).*?(<!-- /table:(?P=suite) -->)", re.DOTALL)

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
        """Read a result. Raises ConfigError when a key is missing or a row does not fit the columns."""
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"'{file.name}' is not a benchmark result: {error!r}") from error
        return cls.from_json(tree, file.name)

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


def read_all(folder: Path = RESULTS) -> list[Result]:
    """All results, by suite and then newest first."""
    found = [Result.read(file) for file in sorted(folder.glob("*.json"))]
    newest_first = sorted(found, key=lambda result: result.date, reverse=True)
    return sorted(newest_first, key=lambda result: result.suite)


def table(result: Result) -> str:
    """A Markdown table with its conditions below it; numbers are aligned right."""
    right = [all(isinstance(row[i], int | float) for row in result.rows) for i in range(len(result.columns))]
    lines = [_row(result.columns), _row(tuple("---:" if numbers else "---" for numbers in right)), *map(_row, result.rows)]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    lines += ["", " ".join([f"{result.hardware}; {result.date}; {versions}.", *result.notes])]
    return "\n".join(lines)


def _row(cells: tuple[Cell, ...]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def page(results: list[Result]) -> str:
    """The whole of RESULTS.md."""
    parts = ["# Results", "Generated from `results/*.json` by `make tables`; do not edit."]
    parts += [f"## {result.title}\n\n{table(result)}" for result in results]
    return "\n\n".join(parts) + "\n"


def fill(text: str, results: list[Result]) -> str:
    """`text` with every marked table replaced. Raises ConfigError for a marked suite that has no result."""
    newest = {result.suite: result for result in reversed(results)}

    def replace(match: re.Match[str]) -> str:
        suite = match["suite"]
        if suite not in newest:
            raise ConfigError(f"README.md asks for table '{suite}', and no result has that suite", f"suites: {', '.join(newest)}")
        result = newest[suite]
        lead = dataclasses.replace(result, rows=result.rows[: result.n_lead_rows])
        return f"{match[1]}{table(lead)}\n{match[3]}"

    return _MARKED.sub(replace, text)


def main() -> None:
    """Write both files."""
    results = read_all()
    PAGE.write_text(page(results), encoding="utf-8")
    README.write_text(fill(README.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
