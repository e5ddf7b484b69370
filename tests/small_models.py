"""
Small models beside PyTorch: python tests/benchmark.py --small

Each candidate is a process that stays alive and makes some steps when it is told to. They take
turns many times, a second or so each, so that what else the machine is doing strikes all alike.
A step is forward, backward, clipping to a norm of 1 and AdamW, as in `python train_gpt2.py`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROWS = {  # name: B, T, V, L, NH, C
    "nano": (12, 64, 65, 4, 4, 128),  # nanoGPT's recipe for a CPU
    "bytes": (16, 64, 256, 2, 4, 128),  # what is trained with no network
    "char": (4, 256, 65, 6, 6, 384),  # nanoGPT's character model, a small batch
    "d6": (8, 64, 50257, 6, 6, 384),
    "d12": (4, 64, 50257, 12, 12, 768),
    "d12long": (1, 1024, 50257, 12, 12, 768),
    "d12large": (4, 1024, 50257, 12, 12, 768),
}
SMALL = ("nano", "bytes", "char", "d6")


# --------------------------------------------------------------------------------------------------
# In the process of a candidate


def batches(B, T, V):
    import numpy as np

    return list(np.random.default_rng(0).integers(0, V, (8, 2, B, T)))


def ours(row, folder, recompute=None):
    """A function that makes one step of the trainer in that folder."""
    sys.path.insert(0, folder)
    import warnings

    import train_gpt2 as gpt2

    warnings.simplefilter("ignore", RuntimeWarning)
    B, T, V, L, NH, C = row
    more = {} if recompute is None else {"recompute": recompute}
    model = gpt2.GPT2(gpt2.GPT2Config(max(T, 64), V, L, NH, C), B, T, **more)
    data = batches(B, T, V)

    def step(i):
        model.forward(*data[i % len(data)])
        model.backward()
        norm = model.grad_norm()
        model.update(1e-4, weight_decay=0.1, grad_scale=min(1.0, 1.0 / norm))

    return step


def pytorch(row, folder, compiled):
    """The same of PyTorch: the reference model of test_gpt2.py at its best."""
    sys.path.insert(0, folder)
    import numpy as np
    import torch

    import train_gpt2 as gpt2
    from test_gpt2 import TorchGPT2

    B, T, V, L, NH, C = row
    config = gpt2.GPT2Config(max(T, 64), V, L, NH, C)
    params = {n: np.zeros(s, np.float32) for n, s in gpt2.param_shapes(config).items()}
    gpt2.init_weights(params, 1337)
    model = TorchGPT2(config, params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    compute = torch.compile(model) if compiled else model
    data = [tuple(map(torch.from_numpy, pair)) for pair in batches(B, T, V)]

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        compute(*data[i % len(data)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def child(name, arguments):
    """Read numbers, make as many steps, answer with the seconds of each."""
    step = {"ours": ours, "pytorch": pytorch}[name](**arguments)
    done = 0
    print("ready", flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            step(done)
            times.append(time.perf_counter() - began)
            done += 1
        print(json.dumps(times), flush=True)


# --------------------------------------------------------------------------------------------------
# The candidates take turns


class Candidate:
    def __init__(self, name, arguments, threads):
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(threads)
        command = [sys.executable, os.path.abspath(__file__), "--child", name]
        self.process = subprocess.Popen(
            [*command, json.dumps(arguments)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        if self.process.stdout.readline() != "ready\n":
            sys.exit(f"{arguments} did not start")
        self.medians = []

    def steps(self, n):
        print(n, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(row_name, candidates, rounds, seconds, threads):
    """Print a row of the table for each candidate. PyTorch's faster mode of each round is 1."""
    row = ROWS[row_name]
    running = {}
    for label, (name, arguments) in candidates.items():
        running[label] = Candidate(name, arguments | {"row": row}, threads)
    numbers = {}
    for label, one in running.items():
        one.steps(2)  # warms up, and compiles
        took = statistics.median(one.steps(3))
        numbers[label] = max(2, round(seconds / took))
    labels = list(running)
    for i in range(rounds):
        order = labels if i % 2 == 0 else labels[::-1]
        for label in order:
            # the first step after a pause finds cold caches, and is left out
            times = running[label].steps(numbers[label] + 1)[1:]
            running[label].medians.append(statistics.median(times))
    for one in running.values():
        one.close()

    theirs = [label for label in labels if label.startswith("PyTorch")]
    base = theirs or labels[:1]
    found = {}
    base_medians = running[labels[0]].medians
    for label, one in running.items():
        ratios = [
            min(running[other].medians[i] for other in base) / one.medians[i] for i in range(rounds)
        ]
        ms = statistics.median(one.medians) * 1e3
        found[label] = ms
        first = [a / b for a, b in zip(base_medians, one.medians, strict=True)]
        print(
            f"| {row_name} | {', '.join(map(str, row))} | {label} | {ms:.1f} | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median(first):.3f} |",
            flush=True,
        )
    return found


def main(argv=None):
    """Measure the rows that the flags name, and print a table."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        child(argv[1], json.loads(argv[2]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(SMALL), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--ours", nargs="*", default=[f"{TOP}:0"], help="FOLDER[:recompute]")
    parser.add_argument("--torch", default="eager,compiled", help="modes of PyTorch")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)

    candidates = {}
    for text in options.ours:
        folder, _, recompute = text.partition(":")
        arguments = {"folder": os.path.abspath(folder)}
        if recompute:
            arguments["recompute"] = int(recompute)
        candidates[text] = ("ours", arguments)
    for mode in filter(None, options.torch.split(",")):
        arguments = {"folder": TOP, "compiled": mode == "compiled"}
        candidates[f"PyTorch {mode}"] = ("pytorch", arguments)

    print("| row | B, T, V, L, NH, C | who | ms per step | speed beside PyTorch | beside the 1st |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in options.rows.split(","):
        measure(name, candidates, options.rounds, options.seconds, options.threads)


if __name__ == "__main__":
    main()
