"""Processes below another one."""

from pathlib import Path


def descendants(pid: int) -> list[int]:
    """`pid` and all processes below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in descendants(int(child)))]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
