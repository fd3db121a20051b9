"""Peak memory and time of log-probabilities with gradients at a large vocabulary: in blocks, and with all logits at once.

    .venv/bin/python tools/bench_logprobs.py

Each measurement is a process of its own. Memory is the growth of its resident set over the inputs (hidden states and
output matrix) while log-probabilities and both gradients are computed; time is of the second pass.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def measure(way: str, tokens: int, vocab: int, hidden: int) -> dict[str, float]:
    import torch

    from megatron_async_rlhf.learner.megatron.layers.logprobs import vocab_parallel_logprobs

    torch.set_num_threads(1)
    hidden_NH = torch.randn(tokens, hidden).requires_grad_()
    weight_VH = torch.randn(vocab, hidden).requires_grad_()
    targets_N = torch.randint(vocab, (tokens,))
    hidden_NH.grad, weight_VH.grad = torch.ones_like(hidden_NH), torch.ones_like(weight_VH)
    alone = SimpleNamespace(tensor_rank=0, tensor_parallel=1)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        start = time.perf_counter()
        if way == "blocks":
            logprobs_N = vocab_parallel_logprobs(
                hidden_NH, weight_VH, targets_N, vocab_size=vocab, temperature=1.0, placement=alone
            )
        else:
            logprobs_N = (hidden_NH @ weight_VH.t()).log_softmax(-1).gather(1, targets_N.unsqueeze(1)).squeeze(1)
        logprobs_N.sum().backward()
        seconds = time.perf_counter() - start
    return {"mib": (status_bytes("VmHWM") - before) / 2**20, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--most-at-once", type=int, default=4096, help="no comparison with all logits above this")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, tokens = options.measure
        print(json.dumps(measure(way, int(tokens), options.vocab, options.hidden)))
        return
    sizes = ["--vocab", str(options.vocab), "--hidden", str(options.hidden)]
    print(f"vocabulary {options.vocab}, hidden size {options.hidden}, float32, one thread")
    print(f"{'tokens':>7}{'blocks MiB':>12}{'at once MiB':>13}{'blocks s':>10}{'at once s':>11}")
    for tokens in options.tokens:
        found = {}
        for way in ("blocks", "at once") if tokens <= options.most_at_once else ("blocks",):
            command = [sys.executable, __file__, *sizes, "--measure", way, str(tokens)]
            found[way] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        shown = [
            f"{found[w][k]:.{d}f}" if w in found else "-"
            for k, d in (("mib", 0), ("seconds", 2))
            for w in ("blocks", "at once")
        ]
        print(f"{tokens:7}{shown[0]:>12}{shown[1]:>13}{shown[2]:>10}{shown[3]:>11}")


if __name__ == "__main__":
    main()
