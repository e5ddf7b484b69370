"""benchmark"""

import argparse
import importlib.util
import inspect
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import timeit

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt2 as gpt2
from test_gpt2 import TorchGPT2, torch_heads

# --------------------------------------------------------------------------------------------------
# The benchmark: python test_gpt2.py --benchmark
#
# Whatever is compared runs in a process of its own, which prints one line of JSON, and the
# candidates take turns, round after round, so that what else the machine is doing strikes all
# alike. The reference is the PyTorch model above, at its best: scaled_dot_product_attention, fused
# AdamW, eager and compiled.


def steps_for(tokens):
    """(to warm up, timed): how many steps of that many tokens a process makes."""
    return (2, 8) if tokens < 1024 else (1, 4) if tokens < 4096 else (1, 2)


def random_batch(config, B, T):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, B, T))
    return tokens[0], tokens[1]


def fresh_config(name):
    C = gpt2.FRESH[name]
    return gpt2.GPT2Config(num_layers=int(name[1:]), num_heads=C // 64, channels=C)


def peak_mb():
    """The most memory that this process ever had in RAM."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1e6 if sys.platform == "darwin" else 1024
    )


def timed_steps(passes, steps, started):
    """steps: how many to warm up, how many to time, each of them forward, backward, update. What a
    child reports; with `started`, the time when the process was started, only the first step."""
    times = []
    for _ in range(1 if started else sum(steps)):
        marks = [time.perf_counter()]
        for one in passes:
            one()
            marks.append(time.perf_counter())
        times.append([b - a for a, b in zip(marks, marks[1:], strict=False)])
    return {
        "times": times if started else times[steps[0] :],
        "peak": peak_mb(),
        "since_start": started and time.time() - started,
    }


def child_train(model, B, T, steps, recompute=1, weights=None, started=None):
    config, step = fresh_config(model), itertools.count(1)
    inputs, targets = random_batch(config, B, T)
    ours = (
        gpt2.GPT2.from_pretrained(weights, B, T, recompute)
        if weights
        else gpt2.GPT2(config, B, T, recompute=recompute)
    )
    return timed_steps(
        [
            lambda: ours.forward(inputs, targets),
            ours.backward,
            lambda: ours.update(1e-4, step=next(step)),
        ],
        steps,
        started,
    )


def child_train_torch(model, B, T, steps, compiled=False, weights=None, started=None):
    config, loss = fresh_config(model), [None]
    x, y = map(torch.from_numpy, random_batch(config, B, T))
    params = {
        name: np.zeros(shape, np.float32) for name, shape in gpt2.param_shapes(config).items()
    }
    if not weights:
        gpt2.init_weights(params, 1337)
    theirs = TorchGPT2(config, params)
    del params
    if weights:
        theirs.load_state_dict(
            torch.load(os.path.join(weights, "model.pt"), weights_only=True, mmap=True)
        )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    compute = torch.compile(theirs) if compiled else theirs

    def forward():
        optimizer.zero_grad(set_to_none=True)
        loss[0] = compute(x, y)

    return timed_steps([forward, lambda: loss[0].backward(), optimizer.step], steps, started)


@torch.no_grad()
def torch_generate(theirs, tokens, n):
    """Greedy continuation with a key/value cache, so that PyTorch too computes one position per
    token."""
    caches, position, new = [None] * len(theirs.blocks), 0, torch.tensor([tokens])
    for _ in range(n):
        x = theirs.wte(new) + theirs.wpe.weight[position : position + new.shape[1]]
        for i, block in enumerate(theirs.blocks):
            q, k, v = torch_heads(block.qkv(block.ln1(x)), block.NH)
            if caches[i]:
                k, v = torch.cat([caches[i][0], k], 2), torch.cat([caches[i][1], v], 2)
            caches[i] = (k, v)
            att = F.scaled_dot_product_attention(q, k, v, is_causal=new.shape[1] > 1)
            x = x + block.attproj(att.transpose(1, 2).flatten(2))
            x = x + block.fcproj(F.gelu(block.fc(block.ln2(x)), approximate="tanh"))
        position += new.shape[1]
        new = F.linear(theirs.lnf(x[:, -1:]), theirs.wte.weight).argmax(-1)
        yield int(new)


def timed_tokens(run, tokens):
    """Seconds for that many new tokens, after eight to warm up."""
    run(8)
    began = time.perf_counter()
    run(tokens)
    return {"seconds": time.perf_counter() - began, "peak": peak_mb()}


def child_generate(tokens):
    ours = gpt2.GPT2(gpt2.GPT2Config(), 1, 1024, recompute=4)
    return timed_tokens(lambda n: list(ours.generate([50256], n, temperature=0)), tokens)


def child_generate_torch(tokens):
    config = gpt2.GPT2Config()
    params = {
        name: np.zeros(shape, np.float32) for name, shape in gpt2.param_shapes(config).items()
    }
    gpt2.init_weights(params, 1337)
    theirs = TorchGPT2(config, params)
    return timed_tokens(lambda n: list(torch_generate(theirs, [50256], n)), tokens)


def child_generate_transformers(tokens):
    import transformers

    theirs, prompt = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval(),
        torch.tensor([[50256]]),
    )
    return timed_tokens(
        lambda n: theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
            pad_token_id=0,
        ),
        tokens,
    )


def child_limits():
    """What this machine can do: the best rate of sgemm, in FLOP/s, and of streaming through memory,
    in B/s."""
    rng, rates = np.random.default_rng(0), []
    for M, K, N in ((256, 768, 3072), (1024, 768, 3072), (2048, 2048, 2048)):
        a, b, out = (
            rng.random((M, K), np.float32),
            rng.random((K, N), np.float32),
            np.empty((M, N), np.float32),
        )
        rates += [
            2
            * M
            * K
            * N
            / min(timeit.repeat(lambda: np.matmul(a, b, out=out), number=4, repeat=12))
            * 4
        ]
    x, y = torch.ones(1 << 27), torch.ones(1 << 27)  # 512 MB each: far beyond any cache
    seconds = min(timeit.repeat(lambda: torch.add(x, y, alpha=0.5, out=y), number=1, repeat=6))
    return {"flops": max(rates), "bandwidth": 3 * x.nbytes / seconds}


def in_a_process(threads, function, **arguments):
    """Call one of the child_ functions above in a process of its own. Ours see nothing of this file
    but what they need, so that they don't pay for importing PyTorch."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONPATH": os.path.dirname(os.path.abspath(__file__)),
    }
    program = "import test_gpt2\nfrom test_gpt2 import *\n"
    if function in (child_train, child_generate):
        needed = (fresh_config, random_batch, peak_mb, timed_steps, timed_tokens, function)
        program = (
            "import itertools, sys, time\nimport train_gpt2 as gpt2\nimport numpy as np\n"
            + "\n".join(map(inspect.getsource, needed))
        )
    program += f"\nimport json\nprint(json.dumps({function.__name__}(**json.loads({json.dumps(arguments)!r}))))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def matmul_flops(config, B, T):
    """Of one training step: two per weight and token forward, twice that backward; attention's
    causal half."""
    weights = config.num_layers * 12 * config.channels**2 + config.vocab_size * config.channels
    return 6 * B * T * (weights + config.num_layers * config.channels * T)


