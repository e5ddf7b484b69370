"""
Small models beside PyTorch: python tests/benchmark.py --small

    --two_processes    also two processes of one thread each, with half of the batch
    --two_halves       also two models in one process, each with a thread and half of the batch
    --rows sizes       models of 10 thousand to 124 million parameters
    --embedded         the run that needs no network, from start to end, beside a loop in PyTorch

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
    "10K": (12, 64, 65, 1, 2, 24),
    "100K": (12, 64, 65, 2, 4, 60),
    "1M": (12, 64, 65, 5, 4, 128),
    "10M": (12, 64, 65, 6, 6, 372),
    "124M": (4, 64, 50257, 12, 12, 768),
}
SMALL = ("nano", "bytes", "char", "d6")
SIZES = ("10K", "100K", "nano", "1M", "10M", "d6", "124M")


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
    world = gpt2.join_processes()
    gpt2.share_cores(world.local_size)
    B //= world.size
    model = gpt2.GPT2(gpt2.GPT2Config(max(T, 64), V, L, NH, C), B, T, **more)
    model = world.share_model(model)
    data = batches(B, T, V)

    def step(i):
        model.forward(*data[i % len(data)])
        model.backward()
        norm = model.grad_norm()
        model.update(1e-4, weight_decay=0.1, grad_scale=min(1.0, 1.0 / norm))

    return step


def halves(row, folder, recompute=None):
    """Two such steps at a time, each of half of the batch, in two threads that meet at its end.

    Until then all they share is Python's interpreter. So this is the most that threads can reach.
    """
    from concurrent.futures import ThreadPoolExecutor

    B, *others = row
    steps = [ours((B // 2, *others), folder, recompute) for _ in range(2)]
    threads = ThreadPoolExecutor(2)

    def step(i):
        for one in [threads.submit(one, i) for one in steps]:
            one.result()

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


def numbers_to_make():
    """The numbers on stdin. Of several processes the first one reads them, and tells the others.

    These sleep meanwhile: MPI would keep a core busy waiting, and another candidate measures.
    """
    if "PMI_SIZE" not in os.environ:
        yield from map(int, sys.stdin)
        return
    from mpi4py.MPI import COMM_WORLD as comm

    if comm.rank == 0:
        for line in sys.stdin:
            comm.send(int(line), 1)
            yield int(line)
        comm.send(None, 1)
        return
    while True:
        while not comm.iprobe(0):
            time.sleep(0.002)
        number = comm.recv(source=0)
        if number is None:
            return
        yield number


def embedded(compiled):
    """The embedded run in PyTorch: the same batches, rates and validations. Prints the last one."""
    import contextlib
    import io

    sys.path.insert(0, TOP)
    import numpy as np
    import torch

    import train_gpt2 as gpt2
    from test_gpt2 import TorchGPT2

    args = gpt2.settings({"model": "bytes"})
    config = gpt2.BYTES_CONFIG
    params = {n: np.zeros(s, np.float32) for n, s in gpt2.param_shapes(config).items()}
    gpt2.init_weights(params, args.seed)
    model = TorchGPT2(config, params)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=args.weight_decay, fused=True)
    compute = torch.compile(model) if compiled else model

    state = {"data": {}, "position": [0, 0, 0]}
    with contextlib.redirect_stdout(io.StringIO()):
        loader, val_loader, data = gpt2.open_data(args, config, gpt2.one_process(), state)
    run = argparse.Namespace(args=args, data=data, model=model, world=gpt2.one_process())
    run.model.config = config
    B = args.batch_size
    for update in range(args.num_iterations + 1):
        if update % args.val_loss_every == 0:
            val_loader.seek([0, 0, 0])
            losses = []
            with torch.no_grad():
                for _ in range(gpt2.val_passages(run) // B):
                    rows = [val_loader.next_batch() for _ in range(B)]
                    batch = map(np.concatenate, zip(*rows, strict=True))
                    losses.append(compute(*map(torch.from_numpy, batch)).item())
        if update == args.num_iterations:
            break
        rate = gpt2.learning_rate_at(
            update, args.num_iterations, args.learning_rate,
            args.warmup_iters, args.learning_rate_decay_frac,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = compute(*map(torch.from_numpy, loader.next_batch()))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        loss.item()  # as a run that prints it
    print(f"val loss {sum(losses) / len(losses):.6f}")


def child(name, arguments):
    """Read numbers, make as many steps, answer with the seconds of each."""
    step = {"ours": ours, "halves": halves, "pytorch": pytorch}[name](**arguments)
    done = 0
    print("ready", flush=True)
    for number in numbers_to_make():
        times = []
        for _ in range(number):
            began = time.perf_counter()
            step(done)
            times.append(time.perf_counter() - began)
            done += 1
        print(json.dumps(times), flush=True)


# --------------------------------------------------------------------------------------------------
# The candidates take turns


class Candidate:
    def __init__(self, name, arguments, threads, processes=1):
        environment = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[variable] = str(threads)
        command = [sys.executable, os.path.abspath(__file__), "--child", name]
        command = (["mpiexec", "-n", str(processes)] if processes > 1 else []) + command
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


TWO = ", two processes"  # of one thread each
HALVES = ", two halves"  # which have one thread each


def measure_embedded(rounds):
    """Print how long the embedded run takes from start to end, ours and PyTorch's, in turns."""
    trainer = [sys.executable, os.path.join(TOP, "train_gpt2.py"), "--model", "bytes"]
    trainer += ["--sample_every", "0"]
    here = [sys.executable, os.path.abspath(__file__), "--embedded_child"]
    commands = {
        "train_gpt2.py": trainer,
        "train_gpt2.py" + TWO: ["mpiexec", "-n", "2", *trainer, "--batch_size", "8"],
        "PyTorch eager": [*here, "eager"],
        "PyTorch compiled": [*here, "compiled"],
    }
    seconds = {label: [] for label in commands}
    for _ in range(rounds):
        for label, command in commands.items():
            began = time.perf_counter()
            output = subprocess.check_output(command, text=True, cwd=TOP)
            seconds[label].append(time.perf_counter() - began)
            last = [line for line in output.splitlines() if line.startswith("val loss")][-1]
            print(f"{label}: {seconds[label][-1]:.1f} s, {last}", flush=True)
    for label, found in seconds.items():
        print(f"| {label} | {statistics.median(found):.1f} s |")


