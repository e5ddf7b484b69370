"""
Speed and memory beside PyTorch: python tests/benchmark.py --help

Whatever is compared runs in a process of its own, which prints one line of JSON. The candidates
take turns, round after round, so that what else the machine is doing strikes all alike. The
reference is the PyTorch model of test_gpt2.py at its best: scaled_dot_product_attention, fused
AdamW, eager and compiled, with the same shapes, the same float32 and the same number of threads.

The results are printed as tables, and written as JSON to figures/benchmarks, from which
figures/make_figures.py makes the table and the chart of the README.
"""

import argparse
import contextlib
import ctypes
import glob
import importlib.util
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit

HERE = os.path.dirname(os.path.abspath(__file__))
TOP = os.path.dirname(HERE)
sys.path.append(TOP)  # a folder in PYTHONPATH comes first: see in_a_process

import train_gpt2 as gpt2

# isort: split

import numpy as np

# --------------------------------------------------------------------------------------------------
# What is measured. Each of these functions is called in a process of its own. Those that need
# PyTorch import it themselves, so that ours do not pay for it.


def steps_for(tokens):
    """(to warm up, timed): how many steps of that many tokens a process makes."""
    if tokens < 1024:
        return 2, 8
    if tokens < 4096:
        return 1, 4
    return 1, 2


def random_batch(config, B, T):
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, B, T))
    return tokens[0], tokens[1]


SIZES = {"d6": (6, 384), "d12": (12, 768), "d24": (24, 1024), "d36": (36, 1280), "d48": (48, 1600)}


