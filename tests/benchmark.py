"""
Speed and memory beside PyTorch, and what more cores would give.

    python tests/benchmark.py                    GPT-2 124M at B, T = 4, 64 and 1, 1024
    python tests/benchmark.py --rows small       models that people train on a laptop
    python tests/benchmark.py --against e6e19c8  also the version of a commit
    python tests/benchmark.py --two_processes    also two processes, each with half of the batch
    python tests/benchmark.py --cores            a simulation of 1 to 16 cores, and of unlike ones

Whatever is compared runs in a process of its own, for some steps. The candidates take turns, so
that what else the machine is doing strikes all alike. A step is forward, backward, clipping to a
norm of 1 and AdamW. The reference is the PyTorch model of test_gpt2.py at its best: with
scaled_dot_product_attention, fused AdamW, eager and compiled, in float32 with as many threads.
Speed is relative to PyTorch's faster mode of the same round, memory to its leaner one; with --torch
and no mode, to the first candidate.

Without --rows, the results are also written to figures/benchmarks, from which
figures/make_figures.py makes the table and the chart of the README.
"""

import argparse
import contextlib
import ctypes
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROWS = {  # name: (B, T, V, L, NH, C)
    "nano": (12, 64, 65, 4, 4, 128),  # nanoGPT's recipe for a CPU
    "bytes": (16, 64, 256, 2, 4, 128),  # what is trained with no network
    "char": (4, 256, 65, 6, 6, 384),  # nanoGPT's character model, a small batch
    "d6": (8, 64, 50257, 6, 6, 384),
    "d12": (4, 64, 50257, 12, 12, 768),  # GPT-2 124M
    "d12long": (1, 1024, 50257, 12, 12, 768),
    "10K": (12, 64, 65, 1, 2, 24),
    "100K": (12, 64, 65, 2, 4, 60),
    "1M": (12, 64, 65, 5, 4, 128),
    "10M": (12, 64, 65, 6, 6, 372),
}
GROUPS = {
    "": "d12,d12long",
    "small": "nano,bytes,char,d6",
    "sizes": "10K,100K,nano,1M,10M,d6,d12",  # for figures/sizes.json
}

# --------------------------------------------------------------------------------------------------
# In the process of a candidate. It makes a list of passes, which together are a step. Each imports
# what it needs, so that ours do not pay for PyTorch.


