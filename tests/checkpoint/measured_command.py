"""Runs one command of `async-rlhf` and prints by how much its memory peaked above where it was with torch loaded.

`measured_command.py import-hf ...` prints {"peak_mib": ..., "seconds": ...} as its last line. `hold DIRECTORY` is no
command: it reads a whole model, to see that the measure does notice.
"""

import json
import sys
import time
from pathlib import Path


def status_mib(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def hold(directory: Path) -> None:
    import torch

    from megatron_async_rlhf.formats.hf_files import SafetensorsDirectory

    reader = SafetensorsDirectory(directory)
    held = {name: torch.empty(spec.matrix, dtype=torch.bfloat16) for name, spec in reader.tensors.items()}
    for name, tensor in held.items():
        reader.read_into(tensor, name, 0, 0)


def main() -> None:
    import torch.distributed.checkpoint  # noqa: F401  what every command loads is not what it costs

    import megatron_async_rlhf.converter.convert  # noqa: F401
    from megatron_async_rlhf.cli import app

    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    start = time.monotonic()
    if sys.argv[1] == "hold":
        hold(Path(sys.argv[2]))
    else:
        app(sys.argv[1:], standalone_mode=False)
    figures = {"peak_mib": round(status_mib("VmHWM") - before, 1), "seconds": round(time.monotonic() - start, 2)}
    print(json.dumps(figures | {"before_mib": round(before, 1), "megatron": "megatron" in sys.modules}))


if __name__ == "__main__":
    main()