def machine(threads):
    """One paragraph on what all this was measured on."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next(
                (line.split(":")[1].strip() for line in f if line.startswith("model name")), cpu
            )
    try:
        import threadpoolctl

        blas = "; ".join(
            f"{b['internal_api']} {b['version']} {b.get('architecture', '')}"
            for b in threadpoolctl.threadpool_info()
            if b["user_api"] == "blas"
        )
    except ImportError:
        blas = "{name} {version}".format(**np.show_config("dicts")["Build Dependencies"]["blas"])
    return (
        f"{cpu}, {gpt2.CPUS} cores, {threads} threads; Python {platform.python_version()}, NumPy {np.__version__} "
        f"({blas}), PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}); "
        f"{time.strftime('%Y-%m-%d')}"
    )


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def median_step(runs):
    """The median over all timed steps of several processes: (total, forward, backward, update), and
    the least total."""
    times = sorted([sum(t), *t] for run in runs for t in run["times"])
    return times[len(times) // 2], times[0][0]


def run_training(shape, rounds, threads, kinds, model="d12"):
    """{label: what its processes report} for one shape (B, T); each kind is (label, arguments of
    child_train)."""
    (B, T), runs = shape, {label: [] for label, _ in kinds}
    for i in range(rounds):
        for label, arguments in kinds:
            say(f"  {model}, B={B}, T={T}, {threads} threads, round {i + 1} of {rounds}: {label}")
            child = child_train_torch if label.startswith("PyTorch") else child_train
            runs[label].append(
                in_a_process(
                    threads, child, B=B, T=T, model=model, steps=steps_for(B * T), **arguments
                )
            )
    return runs


def limit_of(config, B, T, limits):
    """Seconds that a step would take at the machine's limits."""
    n = 4 * gpt2.count(gpt2.param_shapes(config))
    return matmul_flops(config, B, T) / limits["flops"] + 7 * n / limits["bandwidth"]


