"""Progress on stderr: a bar with remaining time on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

LINE_EVERY_S = 10.0
"""A plain line at least this often on a long task."""
LINES = 5
"""A plain line whenever another of this many equal parts of a task is done ..."""
LINE_APART_S = 1.0
"""... but never closer together than this."""

Advance = Callable[..., None]
"""advance(n=1, note=""): n more units are done; `note` is shown beside the numbers."""


def duration(seconds: float) -> str:
    """Seconds as "8 s", "3 min 05 s" or "2 h 07 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class _PlainTask:
    """One task as lines of text, for logs and pipes."""

    def __init__(self, write: Callable[[str], None], title: str, total: int, clock: Callable[[], float]) -> None:
        self._write, self._title, self._total, self._clock = write, title, total, clock
        self._done = 0
        self._note = ""
        self._start = self._last = clock()
        self._last_part = 0
        write(f"{title}: {total} to do")

    def advance(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._note = note or self._note
        now, part = self._clock(), LINES * self._done // max(self._total, 1)
        due = now - self._last >= LINE_EVERY_S or (part > self._last_part and now - self._last >= LINE_APART_S)
        if due and self._done < self._total:
            self._last, self._last_part = now, part
            left = (now - self._start) / max(self._done, 1) * (self._total - self._done)
            self._write(f"{self._text(now)}, {duration(left)} left{self._suffix()}")

    def end(self, *, failed: bool) -> None:
        now = self._clock()
        self._write(f"{self._text(now)}, {'stopped after' if failed else 'done in'} {duration(now - self._start)}{self._suffix()}")

    def _text(self, now: float) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        return f"{self._title}: {self._done}/{self._total} ({f'{rate:.0f}' if rate >= 100 else f'{rate:.3g}'}/s)"

    def _suffix(self) -> str:
        return f"  {self._note}" if self._note else ""


class Progress:
    """Where long steps say how far they are. Tasks may be nested. Disabled, it says nothing."""

    def __init__(self, enabled: bool = True, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._enabled, self._stream, self._clock = enabled, stream, clock
        self._bars: Bars | None = None

    @property
    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def line(self, text: str) -> None:
        """Print one line (above the bars, where there are any)."""
        if not self._enabled:
            return
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def task(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """A step of `total` units; the context yields advance(n=1, note="")."""
        if not self._enabled:
            return self._silent()
        return self._bar(title, total) if self._out.isatty() else self._plain(title, total)

    @contextmanager
    def _silent(self) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            pass

        yield advance

    @contextmanager
    def _plain(self, title: str, total: int) -> Iterator[Advance]:
        task = _PlainTask(self.line, title, total, self._clock)
        try:
            yield task.advance
        except BaseException:
            task.end(failed=True)
            raise
        task.end(failed=False)

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Advance]:
        outermost = self._bars is None
        bars = _rich_bars(self._out) if self._bars is None else self._bars
        if outermost:
            self._bars = bars
            bars.start()
        task = bars.add_task(title, total=total, note="")

        def advance(n: int = 1, note: str = "") -> None:
            bars.update(task, advance=n, **({"note": note} if note else {}))  # type: ignore[arg-type]

        try:
            yield advance
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)


def _rich_bars(stream: TextIO) -> "Bars":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=Console(file=stream),
    )
