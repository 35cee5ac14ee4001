"""Registry: names to lazily imported records."""

import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edgeft.errors import ConfigError, MissingExtraError


def nearest(name: str, known: list[str], n: int = 3) -> list[str]:
    """Known names most similar to `name`, best first."""
    return difflib.get_close_matches(name, known, n=n, cutoff=0.4)


@dataclass(frozen=True)
class Entry:
    """One registered thing: `target` is "module:attribute", imported only when fetched."""

    name: str
    summary: str
    target: str
    extra: str | None = None


class Registry:
    """Entries of one kind ("export target", "method", ...), listed without importing anything heavy."""

    def __init__(self, kind: str, *entries: Entry) -> None:
        self.kind = kind
        self._entries = {entry.name: entry for entry in entries}

    def __iter__(self) -> Iterator[Entry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def entry(self, name: str) -> Entry:
        """The record of `name`. Raises ConfigError with the nearest names."""
        if name not in self._entries:
            close = nearest(name, self.names(), n=1)
            hint = f"known {self.kind}s: {', '.join(self.names())}"
            if close:
                hint += f"\n  did you mean: {close[0]}"
            raise ConfigError(f"unknown {self.kind} '{name}'", hint)
        return self._entries[name]

    def get(self, name: str) -> Any:
        """Import and return the object behind `name`. Raises ConfigError or MissingExtraError."""
        entry = self.entry(name)
        module, _, attribute = entry.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if entry.extra is None or (error.name or "").startswith("edgeft"):
                raise
            raise MissingExtraError(
                f"{self.kind} '{name}' needs the package '{error.name}'", f"pip install 'edgeft[{entry.extra}]'"
            ) from error
