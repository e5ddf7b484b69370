"""
Makes the figures of the README and the tables of BENCHMARK.md: python figures/make_figures.py

    blob.svg        the memory of a model, to scale, and who uses it when
    layer.svg       one layer, forward and backward, with the names of the tensors
    loss.svg        the losses in losses.json
    sizes.svg       sizes.json, which tests/benchmark.py --small --two_processes --rows sizes writes
    benchmark.svg   the measurements in benchmarks/*.json, which tests/benchmark.py writes; the
                    tables in README.md and BENCHMARK.md are made from them too

    python figures/make_figures.py --train

first measures losses.json: it trains the README's d6 and the PyTorch model of test_gpt2.py from the
same weights on the same batches, which takes some five minutes. Needs matplotlib, and PyTorch for
--train.
"""

import argparse
import glob
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import train_gpt2 as gpt2

BLUE, ORANGE, GREEN, GREY = "#4c78a8", "#e58606", "#54a24b", "#b8bcc2"
INK, PAPER = "#22262b", "#fbfaf7"  # the figures bring their own background, light on any page


def new_figure(width, height):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "gpt2",  # the same bytes each time
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
    })  # fmt: skip
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height))


def save(figure, name):
    path = os.path.join(HERE, name)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    print(path)


# --------------------------------------------------------------------------------------------------
# The blob


def blob_parts(config, B, T):
    """[(name, megabytes)] in the order of memory."""
    weights = 4 * gpt2.count(gpt2.param_shapes(config)) / 1e6
    shapes = gpt2.act_shapes(config, B, T)
    names = list(shapes)
    start = names.index("dresidual")
    logits = gpt2.count({"logits": shapes["logits"]})
    forward = gpt2.count({name: shapes[name] for name in names[:start]}) - logits
    work = gpt2.count({name: shapes[name] for name in names[start:]})
    parts = [(name, weights) for name in ("params", "grads", "m", "v")]
    parts.append(("activations", 4 * forward / 1e6))
    parts.append(("logits", 4 * logits / 1e6))
    parts.append(("work space", 4 * work / 1e6))
    return parts


USES = {  # r: reads, w: writes, of params, grads, m, v, activations, logits, work space
    "forward": "r   w  ",
    "classifier": "rw  rww",  # of params only wte, of the activations lnf and losses
    "backward": "rw  r w",
    "update": "wrww   ",
}


def draw_blob():
    config = gpt2.GPT2Config()
    figure, axes = new_figure(10, 3.4)
    parts = blob_parts(config, 4, 64)
    colours = [BLUE, ORANGE, GREEN, GREEN, GREY, GREY, ORANGE]
    shapes = gpt2.param_shapes(config)
    wte = gpt2.count({"wte": shapes["wte"]}) / gpt2.count(shapes)

    x = 0
    for number, ((name, size), colour) in enumerate(zip(parts, colours, strict=True)):
        axes.barh(0, size, left=x, height=0.8, color=colour, edgecolor=PAPER)
        if size > 150:
            label = f"{name}\n{size:.0f} MB"
            axes.text(x + size / 2, 0, label, ha="center", va="center", color="w")
        for row, (user, uses) in enumerate(USES.items(), start=1):
            use = uses[number]
            if use != " ":
                dark = use == "w"
                only_wte = user == "classifier" and name in ("params", "grads")
                y, length = -row * 0.45 - 0.35, size * wte if only_wte else size
                axes.barh(
                    y, length, left=x, height=0.32,
                    edgecolor=PAPER, color=colour, alpha=1.0 if dark else 0.4,
                )  # fmt: skip
                if only_wte and name == "grads":
                    rest = size - length
                    axes.barh(y, rest, left=x + length, height=0.32, edgecolor=PAPER, color=GREY)
                    axes.text(x + length / 2, y, "dwte", ha="center", va="center", color="w")
                    axes.text(x + length + rest / 2, y, "logits *", ha="center", va="center")
        x += size

    last = ", ".join(f"{name} {size:.0f}" for name, size in parts[-3:])
    axes.text(x, 0.55, f"{last} MB", ha="right", va="bottom")
    for row, name in enumerate(USES, start=1):
        axes.text(-15, -row * 0.45 - 0.35, name, ha="right", va="center")
    legend = (
        "dark: writes, light: reads.  GPT-2 124M, B = 4, T = 64, to scale\n"
        "* in the first micro-batch of a step, before backward writes these gradients; "
        "later ones use the place on the right"
    )
    axes.text(0, -2.62, legend, va="top")
    axes.set_xlim(-150, x + 5)
    axes.set_ylim(-3.15, 0.9)
    axes.axis("off")
    save(figure, "blob.svg")