def measure(row_name, candidates, rounds, seconds, threads):
    """Print a row of the table for each candidate. PyTorch's faster mode of each round is 1."""
    row = ROWS[row_name]
    running = {}
    for label, (name, arguments) in candidates.items():
        processes = 2 if label.endswith(TWO) else 1
        of_each = threads // 2 if label.endswith((TWO, HALVES)) else threads
        running[label] = Candidate(name, arguments | {"row": row}, of_each, processes)
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
    found = {"row": row}
    base_medians = running[labels[0]].medians
    for label, one in running.items():
        ratios = [
            min(running[other].medians[i] for other in base) / one.medians[i] for i in range(rounds)
        ]
        ms = statistics.median(one.medians) * 1e3
        way = next((way for way in (TWO, HALVES) if label.endswith(way)), "one process")
        kind = "PyTorch" if label in theirs else way
        found[kind] = min(ms, found.get(kind, ms))
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
    if argv[:1] == ["--embedded_child"]:
        embedded(argv[1] == "compiled")
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
    parser.add_argument("--two_processes", action="store_true")
    parser.add_argument("--two_halves", action="store_true")
    parser.add_argument("--embedded", action="store_true")
    parser.add_argument("--output", metavar="X.json", help="also write the medians there")
    options = parser.parse_args(argv)
    if options.embedded:
        measure_embedded(options.rounds)
        return

    candidates = {}
    for text in options.ours:
        folder, _, recompute = text.partition(":")
        arguments = {"folder": os.path.abspath(folder)}
        if recompute:
            arguments["recompute"] = int(recompute)
        candidates[text] = ("ours", arguments)
        if options.two_processes:
            candidates[text + TWO] = ("ours", arguments)
        if options.two_halves:
            candidates[text + HALVES] = ("halves", arguments)
    for mode in filter(None, options.torch.split(",")):
        arguments = {"folder": TOP, "compiled": mode == "compiled"}
        candidates[f"PyTorch {mode}"] = ("pytorch", arguments)

    print("| row | B, T, V, L, NH, C | who | ms per step | speed beside PyTorch | beside the 1st |")
    print("|---|---|---|---|---|---|", flush=True)
    found = []
    for name in SIZES if options.rows == "sizes" else options.rows.split(","):
        found.append(measure(name, candidates, options.rounds, options.seconds, options.threads))
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
