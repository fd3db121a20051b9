"""Stands for `async-rlhf` in tests of what drives it: `train` and `sft` that only leave a run directory behind.

    stand_in.py DIRECTORY train CONFIG [--resume]

DIRECTORY holds `calls.jsonl`, to which every call is added, and `behaviour.json`: run name -> how it ends.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml


def main() -> None:
    shared, (command, config, *flags) = Path(sys.argv[1]), sys.argv[2:]
    tree = yaml.safe_load(Path(config).read_text())
    name = tree["run"]["name"]
    behaviour = json.loads((shared / "behaviour.json").read_text()).get(name, "complete")
    with (shared / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps([command, name, *flags]) + "\n")
    if behaviour == "refuse":
        print("error: something about the input")
        raise SystemExit(2)
    directory = Path(tree["run"]["dir"])
    directory.mkdir(parents=True, exist_ok=True)
    if behaviour == "drift":  # as another version of the program would, that knows other keys
        tree["new_section"] = {}
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    if behaviour == "hang":
        time.sleep(600)
    if behaviour in (
        "ask to stop",
        "leave stop",
    ):  # what Ctrl-C in the terminal is to the sweep, or a file to a pipeline
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
        if behaviour == "ask to stop":
            os.kill(os.getppid(), signal.SIGINT)
        else:
            (directory.parent / "stop").touch()
        while not stopped:
            time.sleep(0.01)
    status, error, code = {
        "complete": ("completed", None, 0),
        "drift": ("completed", None, 0),
        "fail": ("failed", "learner.0: it went wrong", 1),
        "interrupt": ("interrupted", None, 130),
        "ask to stop": ("interrupted", None, 130),
        "leave stop": ("interrupted", None, 130),
        "die": ("interrupted", "killed", -1),
    }[behaviour]
    summary = {"status": status, "error": error, "made": time.time_ns()}  # as times of a run tell one from another
    (directory / "summary.json").write_text(json.dumps(summary))
    if code < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