# --------------------------------------------------------------------------------------------------
# One layer

FORWARD = [
    ("residual", ""), ("ln1", "layernorm"), ("qkv", "matmul"), ("atty", "attention"),
    ("attproj", "matmul"), ("residual2", "+"), ("ln2", "layernorm"), ("fch", "matmul"),
    ("fch_gelu", "gelu"), ("fcproj", "matmul"), ("residual3", "+"),
]  # fmt: skip
BACKWARD = {  # by the place of the forward tensor: (gradient, the function that makes it)
    10: ("dresidual", ""), 8: ("dfch_gelu", "matmul"), 7: ("dfch", "gelu"),
    6: ("dln2", "matmul"), 5: ("dresidual\n+=", "layernorm"), 3: ("datty", "matmul"),
    2: ("dqkv", "attention"), 1: ("dln1", "matmul"), 0: ("dresidual\n+=", "layernorm"),
}  # fmt: skip


def draw_layer():
    figure, axes = new_figure(11, 3.6)
    shared = gpt2.SHARED_BY_LAYERS[1]

    def box(x, y, text, colour):
        axes.text(
            x, y, text, ha="center", va="center", color="w" if colour != GREY else INK, fontsize=8,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "edgecolor": "none"},
        )  # fmt: skip

    def arrow(start, end, bend=0.0):
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
        if bend:
            style["connectionstyle"] = f"arc3,rad={bend}"
        axes.annotate("", end, start, arrowprops=style)

    for i, (name, function) in enumerate(FORWARD):
        box(i, 1, name, GREY if name in shared else BLUE)
        if i > 0:
            arrow((i - 0.62, 1), (i - 0.4, 1))
            axes.text(i - 0.5, 1.22, function, ha="center", fontsize=7)
    for left in (0, 5):
        arrow((left, 1.14), (left + 5, 1.14), bend=-0.22)

    places = list(BACKWARD)
    for place, (name, _) in BACKWARD.items():
        box(place, 0, name, ORANGE)
    for right, left in zip(places, places[1:], strict=False):
        arrow((right - 0.42, 0), (left + 0.42, 0))
        axes.text((left + right) / 2, -0.3, BACKWARD[left][1], ha="center", fontsize=7)
    for right in (10, 5):
        arrow((right, -0.16 if right == 10 else -0.22), (right - 5, -0.22), bend=-0.22)

    legend = [
        (BLUE, "kept for every layer"),
        (GREY, "shared by all layers, computed again if backward needs it"),
        (ORANGE, "work space of backward (dfch_gelu and dfch are one)"),
    ]
    for i, (colour, text) in enumerate(legend):
        x = [-0.3, 1.9, 6.6][i]
        axes.plot(x, -1.3, "s", color=colour, markersize=8)
        axes.text(x + 0.15, -1.3, text, va="center", fontsize=8)
    axes.set_xlim(-0.6, 10.7)
    axes.set_ylim(-1.5, 2.05)
    axes.axis("off")
    save(figure, "layer.svg")


# --------------------------------------------------------------------------------------------------
# Losses

SETTINGS = {
    "model": "d6", "num_iterations": 200, "batch_size": 8, "learning_rate": 1e-3,
    "warmup_iters": 20, "learning_rate_decay_frac": 0.1, "weight_decay": 0.1, "grad_clip": 1.0,
    "val_loss_every": 50,
}  # fmt: skip