def model_and_batches(row, folder=TOP, processes=1, **settings):
    """A model of the trainer in that folder, and 8 batches; B is that of all processes."""
    sys.path.insert(0, folder)
    import train_gpt2 as gpt2

    B, T, V, L, NH, C = row
    make = gpt2.GPT2
    if processes > 1:
        from extras.processes import SharedGPT2 as make
    model = make(gpt2.GPT2Config(max(T, 64), V, L, NH, C), B // processes, T, **settings)
    return model, np.random.default_rng(0).integers(0, V, (8, 2, B // processes, T))


def ours(row, folder, **settings):
    model, batches = model_and_batches(row, folder, **settings)

    def update():
        norm = model.grad_norm()
        model.update(1e-4, weight_decay=0.1, grad_scale=min(1.0, 1.0 / norm))

    turn = itertools.cycle(batches)
    return [lambda: model.forward(*next(turn)), model.backward, update]


def pytorch(row, compiled):
    model, batches = model_and_batches(row, training=False)
    import torch

    from test_gpt2 import TorchGPT2

    theirs = TorchGPT2(model.config, model.params)
    del model
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    compute = torch.compile(theirs) if compiled else theirs
    turn = itertools.cycle([tuple(map(torch.from_numpy, pair)) for pair in batches])
    loss = [None]

    def forward():
        optimizer.zero_grad(set_to_none=True)
        loss[0] = compute(*next(turn))

    def update():
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()

    return [forward, lambda: loss[0].backward(), update]


SIDE = 2048  # of the matrices of a large product
PASS_BYTES = 1 << 29  # of each of the arrays of a pass over memory: far beyond any cache


def limits():
    """What this machine can do: a large product of NumPy's, and a pass over memory."""
    import torch

    a, b, out = np.ones((3, SIDE, SIDE), np.float32)
    x, y = torch.ones(2, PASS_BYTES // 4)
    return [lambda: np.matmul(a, b, out=out), lambda: torch.add(x, y, alpha=0.5, out=y)]


def timed_steps(make, steps, **arguments):
    """What a candidate reports: the seconds of each pass of each step, and its peak of memory."""
    import resource

    passes = globals()[make](**arguments)
    found = []
    for _ in range(2 + steps):
        marks = [time.perf_counter()]
        for one in passes:
            one()
            marks.append(time.perf_counter())
        found.append([stop - start for start, stop in itertools.pairwise(marks)])

    unit = 1e6 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"steps": found[2:], "peak": peak * arguments.get("processes", 1)}  # two warm up


# --------------------------------------------------------------------------------------------------
# The candidates take turns


def in_a_process(function, threads, **arguments):
    """What a function of this file returns, called in a process of its own, or in several."""
    processes = arguments.get("processes", 1)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = os.environ | dict.fromkeys(names, str(max(1, threads // processes)))
    command = ["mpiexec", "-n", str(processes)] if processes > 1 else []
    command += [sys.executable, __file__, "--child", function, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


TWO = ", two processes"
COMPARISON = """
| model | who | ms per step | forward / backward / update | peak MB | speed | memory | of limit |
|---|---|---|---|---|---|---|---|"""


def compare(name, options, machine_limits):
    """Measure a row of ROWS, and print a line for each candidate: a list of dicts."""
    row = ROWS[name]
    B, T, V, L, _, C = row
    weights = L * 12 * C * C + V * C
    flops = 6 * B * T * (weights + L * C * T)  # of attention's scores, the half not masked counts
    limit = flops / machine_limits["flops"] + 7 * 4 * weights / machine_limits["bandwidth"]
    steps = max(2, round(options.seconds / (2 * limit)))

    ours = {"make": "ours", "folder": TOP, "processes": 1}
    candidates = {}
    for recompute in options.recompute:
        label = f"train_gpt2.py --recompute {recompute}"
        candidates[label] = ours | {"recompute": recompute}
        if options.two_processes:
            candidates[label + TWO] = ours | {"recompute": recompute, "processes": 2}
    for version in options.against:
        candidates[f"commit {version}"] = ours | {"folder": folder_of(version)}
    for mode in options.torch:
        candidates[f"PyTorch {mode}"] = {"make": "pytorch", "compiled": mode == "compiled"}

    # For each round the passes of the median step, and the peak.
    passes, peaks = ({label: [] for label in candidates} for _ in range(2))
    for i in range(options.rounds):
        for label in candidates if i % 2 == 0 else reversed(candidates):
            run = {"row": row, "steps": steps} | candidates[label]
            found = in_a_process("timed_steps", options.threads, **run)
            passes[label].append(sorted(found["steps"], key=sum)[len(found["steps"]) // 2])
            peaks[label].append(found["peak"])

    base = [label for label in candidates if label.startswith("PyTorch")] or list(candidates)[:1]
    totals = {label: np.sum(passes[label], axis=1) for label in candidates}
    least = np.min([totals[label] for label in base], axis=0)
    leanest = np.min([peaks[label] for label in base], axis=0)
    spread = (0.5, 0, 1)  # the median of some ratios, the least and the greatest

    rows = []
    for label in candidates:
        middle = sorted(passes[label], key=sum)[options.rounds // 2]
        speed = np.quantile(least / totals[label], spread).tolist()
        memory = np.quantile(peaks[label] / leanest, spread).tolist()
        peak = statistics.median(peaks[label])
        rows.append({
            "row": row, "model": "d12" if name.startswith("d12") else name, "B": B, "T": T,
            "who": label, "seconds": sum(middle), "forward": middle[0], "backward": middle[1],
            "update": middle[2], "peak_mb": peak, "speed": speed, "memory": memory,
            "of_limit": limit / sum(middle),
        })  # fmt: skip
        parts = " / ".join(f"{part * 1e3:.0f}" for part in middle)
        ratios = " | ".join("{:.2f} ({:.2f} to {:.2f})".format(*of) for of in (speed, memory))
        numbers = f"{sum(middle) * 1e3:.1f} | {parts} | {peak:.0f} | {ratios}"
        print(f"| {name} | {label} | {numbers} | {limit / sum(middle):.0%} |", flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# A simulation of more cores

CORES = {str(n): [1.0] * n for n in (1, 2, 4, 8, 16)}
CORES["4 fast, 4 slow"] = [1.0] * 4 + [0.4] * 4
CALL = 50e-6  # seconds until the other threads of a call have begun
MEMORY_RATE = 2.5  # times one core's, which is all that many cores get where memory is the limit
AT_MEMORYS_RATE = ("adamw", "sum_of_squares", "residual_forward")
SIMULATION = """
| model | cores | ms per step | times as fast as one | work | where the time goes, ms | measured |
|---|---|---|---|---|---|---|"""
REPEATS = 4  # steps that are recorded


def record(row, cores):
    """For each number of cores what a step consists of: [(layer, is it parallel, seconds), ...].

    The work is cut for so many cores. Each task of each call of `parallel` is timed alone, on one
    thread, and so is what runs between the calls. Of some steps, the one of least work counts.
    """
    passes = ours(row, TOP)
    import train_gpt2 as gpt2

    clock = time.thread_time  # what other programs do meanwhile does not count
    events = []
    marks = [clock()]

    def between_the_calls():
        events.append(("between the calls", False, [clock() - marks[-1]]))
        marks[:] = [clock()]

    def parallel(task, pieces):
        between_the_calls()
        results = []
        for piece in pieces:
            results.append(task(piece))
            marks.append(clock())
        around = inspect.getclosurevars(task).nonlocals  # the layer that has been cut is there
        name = around.get("layer", task).__name__
        events.append((name, True, [b - a for a, b in itertools.pairwise(marks)]))
        marks[:] = [clock()]
        return results

    gpt2.parallel = parallel
    found = {n: [] for n in cores}
    for _ in range(REPEATS):
        for gpt2.THREADS in cores:
            events.clear()
            marks[:] = [clock()]
            for one in passes:
                one()
            between_the_calls()
            found[gpt2.THREADS].append(list(events))
    return {n: min(steps, key=seconds_of) for n, steps in found.items()}


def seconds_of(events):
    """The work of a step that `record` has taken down."""
    return sum(sum(seconds) for *_, seconds in events)


def simulated(events, paces):
    """{layer: seconds of a step on cores of these paces}. Whoever is free takes the next task."""
    step = {}
    for layer, parallel, tasks in events:
        free = [0.0] * (min(len(paces), len(tasks)) if parallel else 1)
        for task in tasks:
            first = free.index(min(free))
            free[first] += task / paces[first]
        took = max(free) + (CALL if len(free) > 1 else 0)
        if parallel and layer in AT_MEMORYS_RATE:
            took = max(took, sum(tasks) / MEMORY_RATE)
        step[layer] = step.get(layer, 0) + took
    return step


def simulate(name):
    """Print what a row of ROWS would take on more cores; measure it where there are as many."""
    cores = sorted({len(paces) for paces in CORES.values()})
    found = in_a_process("record", 1, row=ROWS[name], cores=cores)
    base = sum(simulated(found["1"], [1.0]).values())
    for label, paces in CORES.items():
        events = found[str(len(paces))]
        step = simulated(events, paces)
        total, work = sum(step.values()), seconds_of(events)
        measured = ""
        if label.isdecimal() and len(paces) <= (os.cpu_count() or 1):
            passes = {"make": "ours", "steps": REPEATS, "row": ROWS[name], "folder": TOP}
            steps = in_a_process("timed_steps", len(paces), **passes)["steps"]
            measured = f"{statistics.median(map(sum, steps)) * 1e3:.1f}"
        most = sorted(step, key=step.get, reverse=True)[:7]
        parts = ", ".join(f"{one} {step[one] * 1e3:.1f}" for one in most)
        numbers = f"{total * 1e3:.1f} | {base / total:.2f} | {work / base:.2f}"
        print(f"| {name} | {label} | {numbers} | {parts} | {measured} |", flush=True)


# --------------------------------------------------------------------------------------------------
# The machine, and the command line


def machine():
    """What all this is measured on: a dict."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError), open("/proc/cpuinfo", encoding="utf-8") as file:
        processor = re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)[1]

    blas = np.show_config("dicts")["Build Dependencies"]["blas"]
    kernels = ""
    with contextlib.suppress(AttributeError):  # of the BLAS in NumPy's wheels
        corename = ctypes.CDLL(np._core._multiarray_umath.__file__).scipy_openblas_get_corename64_
        corename.restype = ctypes.c_char_p
        kernels = f", kernels for {corename().decode()}"

    commit = ["git", "-C", TOP, "rev-parse", "--short", "HEAD"]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas['name']} {blas['version']}{kernels}",
        "torch": torch.__version__,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
    }


def measure_limits(threads):
    """The best rate of products, in FLOP/s, and that of memory, in B/s."""
    steps = in_a_process("timed_steps", threads, make="limits", steps=10)["steps"]
    product, memory = map(min, zip(*steps, strict=True))
    return {"flops": 2 * SIDE**3 / product, "bandwidth": 3 * PASS_BYTES / memory}


def folder_of(commit):
    """A new folder with the files of a commit."""
    folder = tempfile.mkdtemp()
    subprocess.run(["git", "-C", TOP, "archive", "-o", f"{folder}.tar", commit], check=True)
    shutil.unpack_archive(f"{folder}.tar", folder, filter="data")
    return folder


def main():
    if sys.argv[1:2] == ["--child"]:
        found = json.dumps(globals()[sys.argv[2]](**json.loads(sys.argv[3])))
        sys.stdout.write(found + "\n")  # at one go: the lines of several processes do not mix
        return

    sys.path.append(TOP)
    import train_gpt2 as gpt2

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--rows", default="", help=f"small, sizes, or some of {','.join(ROWS)}")
    add("--cores", action="store_true", help="simulate more cores")
    add("--against", nargs="*", default=[], metavar="COMMIT")
    add("--two_processes", action="store_true", help="of half the threads each")
    add("--recompute", type=int, nargs="+", default=[1], help="(default: 1)")
    add("--torch", nargs="*", default=["eager", "compiled"], help="its modes")
    add("--rounds", type=int, default=5, help="of taking turns")
    add("--seconds", type=float, default=4.0, help="of a turn, or two steps")
    add("--threads", type=int, default=gpt2.THREADS, help="for everybody")
    options = parser.parse_args()
    names = GROUPS.get(options.rows, options.rows).split(",")
    if options.cores:
        print(SIMULATION, flush=True)
        for name in names:
            simulate(name)
        return

    # In a process of its own, too: a child's peak of memory is never less than its parent's.
    found = {"machine": in_a_process("machine", options.threads)}
    found["limits"] = measure_limits(options.threads)
    print(json.dumps(found), COMPARISON, sep="\n", flush=True)
    compared = [compare(name, options, found["limits"]) for name in names]
    if options.rows == "sizes":
        path, found = "sizes.json", []
        for rows in compared:
            quickest = {"row": rows[0]["row"]}
            for row in rows:
                kind = "PyTorch" if row["who"].startswith("PyTorch") else "one process"
                kind = TWO if row["who"].endswith(TWO) else kind
                quickest[kind] = min(row["seconds"] * 1e3, quickest.get(kind, float("inf")))
            found.append(quickest)
    elif options.rows == "":
        found["training"] = list(itertools.chain(*compared))
        kernels = found["machine"]["blas"].rpartition("kernels for ")[2]
        words = f"{found['machine']['processor']} {kernels} {options.threads} threads".lower()
        path = "benchmarks/" + re.sub(r"[^a-z0-9]+", "-", words).strip("-") + ".json"
    else:
        return
    with open(os.path.join(TOP, "figures", path), "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    print(f"written to figures/{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
