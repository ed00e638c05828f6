"""What people see while bytes move: on a terminal, and nowhere else."""

import io
import os
import pty
import select
import struct
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraplex_registry.progress import REDRAW_S, ProgressBar, duration, progress_line, readable
from tests.registry import builders
from tests.registry.shell import COMMAND, Shell


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Watch:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 50, "1048576.0 GiB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert readable(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (2.6, "0:03"), (59.6, "1:00"), (760, "12:40"), (11100, "3:05:00")]
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_line_tells_bytes_rate_and_time_left() -> None:
    line = progress_line("upload", 4 << 20, 16 << 20, 2.0)
    assert "25%" in line
    assert "4.0 MiB of 16.0 MiB" in line
    assert "2.0 MiB/s" in line
    assert "0:06 left" in line
    assert "left" not in progress_line("upload", 0, 16 << 20, 0.0)


def test_the_longest_line_fits_into_eighty_columns() -> None:
    assert len(progress_line("hash base", (1 << 30) - 1, 1 << 30, 1.0)) < 80
    assert len(progress_line("hash base", 100 << 30, 200 << 30, 1000.0)) < 80


@given(done=st.integers(0, 1 << 40), total=st.integers(0, 1 << 40), elapsed=st.floats(0, 1e6))
def test_every_state_can_be_drawn(done: int, total: int, elapsed: float) -> None:
    assert "%" in progress_line("fetch", min(done, total), total, elapsed)


def test_it_is_drawn_a_few_times_a_second_and_at_the_end() -> None:
    terminal, watch = Terminal(), Watch()
    bar = ProgressBar(terminal, environment={}, clock=watch)
    for done in range(1001):
        bar("upload", done, 1000)
        watch.now += REDRAW_S / 100
    drawn = terminal.getvalue().count("\r")
    assert 10 <= drawn <= 13
    assert "100%" in terminal.getvalue()
    bar.close()
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_reports_out_of_order_never_run_backwards() -> None:
    terminal, watch = Terminal(), Watch()
    bar = ProgressBar(terminal, environment={}, clock=watch)
    for done in (0, 700, 300):
        watch.now += 1
        bar("fetch", done, 1000)
    assert terminal.getvalue().rstrip("\x1b[K").rpartition("\r")[2].count("70%") == 1


def test_many_threads_may_report_at_once() -> None:
    terminal = Terminal()
    bar = ProgressBar(terminal, environment={})
    threads = [
        threading.Thread(target=lambda: [bar("fetch", done, 100) for done in range(101)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    assert all("\n" not in piece for piece in terminal.getvalue().split("\r"))


@pytest.mark.parametrize(
    ("stream", "environment", "enabled"),
    [(io.StringIO(), {}, True), (Terminal(), {"TERM": "dumb"}, True), (Terminal(), {}, False)],
)
def test_without_a_terminal_nothing_is_drawn(
    stream: io.StringIO, environment: dict[str, str], enabled: bool
) -> None:
    bar = ProgressBar(stream, enabled=enabled, environment=environment)
    bar("upload", 1, 2)
    bar.close()
    assert stream.getvalue() == ""


def on_terminal(shell: Shell, *arguments: str, columns: int = 100) -> tuple[str, str]:
    """Run the command with its errors on a terminal; return (output, what the terminal was sent)."""
    import fcntl
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [COMMAND, *arguments],
        cwd=shell.home,
        env={**shell.environment, "TERM": "xterm", "COLUMNS": str(columns)},
        stdout=subprocess.PIPE,
        stderr=follower,
    )
    os.close(follower)
    sent = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                sent += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    assert process.stdout is not None
    output = process.stdout.read().decode()
    assert process.wait(60) == 0
    os.close(leader)
    return output, sent.decode()


def test_a_push_and_a_pull_draw_on_a_real_terminal_and_clean_up(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {})
    builders.make_adapter(tmp_path / "orders")
    builders.make_base(tmp_path / "base")
    shell("init", "--tenant", "acme")
    output, sent = on_terminal(shell, "push", "orders", "--base", "base")
    assert output.startswith("pushed acme/orders@1")
    assert "check" in sent
    assert "100%" in sent
    assert sent.endswith("\r\x1b[K")
    assert "\x1b[3" not in sent  # no colour
    output, sent = on_terminal(shell, "pull", "orders", "out", columns=30)
    assert output.startswith("pulled acme/orders@1")
    assert max(len(piece.replace("\x1b[K", "")) for piece in sent.split("\r")) < 30
    output, sent = on_terminal(shell, "verify", "orders", "--quiet")
    assert (output, sent) == ("", "")