def make_loaders(args):
    B, T = args.batch_size, args.sequence_length
    train = gpt2.DataLoader(gpt2.open_shards(args.input_bin), B, T, args.seed)
    val = gpt2.DataLoader(gpt2.open_shards(args.input_val_bin), B, T)
    return train, val


def learning_rate(args, step):
    return gpt2.learning_rate_at(
        step, args.num_iterations, args.learning_rate,
        args.warmup_iters, args.learning_rate_decay_frac,
    )  # fmt: skip


def train_ours(args, model):
    """{"train": [[update, loss], ...], "val": ...}"""
    loader, val_loader = make_loaders(args)
    found = {"train": [], "val": []}
    for step in range(args.num_iterations + 1):
        if step % args.val_loss_every == 0:
            val_loader.seek([0, 0, 0])
            batches = [val_loader.next_batch() for _ in range(args.val_max_steps)]
            losses = [model.forward(x, y, train=False) for x, y in batches]
            found["val"].append([step, sum(losses) / len(losses)])
        if step < args.num_iterations:
            loss, _ = gpt2.train_step(
                model, loader, 1, learning_rate(args, step), args.weight_decay, args.grad_clip
            )
            found["train"].append([step + 1, loss])
    return found


def train_torch(args, config, reference):
    import torch

    loader, val_loader = make_loaders(args)
    decayed = [name for name in gpt2.param_shapes(config) if gpt2.is_decayed(name)]
    others = [name for name in gpt2.param_shapes(config) if not gpt2.is_decayed(name)]
    groups = []
    for names, decay in ((decayed, args.weight_decay), (others, 0.0)):
        tensors = [tensor for name in names for tensor in reference.named(name)]
        groups.append({"params": tensors, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)

    found = {"train": [], "val": []}
    for step in range(args.num_iterations + 1):
        if step % args.val_loss_every == 0:
            val_loader.seek([0, 0, 0])
            batches = [val_loader.next_batch() for _ in range(args.val_max_steps)]
            with torch.no_grad():
                losses = [reference(*map(torch.from_numpy, batch)).item() for batch in batches]
            found["val"].append([step, sum(losses) / len(losses)])
        if step < args.num_iterations:
            loss = reference(*map(torch.from_numpy, loader.next_batch()))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reference.parameters(), args.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, step)
            optimizer.step()
            found["train"].append([step + 1, loss.item()])
    return found