def compare_training(shape, rounds, threads, limits, kinds):
    """Print the rows of the table for one shape."""
    (B, T), runs = shape, run_training(shape, rounds, threads, kinds)
    theirs = [label for label in runs if label.startswith("PyTorch")]
    fastest = min(median_step(runs[label])[0][0] for label in theirs)
    leanest = min(min(run["peak"] for run in runs[label]) for label in theirs)
    for label in runs:
        (total, forward, backward, update), least = median_step(runs[label])
        peak = min(run["peak"] for run in runs[label])
        print(
            f"| {B}, {T} | {label} | {total * 1e3:.0f} ({least * 1e3:.0f}) | {forward * 1e3:.0f} / {backward * 1e3:.0f} / "
            f"{update * 1e3:.0f} | {B * T / total:.0f} | {peak:.0f} | {fastest / total:.2f} | {peak / leanest:.2f} | "
            f"{limit_of(fresh_config('d12'), B, T, limits) / total:.0%} |",
            flush=True,
        )


def how_cost_grows(threads, limits, ours):
    """Print what a token costs as sequences get longer, and as the model gets larger."""
    print(
        "\n| train_gpt2.py | B, T | ms per step, median | ms per token | GFLOP per token | of the limit |\n"
        "|---|---|---|---|---|---|"
    )
    for model, B, T in [("d12", 1024 // T, T) for T in (64, 128, 256, 512, 1024)] + [
        (m, 4, 64) for m in ("d6", "d12", "d24")
    ]:
        [runs] = run_training((B, T), 1, threads, [ours], model).values()
        config, total = fresh_config(model), median_step(runs)[0][0]
        print(
            f"| {model} | {B}, {T} | {total * 1e3:.0f} | {total / B / T * 1e3:.2f} | "
            f"{matmul_flops(config, B, T) / B / T / 1e9:.2f} | {limit_of(config, B, T, limits) / total:.0%} |",
            flush=True,
        )


def compare_generation(rounds, threads, limits):
    weights, found = 4 * gpt2.count(gpt2.param_shapes(gpt2.GPT2Config())), {}
    kinds = {"train_gpt2.py": child_generate, "PyTorch with a cache": child_generate_torch}
    if importlib.util.find_spec("transformers"):
        kinds["Hugging Face generate"] = child_generate_transformers
    for i in range(rounds):
        for kind, child in kinds.items():
            say(f"  generation, round {i + 1} of {rounds}: {kind}")
            found.setdefault(kind, []).append(in_a_process(threads, child, tokens=256))
    print(
        "\n| generation, 256 tokens | tokens/s | of the bandwidth limit | peak MB |\n|---|---|---|---|"
    )
    for kind, runs in found.items():
        rate = 256 / sorted(run["seconds"] for run in runs)[len(runs) // 2]
        print(
            f"| {kind} | {rate:.1f} | {rate * weights / limits['bandwidth']:.0%} | {runs[0]['peak']:.0f} |",
            flush=True,
        )


def compare_start(threads):
    """From the start of the process to the end of its first step at B=4, T=64, with weights from
    disk."""
    seconds = {child_train: [], child_train_torch: []}
    with tempfile.TemporaryDirectory() as folder:
        model = gpt2.GPT2(gpt2.GPT2Config(), 1, 1)
        model.save_pretrained(folder)
        torch.save(
            TorchGPT2(model.config, model.params).state_dict(), os.path.join(folder, "model.pt")
        )
        del model
        for i in range(3):
            for child in seconds:
                say(
                    f"  from the start of the process to the end of the first step, round {i + 1} of 3: {child.__name__}"
                )
                seconds[child].append(
                    in_a_process(
                        threads,
                        child,
                        model="d12",
                        B=4,
                        T=64,
                        steps=None,
                        weights=folder,
                        started=time.time(),
                    )["since_start"]
                )
    ours, theirs = (sorted(times)[1] for times in seconds.values())
    print(
        f"\nFrom the start of the process to the end of the first step, B=4, T=64, weights from disk (median of 3): "
        f"train_gpt2.py {ours:.1f} s, PyTorch eager {theirs:.1f} s"
    )


TABLE = """
| B, T | who | ms per step, median (least) | forward / backward / update | tokens/s | peak MB | speed | memory | of the limit |
|---|---|---|---|---|---|---|---|---|"""


def benchmark(arguments):
    """Speed: times PyTorch's fastest mode. Memory: times PyTorch's leanest. The limit: see the last
    line."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    began, threads = time.time(), arguments.threads
    limits = in_a_process(threads, child_limits)
    print(machine(threads) + "\n" + TABLE, flush=True)
    ours = [(f"train_gpt2.py --recompute {r}", {"recompute": r}) for r in arguments.recompute]
    eager, compiled = ("PyTorch eager", {}), ("PyTorch compiled", {"compiled": True})
    for shape in shapes:
        long = shape[0] * shape[1] >= 1024  # seconds per step: one round must do
        compare_training(
            shape, 1 if long else arguments.rounds, threads, limits, [*ours, eager, compiled]
        )
    if arguments.full:
        print("\nOne thread" + TABLE)
        compare_training((4, 64), 1, 1, in_a_process(1, child_limits), [ours[0], eager])
        how_cost_grows(threads, limits, ours[0])
    if arguments.full or arguments.generation:
        compare_generation(arguments.rounds, threads, limits)
    if arguments.full:
        compare_start(threads)
    print(
        f"\nThe limit: all matrix products at {limits['flops'] / 1e9:.0f} GFLOP/s, the best that NumPy's matmul showed here, "
        f"and then AdamW's seven passes over the parameters at {limits['bandwidth'] / 1e9:.1f} GB/s."
    )
    say(f"done in {time.time() - began:.0f} s")


def main():
    parser = argparse.ArgumentParser(
        description="The proofs run with python -m pytest; this measures."
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="measure speed and memory beside PyTorch"
    )
    parser.add_argument(
        "--shapes",
        default="",
        help="B x T, separated by commas (default: 4x64,1x1024; with --full also 4x1024)",
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often the candidates take turns (default: 2)"
    )
    parser.add_argument(
        "--threads", type=int, default=gpt2.CPUS, help="for everybody (default: all cores)"
    )
    parser.add_argument(
        "--recompute", type=int, nargs="+", default=[1, 3], help="our modes (default: 1 3)"
    )
    parser.add_argument("--generation", action="store_true", help="also measure generation")
    parser.add_argument(
        "--full", action="store_true", help="everything: under 15 minutes on two cores"
    )
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or "4x64,1x1024" + (",4x1024" if arguments.full else "")
    if arguments.benchmark:
        benchmark(arguments)
    else:
        parser.print_help()


if __name__ == "__main__":
    main()