def fresh_config(name):
    L, C = SIZES[name]
    return gpt2.GPT2Config(num_layers=L, num_heads=C // 64, channels=C)


def random_params(config):
    params = {}
    for name, shape in gpt2.param_shapes(config).items():
        params[name] = np.zeros(shape, np.float32)
    gpt2.init_weights(params, 1337)
    return params


def peak_mb():
    """The most memory that this process ever had in RAM, in MB of 1,000,000 bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def timed_steps(passes, steps, started):
    """Call the passes (forward, backward, update), step after step, and time each.

    steps     (to warm up, timed)
    started   the time when the process was started: then only one step is made
    """
    times = []
    for _ in range(1 if started else sum(steps)):
        marks = [time.perf_counter()]
        for one in passes:
            one()
            marks.append(time.perf_counter())
        times.append(np.diff(marks).tolist())

    since_start = time.time() - started if started else None
    timed = times if started else times[steps[0] :]
    return {"times": timed, "peak": peak_mb(), "since_start": since_start}


def train(model, B, T, steps, recompute=1, weights=None, started=None):
    config = fresh_config(model)
    numbers = itertools.count(1)
    inputs, targets = random_batch(config, B, T)
    if weights:
        ours = gpt2.GPT2.from_pretrained(weights, B, T, recompute)
    else:
        ours = gpt2.GPT2(config, B, T, recompute=recompute)

    passes = [
        lambda: ours.forward(inputs, targets),
        ours.backward,
        lambda: ours.update(1e-4, step=next(numbers)),
    ]
    return timed_steps(passes, steps, started)


def train_torch(model, B, T, steps, compiled=False, weights=None, started=None):
    import torch

    from test_gpt2 import TorchGPT2

    config = fresh_config(model)
    x, y = map(torch.from_numpy, random_batch(config, B, T))
    theirs = TorchGPT2(config, random_params(config))
    if weights:
        path = os.path.join(weights, "model.pt")
        theirs.load_state_dict(torch.load(path, weights_only=True, mmap=True))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    compute = torch.compile(theirs) if compiled else theirs
    loss = [None]

    def forward():
        optimizer.zero_grad(set_to_none=True)
        loss[0] = compute(x, y)

    return timed_steps([forward, lambda: loss[0].backward(), optimizer.step], steps, started)


def torch_continue(theirs, tokens, n):
    """n greedy tokens, with the keys and values of earlier ones kept, as ours keep them."""
    import torch
    import torch.nn.functional as F

    from test_gpt2 import torch_heads

    kept = [None] * len(theirs.blocks)
    position = 0
    new = torch.tensor([tokens])
    for _ in range(n):
        x = theirs.wte(new) + theirs.wpe.weight[position : position + new.shape[1]]
        for i, block in enumerate(theirs.blocks):
            q, k, v = torch_heads(block.qkv(block.ln1(x)), block.NH)
            if kept[i]:
                k = torch.cat([kept[i][0], k], 2)
                v = torch.cat([kept[i][1], v], 2)
            kept[i] = (k, v)
            att = F.scaled_dot_product_attention(q, k, v, is_causal=new.shape[1] > 1)
            x = x + block.attproj(att.transpose(1, 2).flatten(2))
            x = x + block.fcproj(F.gelu(block.fc(block.ln2(x)), approximate="tanh"))
        position += new.shape[1]
        new = F.linear(theirs.lnf(x[:, -1:]), theirs.wte.weight).argmax(-1)


def timed_tokens(run, tokens):
    """Seconds for that many new tokens, after eight to warm up."""
    run(8)
    began = time.perf_counter()
    run(tokens)
    return {"seconds": time.perf_counter() - began, "peak": peak_mb()}


def generate(tokens):
    ours = gpt2.GPT2(gpt2.GPT2Config(), 1, 1024, training=False)
    return timed_tokens(lambda n: list(ours.generate([50256], n, temperature=0)), tokens)


def generate_torch(tokens):
    import torch

    from test_gpt2 import TorchGPT2

    config = gpt2.GPT2Config()
    theirs = TorchGPT2(config, random_params(config))
    with torch.no_grad():
        return timed_tokens(lambda n: torch_continue(theirs, [50256], n), tokens)


def generate_transformers(tokens):
    import torch
    import transformers

    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    prompt = torch.tensor([[50256]])

    def run(n):
        theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=n,
            max_new_tokens=n,
            pad_token_id=0,
        )

    return timed_tokens(run, tokens)


def attention(B, T):
    """The least and the median seconds of one layer's attention, forward and backward (124M)."""
    C, NH = 768, 12
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((B, T, 3 * C), np.float32)
    dout = rng.standard_normal((B, T, C), np.float32)
    out, dqkv = np.empty_like(dout), np.empty_like(qkv)
    lse = np.empty((B, T, NH), np.float32)

    def both():
        gpt2.attention_forward(out, lse, qkv, NH)
        gpt2.attention_backward(dqkv, dout, out, lse, qkv, NH)

    both()
    times = timeit.repeat(both, number=1, repeat=12)
    return {"least": min(times), "median": statistics.median(times)}


def usual_examples(n):
    """Made-up examples with HellaSwag's usual lengths: 20 to 110 tokens, endings of 5 to 40."""
    rng = np.random.default_rng(0)
    examples = []
    for _ in range(n):
        context = rng.integers(0, 50257, rng.integers(20, 111)).tolist()
        endings = [rng.integers(0, 50257, rng.integers(5, 41)).tolist() for _ in range(4)]
        examples.append((context, endings))
    return examples


def hellaswag(many):
    """Seconds for some examples, in turns: the plain way and by token_losses.

    The plain way is a forward pass on all four sequences, each from its beginning.
    """
    config = gpt2.GPT2Config()
    model = gpt2.GPT2(config, 4, 160, training=False)
    memory = model.blob[model.flat.size :]

    def plain(context, endings):
        longest = max(map(len, endings))
        sequences = [context + ending + [0] * (longest - len(ending)) for ending in endings]
        tokens = np.array(sequences)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
        shapes = gpt2.act_shapes(config, *inputs.shape, training=False)
        model.acts = gpt2.carve(memory, shapes)  # a batch has another length each time
        losses = np.empty(targets.shape, np.float32)
        model.classifier(losses, model.forward_tokens(inputs), targets)
        n = len(context) - 1
        return [losses[i, n : n + len(ending)].copy() for i, ending in enumerate(endings)]

    ways = {"plain": plain, "ours": model.token_losses}
    seconds = dict.fromkeys(ways, 0.0)
    for number, example in enumerate(usual_examples(many + 2)):
        found = []
        for way, answer in ways.items():
            began = time.perf_counter()
            found.append(np.concatenate(answer(*example)))
            if number >= 2:  # the first two warm up
                seconds[way] += time.perf_counter() - began
        assert np.allclose(*found, rtol=1e-4)
    return seconds


def best_product_rate():
    """The best rate of NumPy's products of the sizes that occur, in FLOP/s."""
    rng = np.random.default_rng(0)
    rates = []
    for M, K, N in ((256, 768, 3072), (1024, 768, 3072), (2048, 2048, 2048)):
        a = rng.random((M, K), np.float32)
        b = rng.random((K, N), np.float32)
        out = np.empty((M, N), np.float32)
        times = timeit.repeat(
            "np.matmul(a, b, out=out)",
            number=4,
            repeat=12,
            globals={"np": np, "a": a, "b": b, "out": out},
        )
        rates.append(2 * M * K * N * 4 / min(times))
    return max(rates)


def limits():
    """What this machine can do: the best rate of products, in FLOP/s, and of memory, in B/s."""
    import torch

    x, y = torch.ones(1 << 27), torch.ones(1 << 27)  # 512 MB each: far beyond any cache
    seconds = min(timeit.repeat(lambda: torch.add(x, y, alpha=0.5, out=y), number=1, repeat=6))
    return {"flops": best_product_rate(), "bandwidth": 3 * x.nbytes / seconds}


CHILDREN = {
    "train": train,
    "train_torch": train_torch,
    "generate": generate,
    "generate_torch": generate_torch,
    "generate_transformers": generate_transformers,
    "attention": attention,
    "hellaswag": hellaswag,
    "limits": limits,
}

# --------------------------------------------------------------------------------------------------
# Processes


def busy_seconds():
    """Seconds that all cores have worked since the machine was started. None where unknown."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def in_a_process(threads, child, folder=TOP, **arguments):
    """What one of CHILDREN returns, called in a process of its own that imports from folder."""
    environment = dict(os.environ)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = str(threads)
    environment["PYTHONPATH"] = folder
    command = [sys.executable, os.path.abspath(__file__), "--child", child]
    command.append(json.dumps(arguments))

    began, busy_before, own_before = time.time(), busy_seconds(), sum(os.times()[:4])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    if busy_before is not None:
        others = busy_seconds() - busy_before - (sum(os.times()[:4]) - own_before)
        share = others / (time.time() - began) / (os.cpu_count() or 1)
        if share > 0.05:
            note(f"  warning: other programs took {share:.0%} of the cores in this run")
    return json.loads(done.stdout.splitlines()[-1])


def note(text):
    print(text, file=sys.stderr, flush=True)


def processor():
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"^model name\s*: (.*)$", file.read(), re.MULTILINE)[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def blas():
    """The name, version and kernel of the BLAS that NumPy uses."""
    info = np.show_config("dicts")["Build Dependencies"]["blas"]
    name = f"{info['name']} {info['version']}"
    folder = os.path.dirname(np.__file__)
    paths = glob.glob(folder + "/../numpy.libs/*openblas*") + glob.glob(folder + "/.dylibs/*blas*")
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):
            corename = ctypes.CDLL(path).scipy_openblas_get_corename64_
            corename.restype = ctypes.c_char_p
            return f"{name}, kernels for {corename().decode()}"
    return name


def commit():
    """The first digits of the commit that is measured, or nothing."""
    command = ["git", "-C", TOP, "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def machine(threads):
    """What all this was measured on: a dict."""
    import torch

    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas(),
        "torch": torch.__version__,
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


# --------------------------------------------------------------------------------------------------
# Tables


def matmul_flops(config, B, T):
    """Of one training step: two per weight and token forward, twice that backward.

    Of attention's scores, the half that is not masked counts.
    """
    weights = config.num_layers * 12 * config.channels**2 + config.vocab_size * config.channels
    return 6 * B * T * (weights + config.num_layers * config.channels * T)


def limit_of(config, B, T, machine_limits):
    """Seconds that a step would take at the machine's limits.

    All products at the best rate, then the seven passes over memory that AdamW can't do without.
    """
    nbytes = 4 * gpt2.count(gpt2.param_shapes(config))
    products = matmul_flops(config, B, T) / machine_limits["flops"]
    return products + 7 * nbytes / machine_limits["bandwidth"]


def step_seconds(run):
    """The median step of one process: (total, forward, backward, update)."""
    return sorted([sum(times), *times] for times in run["times"])[len(run["times"]) // 2]


def spread(ratios):
    """A ratio's median, least and greatest over the rounds."""
    return [statistics.median(ratios), min(ratios), max(ratios)]


def as_text(ratio):
    middle, least, greatest = ratio
    return f"{middle:.2f} ({least:.2f} to {greatest:.2f})"


def take_turns(candidates, rounds, threads, what):
    """{label: [what its process reports, for each round]}. A candidate is (child, arguments)."""
    runs = {label: [] for label in candidates}
    for i in range(rounds):
        for label, (child, arguments) in candidates.items():
            note(f"  {what}, round {i + 1} of {rounds}: {label}")
            runs[label].append(in_a_process(threads, child, **arguments))
    return runs


def compare_training(B, T, options, machine_limits, model="d12"):
    """One row for each candidate: a list of dicts."""
    shape = {"model": model, "B": B, "T": T, "steps": steps_for(B * T)}
    candidates = {}
    for recompute in options.recompute:
        label = f"train_gpt2.py --recompute {recompute}"
        candidates[label] = ("train", shape | {"recompute": recompute})
    if options.against:
        candidates[options.against] = ("train", shape | {"folder": options.against})
    candidates["PyTorch eager"] = ("train_torch", shape)
    candidates["PyTorch compiled"] = ("train_torch", shape | {"compiled": True})
    runs = take_turns(candidates, options.rounds, options.threads, f"{model}, B={B}, T={T}")

    seconds, peaks = {}, {}
    for label, of_label in runs.items():
        seconds[label] = [step_seconds(run) for run in of_label]
        peaks[label] = [run["peak"] for run in of_label]
    theirs = [label for label in candidates if label.startswith("PyTorch")]

    rows = []
    for label in candidates:
        speeds, memories = [], []
        for i in range(options.rounds):
            fastest = min(seconds[other][i][0] for other in theirs)
            leanest = min(peaks[other][i] for other in theirs)
            speeds.append(fastest / seconds[label][i][0])
            memories.append(peaks[label][i] / leanest)
        total, forward, backward, update = sorted(seconds[label])[options.rounds // 2]
        rows.append({
            "model": model, "B": B, "T": T, "who": label,
            "seconds": total, "forward": forward, "backward": backward, "update": update,
            "peak_mb": statistics.median(peaks[label]),
            "speed": spread(speeds), "memory": spread(memories),
            "of_limit": limit_of(fresh_config(model), B, T, machine_limits) / total,
        })  # fmt: skip
    return rows


TRAINING = """
| model | B, T | who | ms per step | forward / backward / update | tokens/s | peak MB | \
speed | memory | of the limit |
|---|---|---|---|---|---|---|---|---|---|"""


def print_training(row):
    parts = " / ".join(f"{row[name] * 1e3:.0f}" for name in ("forward", "backward", "update"))
    rate = row["B"] * row["T"] / row["seconds"]
    print(
        f"| {row['model']} | {row['B']}, {row['T']} | {row['who']} | {row['seconds'] * 1e3:.0f} | "
        f"{parts} | {rate:.0f} | {row['peak_mb']:.0f} | {as_text(row['speed'])} | "
        f"{as_text(row['memory'])} | {row['of_limit']:.0%} |",
        flush=True,
    )


def compare_generation(options, machine_limits):
    candidates = {"train_gpt2.py": ("generate", {"tokens": 256})}
    if options.against:
        candidates[options.against] = ("generate", {"tokens": 256, "folder": options.against})
    candidates["PyTorch with a cache"] = ("generate_torch", {"tokens": 256})
    if importlib.util.find_spec("transformers"):
        candidates["Hugging Face generate"] = ("generate_transformers", {"tokens": 256})
    runs = take_turns(candidates, options.rounds, options.threads, "generation")

    weights = 4 * gpt2.count(gpt2.param_shapes(gpt2.GPT2Config()))
    rows = []
    for label, of_label in runs.items():
        rates = [256 / run["seconds"] for run in of_label]
        rows.append({
            "who": label,
            "tokens_per_second": spread(rates),
            "of_bandwidth": statistics.median(rates) * weights / machine_limits["bandwidth"],
            "peak_mb": statistics.median(run["peak"] for run in of_label),
        })  # fmt: skip
    return rows


def print_generation(rows):
    print("\n| generation, 256 tokens | tokens/s | of the bandwidth | peak MB |\n|---|---|---|---|")
    for row in rows:
        middle, least, greatest = row["tokens_per_second"]
        print(
            f"| {row['who']} | {middle:.1f} ({least:.1f} to {greatest:.1f}) | "
            f"{row['of_bandwidth']:.0%} | {row['peak_mb']:.0f} |"
        )


def attention_times(options, machine_limits):
    """Attention's time over that of its products at the best rate: a list of dicts."""
    rows = []
    for B, T in ((4, 64), (1, 1024), (4, 1024)):
        runs = [in_a_process(options.threads, "attention", B=B, T=T) for _ in range(options.rounds)]
        # two products forward, five backward, each over the half that is not masked
        products = 7 * B * T * T * 768 / machine_limits["flops"]
        seconds = statistics.median(run["median"] for run in runs)
        rows.append({"B": B, "T": T, "seconds": seconds, "of_products": seconds / products})
    return rows


def print_attention(rows):
    print("\n| attention, one layer | ms, both passes | times its products |\n|---|---|---|")
    for row in rows:
        print(f"| {row['B']}, {row['T']} | {row['seconds'] * 1e3:.1f} | {row['of_products']:.2f} |")


def compare_start(options):
    """Seconds from the start of a process to the end of its first step, weights from disk."""
    import torch

    from test_gpt2 import TorchGPT2

    with tempfile.TemporaryDirectory() as folder:
        model = gpt2.GPT2(gpt2.GPT2Config(), 1, 1)
        model.save_pretrained(folder)
        reference = TorchGPT2(model.config, model.params)
        torch.save(reference.state_dict(), os.path.join(folder, "model.pt"))
        del model, reference

        seconds = {"train": [], "train_torch": []}
        for i in range(3):
            for child in seconds:
                note(f"  the first step, round {i + 1} of 3: {child}")
                run = in_a_process(
                    options.threads, child, model="d12", B=4, T=64, steps=None,
                    weights=folder, started=time.time(),
                )  # fmt: skip
                seconds[child].append(run["since_start"])
    return {child: statistics.median(times) for child, times in seconds.items()}


# --------------------------------------------------------------------------------------------------
# The command line


def measure(options):
    """Print the tables, and return all of it as a dict."""
    machine_limits = in_a_process(options.threads, "limits")
    found = {"machine": machine(options.threads), "limits": machine_limits, "training": []}
    print(", ".join(f"{name} {value}" for name, value in found["machine"].items()))
    print(
        f"the limit: products at {machine_limits['flops'] / 1e9:.0f} GFLOP/s, the best that NumPy "
        f"showed here, then AdamW's seven passes at {machine_limits['bandwidth'] / 1e9:.0f} GB/s"
    )

    print(TRAINING, flush=True)
    shapes = [(options.model, *shape) for shape in options.shapes]
    if options.full:
        shapes += [("d12", 16, 64), ("d12", 4, 256), ("d6", 4, 64), ("d24", 4, 64)]
    for model, B, T in shapes:
        for row in compare_training(B, T, options, machine_limits, model):
            found["training"].append(row)
            print_training(row)

    found["attention"] = attention_times(options, machine_limits)
    print_attention(found["attention"])
    if options.full or options.generation:
        found["generation"] = compare_generation(options, machine_limits)
        print_generation(found["generation"])
    if options.full or options.hellaswag:
        runs = [in_a_process(options.threads, "hellaswag", many=40) for _ in range(options.rounds)]
        found["hellaswag"] = {
            "ratio": spread([run["ours"] / run["plain"] for run in runs]),
            "seconds_per_example": statistics.median(run["ours"] / 40 for run in runs),
        }
        ratio, seconds = found["hellaswag"].values()
        print(f"\nHellaSwag, 124M: {seconds:.3f} s per example, {as_text(ratio)} of the plain way")
    if options.full:
        found["start"] = compare_start(options)
        print("\nthe first step is done after", found["start"])
    return found


def read_shapes(text):
    """ "4x64,1x1024" as [(4, 64), (1, 1024)]."""
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def main():
    if sys.argv[1:2] == ["--child"]:  # it may have imported another version of the trainer
        name, arguments = sys.argv[2:]
        print(json.dumps(CHILDREN[name](**json.loads(arguments))))
        return
    if sys.argv[1:2] == ["--small"]:  # what follows are flags of small_models.py
        import small_models

        small_models.main(sys.argv[2:])
        return

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="d12", help="d6, d12, ... (default: d12, GPT-2 124M)")
    parser.add_argument("--shapes", type=read_shapes, help="BxT,... (default: 4x64,1x1024)")
    parser.add_argument("--rounds", type=int, default=3, help="of taking turns (default: 3)")
    parser.add_argument("--threads", type=int, default=gpt2.threads_wanted(), help="for everybody")
    parser.add_argument("--recompute", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    parser.add_argument("--against", help="a folder with another version of this project")
    parser.add_argument("--small", action="store_true", help="small models instead, if it is first")
    parser.add_argument("--generation", action="store_true", help="also measure generation")
    parser.add_argument("--hellaswag", action="store_true", help="also measure HellaSwag")
    parser.add_argument("--full", action="store_true", help="everything: half an hour")
    parser.add_argument("--output", help="the JSON file (default: in figures/benchmarks)")
    options = parser.parse_args()
    if options.shapes is None:
        options.shapes = [(4, 64), (1, 1024)] + ([(4, 1024)] if options.full else [])
    found = measure(options)

    kernel = blas().rpartition("kernels for ")[2]
    words = f"{processor()} {kernel} {options.threads} threads"
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    path = options.output or os.path.join(TOP, "figures", "benchmarks", f"{name}.json")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path, "w") as file:
        json.dump(found, file, indent=1)
    note(f"written to {path}")


if __name__ == "__main__":
    main()