def measure_losses():
    from test_gpt2 import TorchGPT2

    args = gpt2.settings(dict(SETTINGS))
    args.input_bin, args.input_val_bin = gpt2.provide("tiny_shakespeare")
    L, C = gpt2.FRESH[args.model]
    config = gpt2.GPT2Config(1024, 50257, L, C // 64, C)
    model = gpt2.GPT2(config, args.batch_size, args.sequence_length, args.seed)
    reference = TorchGPT2(config, model.params)

    found = {"train_gpt2.py": train_ours(args, model)}
    found["PyTorch"] = train_torch(args, config, reference)
    with open(os.path.join(HERE, "losses.json"), "w") as file:
        json.dump(found, file)


def draw_losses():
    with open(os.path.join(HERE, "losses.json")) as file:
        found = json.load(file)
    figure, axes = new_figure(7, 3.2)
    for who, style in (("PyTorch", {"color": ORANGE}), ("train_gpt2.py", {"color": BLUE})):
        ours = who == "train_gpt2.py"
        width, dashes = (1.1, "-") if ours else (3.2, "-")
        opacity = 1.0 if ours else 0.45
        axes.plot(
            *zip(*found[who]["train"], strict=True), dashes, linewidth=width, alpha=opacity,
            label=f"{who}, training loss", **style,
        )  # fmt: skip
        axes.plot(
            *zip(*found[who]["val"], strict=True), "o", markersize=4 if ours else 9, alpha=opacity,
            label=f"{who}, validation loss", **style,
        )  # fmt: skip
    pairs = zip(found["PyTorch"]["train"], found["train_gpt2.py"]["train"], strict=True)
    largest = max(abs(theirs[1] - ours[1]) for theirs, ours in pairs)
    print(f"the largest difference between two training losses: {largest:.1e}")
    axes.set_xlabel("updates")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    save(figure, "loss.svg")


# --------------------------------------------------------------------------------------------------
# The benchmark


IN_README = "intel-r-xeon-r-processor-skylakex-2-threads.json"


def read_benchmarks():
    """What is in benchmarks/*.json, one file for each processor, kernel and number of threads."""
    paths = sorted(glob.glob(os.path.join(HERE, "benchmarks", "*.json")))
    paths.sort(key=lambda path: os.path.basename(path) != IN_README)  # that one first
    files = []
    for path in paths:
        with open(path) as file:
            files.append(json.load(file))
    return files


def draw_benchmark(files):
    bars = []
    for found in files:
        for row in found["training"]:
            if row["model"] == "d12" and row["who"] == "train_gpt2.py --recompute 1":
                name = f"B={row['B']}, T={row['T']}"
                kernel = found["machine"]["blas"].rpartition(" ")[2]
                cpu = f"{found['machine']['processor'][:24]}, {kernel}"
                bars.append((name, row["speed"], row["memory"], cpu))
    figure, axes = new_figure(7, 0.9 + 0.55 * len(bars))
    for i, (name, speed, memory, cpu) in enumerate(bars):
        for offset, colour, (middle, least, most) in ((0.2, BLUE, speed), (-0.2, GREY, memory)):
            error = [[middle - least], [most - middle]]
            axes.barh(
                -i + offset, middle, height=0.36, color=colour, xerr=error,
                error_kw={"ecolor": INK, "linewidth": 0.8},
            )  # fmt: skip
            ink = INK if colour == GREY else "w"
            axes.text(0.02, -i + offset, f"{middle:.2f}", va="center", fontsize=8, color=ink)
        axes.text(-0.02, -i, f"{name}\n{cpu}", ha="right", va="center", fontsize=8)
    axes.axvline(1.0, color=ORANGE, linewidth=1)
    axes.text(1.01, 0.55, "PyTorch", color=ORANGE, fontsize=8)
    axes.set_yticks([])
    axes.set_xlabel("blue: speed over PyTorch's fastest mode.  grey: memory over its leanest")
    save(figure, "benchmark.svg")


def draw_sizes():
    """ms a step by the number of parameters, relative to PyTorch's faster mode."""
    with open(os.path.join(HERE, "sizes.json"), encoding="utf-8") as file:
        rows = json.load(file)
    sizes = []
    for row in rows:
        _, T, V, L, NH, C = row["row"]
        config = gpt2.GPT2Config(max(T, 64), V, L, NH, C)
        sizes.append(gpt2.count(gpt2.param_shapes(config)))
    rows = [row for _, row in sorted(zip(sizes, rows, strict=True), key=lambda pair: pair[0])]
    sizes.sort()

    figure, axes = new_figure(7, 3.4)
    lines = {"one process": BLUE, ", two processes": GREEN, "PyTorch": ORANGE}
    for kind, colour in lines.items():
        name = kind.removeprefix(", ")
        axes.plot(sizes, [row[kind] for row in rows], "o-", color=colour, label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("ms a step")
    axes.legend(frameon=False)
    save(figure, "sizes.svg")


def ratio(of_three):
    middle, least, greatest = of_three
    return f"{middle:.2f} ({least:.2f} to {greatest:.2f})"


def machine_line(machine):
    return (
        f"{machine['threads']} threads on {machine['cores']} cores of an {machine['processor']} "
        f"({machine['system'].split('-')[0]}), Python {machine['python']}, NumPy "
        f"{machine['numpy']} with {machine['blas']}, PyTorch {machine['torch']} "
        f"({machine['torch_kernels']}), {machine['date']}, commit {machine['commit']}"
    )


def short_table(found):
    """The README's: what ours takes, and its ratios to PyTorch."""
    lines = ["| B, T | train_gpt2.py | tokens/s | peak MB | speed | memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in found["training"]:
        if row["who"].startswith("train_gpt2.py --"):
            rate = row["B"] * row["T"] / row["seconds"]
            lines.append(
                f"| {row['B']}, {row['T']} | `{row['who'].split(' ', 1)[1]}` | {rate:.0f} | "
                f"{row['peak_mb']:.0f} | {ratio(row['speed'])} | {ratio(row['memory'])} |"
            )
    return lines


def long_table(found):
    """BENCHMARK.md's: all that was measured on one machine."""
    bandwidth, flops = found["limits"]["bandwidth"] / 1e9, found["limits"]["flops"] / 1e9
    kernel = found["machine"]["blas"].rpartition("kernels for ")[2]
    title = f"### {found['machine']['processor']}, kernels for {kernel}"
    lines = [title, "", machine_line(found["machine"]) + ".", ""]
    lines += [
        "| B, T | who | ms per step | forward / backward / update | tokens/s | peak MB | speed | "
        "memory | of the limit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["training"]:
        parts = " / ".join(f"{row[name] * 1e3:.0f}" for name in ("forward", "backward", "update"))
        rate = row["B"] * row["T"] / row["seconds"]
        lines.append(
            f"| {row['B']}, {row['T']} | {row['who']} | {row['seconds'] * 1e3:.0f} | {parts} | "
            f"{rate:.0f} | {row['peak_mb']:.0f} | {ratio(row['speed'])} | "
            f"{ratio(row['memory'])} | {row['of_limit']:.0%} |"
        )
    lines += [
        "",
        f"The limit is all matrix products at {flops:.0f} GFLOP/s, the best rate that NumPy's "
        f"matmul showed in this run, and then AdamW's seven passes over the parameters at "
        f"{bandwidth:.0f} GB/s.",
        "",
        "| attention, one layer | ms, forward and backward | times what its products take |",
        "|---|---|---|",
    ]
    for row in found["attention"]:
        shape = f"{row['B']}, {row['T']}"
        lines.append(f"| {shape} | {row['seconds'] * 1e3:.1f} | {row['of_products']:.2f} |")
    if "generation" in found:
        lines += ["", "| generation, 256 tokens | tokens/s | of the bandwidth | peak MB |"]
        lines += ["|---|---|---|---|"]
        for row in found["generation"]:
            middle, least, most = row["tokens_per_second"]
            lines.append(
                f"| {row['who']} | {middle:.1f} ({least:.1f} to {most:.1f}) | "
                f"{row['of_bandwidth']:.0%} | {row['peak_mb']:.0f} |"
            )
    if "hellaswag" in found:
        seconds = found["hellaswag"]["seconds_per_example"]
        lines += [
            "",
            f"HellaSwag with GPT-2 124M: {seconds:.3f} s per example, "
            f"{ratio(found['hellaswag']['ratio'])} of the time of four whole sequences.",
        ]
    return lines + [""]


def put_between_marks(path, name, lines):
    """Replace what stands between <!-- name --> and <!-- end of name --> in a text file."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    body = "\n".join(["", *lines, ""])
    with open(path, "w", encoding="utf-8") as file:
        file.write(before + begin + body + end + after)
    print(path)


def write_tables(files):
    readme = os.path.join(os.path.dirname(HERE), "README.md")
    first = files[0]
    lines = [f"One update of GPT-2 124M in float32; {machine_line(first['machine'])}:", ""]
    put_between_marks(readme, "speed", lines + short_table(first))
    every = [line for found in files for line in long_table(found)]
    put_between_marks(os.path.join(HERE, "BENCHMARK.md"), "tables", every)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", action="store_true", help="measure losses.json first")
    if parser.parse_args().train:
        measure_losses()
    draw_blob()
    draw_layer()
    draw_losses()
    draw_sizes()
    files = read_benchmarks()
    if files:
        draw_benchmark(files)
        write_tables(files)


if __name__ == "__main__":
    main()
