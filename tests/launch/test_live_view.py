"""The live view: as text on terminals of any width, in a pipe, on a dumb terminal, resized and interrupted.

The files in `terminal/` are what is seen; with ASYNC_RLHF_TEST_WRITE=1 they are written anew, to be looked at.
"""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
from rich.console import Console

from megatron_async_rlhf.launch.display import Display
from megatron_async_rlhf.launch.run_view import RunView

SEEN = Path(__file__).parent / "terminal"
EVENTS = [
    {"event": "phase", "name": "start"},
    {"event": "activity", "side": "generators", "what": "generator.0 is up"},
    {"event": "phase", "name": "warm start", "steps": 40},
    {"event": "warm_start", "step": 40, "steps": 40, "loss": 1.234567},
    {"event": "phase", "name": "evaluate before"},
    {"event": "evaluated", "when": "before", "metrics": {"reward": 0.2512, "response_length": 9.5, "logprob_gap": 5.1e-07}},
    {"event": "phase", "name": "train", "steps": 110},
    *(
        {"event": "step", "step": n, "steps": 110, "reward": 0.3 + 0.01 * (n % 7) + 0.004 * n, "loss": 0.7 - 0.002 * n,
         "kl": 0.02 * n, "staleness": 1.333, "samples_per_s": 112.34}
        for n in range(1, 58)
    ),
    {"event": "activity", "side": "learner", "what": "step 58"},
    {"event": "activity", "side": "generators", "what": "sample with version 57"},
    {"event": "note", "text": "generator.0 was killed by SIGKILL, which often means that memory ran out; started again (1 of 3)"},
]  # fmt: skip


def compared(name: str, text: str) -> None:
    path = SEEN / name
    if os.environ.get("ASYNC_RLHF_TEST_WRITE"):
        path.write_text(text)
    assert text == path.read_text()


def view_of(events: list[dict], **options) -> RunView:
    view = RunView(lambda: 5 * 2**30 + 2**29, **options)
    for second, event in enumerate(events):
        view.take(event, 100.0 + second)
    return view


def drawn(view: RunView, width: int, now: float = 100.0 + len(EVENTS)) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, legacy_windows=False)
    console.print(view.lines(now, width))
    return "".join(f"{line.rstrip()}\n" for line in output.getvalue().splitlines())


@pytest.mark.parametrize("width", [80, 200])
def test_the_view_is_as_it_was_looked_at(width: int):
    text = drawn(view_of(EVENTS), width)
    assert max(map(len, text.splitlines())) <= width
    compared(f"view_{width}.txt", text)


@pytest.mark.parametrize("width", [20, 40, 79])
@pytest.mark.parametrize("many", [1, 3, 8, len(EVENTS)])
def test_no_line_is_wider_than_the_terminal(width: int, many: int):
    assert max(map(len, drawn(view_of(EVENTS[:many]), width).splitlines())) <= width


def test_a_terminal_of_ascii_gets_ascii():
    drawn(view_of(EVENTS, unicode=False), 80).replace("━", "").replace("╸", "").replace("╺", "").encode("ascii")


def test_time_left_is_as_long_as_the_last_steps_say():
    view = RunView()
    view.take({"event": "phase", "name": "train", "steps": 100}, 0.0)
    for step in range(1, 51):
        pace = 1.0 if step <= 25 else 3.0  # it has become slower
        view.take(EVENTS[7] | {"step": step, "steps": 100}, 25.0 + (step - 25) * pace if step > 25 else step * 1.0)
    assert "2 min 30 s left" in drawn(view, 80, now=100.0)


def test_in_a_pipe_each_event_is_a_line():
    output = io.StringIO()
    display = Display(Console(file=output, width=80, soft_wrap=True, highlight=False))
    for event in EVENTS:
        display.show(event)
    compared("pipe.txt", re.sub(r"\[ *[\d.]+ s\]", "[    0.0 s]", output.getvalue()))


PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_live_view import EVENTS
from megatron_async_rlhf.launch.display import Display
from pathlib import Path
display = Display(memory=lambda: 5 * 2**30)
print("READY", flush=True)
try:
    for event in EVENTS:
        display.show(event)
        time.sleep(0.02)
    time.sleep({{rest}})
finally:
    display.finished("interrupted", None, [], Path("runs/example"))
"""


def on_terminal(rest: float, *, columns: int, term: str = "xterm-256color", then=lambda process, terminal: None) -> str:
    """What a program that shows all events writes to a terminal, escapes included."""
    ours, theirs = pty.openpty()
    resize(theirs, columns)
    environment = os.environ | {"TERM": term, "COLUMNS": "", "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(rest=rest)], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    output, asked, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                output += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        if not asked and b"READY" in output:
            asked = True
            then(process, ours)
    os.close(ours)
    process.wait(10)
    return output.decode()


def resize(terminal: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))


def screen(output: str, columns: int) -> list[str]:
    """What is to be seen on such a terminal in the end, without empty lines."""
    shown = pyte.Screen(columns, 200)
    pyte.Stream(shown).feed(output)
    return [line.rstrip() for line in shown.display if line.strip()]


def test_a_panel_stands_below_its_notes():
    output = on_terminal(1.0, columns=80)
    lines = screen(output[: output.rindex("GiB here") + len("GiB here")], 80)  # as it was drawn for the last time
    compared(
        "panel_80.txt", "\n".join(re.sub(r"\d+(?=(\.\d)? s(\]| so far))(\.\d)?", "0", line) for line in lines) + "\n"
    )


def test_a_panel_leaves_its_notes_and_nothing_else():
    lines = screen(on_terminal(1.0, columns=80), 80)
    assert lines[0] == "READY" and lines[-1].endswith("interrupted: runs/example")
    notes = [line for line in lines[1:] if line.startswith("[")]
    continued = [line for line in lines[1:] if not line.startswith("[")]
    assert len(notes) == 7 and continued == ["5.1e-07", "out; started again (1 of 3)"]  # broken between words


def test_a_dumb_terminal_gets_lines_without_escapes():
    output = on_terminal(0.1, columns=80, term="dumb")
    assert "\x1b" not in output and "step 57/110  reward 0.538" in output


def test_a_terminal_that_is_made_narrower_gets_narrower_lines():
    def narrow(process, terminal):
        time.sleep(3.0)  # all events are shown
        resize(terminal, 50)
        os.killpg(process.pid, signal.SIGWINCH)

    output = on_terminal(4.0, columns=120, then=narrow)
    frame = output[output.rindex("train, step 57 of 110") :].partition("\r\n")[0]
    assert len(frame) <= 50


def test_an_interrupt_leaves_the_terminal_with_its_cursor():
    def interrupt(process, terminal):
        time.sleep(1.5)
        os.killpg(process.pid, signal.SIGINT)

    output = on_terminal(30.0, columns=80, then=interrupt)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")  # shown again after it was hidden
    assert any(line.endswith("interrupted: runs/example") for line in screen(output, 80))
