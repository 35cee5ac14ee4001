"""Progress: plain lines with rate and remaining time, bars on a terminal, silence when disabled."""

import io

import pytest

from edgeft.progress import Progress, duration


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_say_start_share_and_end() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock).task("fine-tune", 10) as advance:
        for step in range(10):
            clock.now += 1
            advance(note=f"loss {step}")
    assert out.getvalue().splitlines() == [
        "fine-tune: 10 to do",
        "fine-tune: 2/10 (1/s), 8 s left  loss 1",
        "fine-tune: 4/10 (1/s), 6 s left  loss 3",
        "fine-tune: 6/10 (1/s), 4 s left  loss 5",
        "fine-tune: 8/10 (1/s), 2 s left  loss 7",
        "fine-tune: 10/10 (1/s), done in 10 s  loss 9",
    ]


def test_plain_lines_of_a_slow_task_come_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    with Progress(stream=out, clock=clock).task("t", 1000) as advance:
        for _ in range(25):
            clock.now += 1
            advance()
    assert [line.split(" ")[1] for line in out.getvalue().splitlines()[1:-1]] == ["10/1000", "20/1000"]


def test_a_fast_task_is_two_lines() -> None:
    out = io.StringIO()
    with Progress(stream=out, clock=Clock()).task("t", 5) as advance:
        for _ in range(5):
            advance()
    assert len(out.getvalue().splitlines()) == 2


def test_a_task_that_fails_says_where_it_stopped() -> None:
    out, clock = io.StringIO(), Clock()

    def work() -> None:
        with Progress(stream=out, clock=clock).task("t", 5) as advance:
            clock.now += 2
            advance(2)
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert out.getvalue().splitlines()[-1] == "t: 2/5 (1/s), stopped after 2 s"


def test_disabled_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(enabled=False)
    progress.line("text")
    with progress.task("t", 3) as advance:
        advance(3, "note")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress().line("[1/5] linear probe")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "[1/5] linear probe\n")


def test_a_terminal_gets_nested_bars_and_lines_between_them() -> None:
    out = Terminal()
    progress = Progress(stream=out)
    with progress.task("outer", 2) as advance:
        advance(1, "val 88 %")
        with progress.task("inner [bold]", 3) as inner:
            inner(3)
        progress.line("[a line]")
        advance(1)
    text = out.getvalue()
    for part in ("outer", "inner [bold]", "[a line]", "2/2", "val 88 %"):
        assert part in text
