"""
Makes the figures of the README and the tables of BENCHMARK.md: python figures/make_figures.py

    blob.svg        the memory of a model, to scale, and who uses it when
    layer.svg       one layer, forward and backward, with the names of the tensors
    loss.svg        the losses in losses.json
    sizes.svg       sizes.json, which tests/benchmark.py --rows sizes --two_processes writes
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
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

import train_gpt2 as gpt2

BLUE, ORANGE, GREEN = "#4c78a8", "#e58606", "#54a24b"
GREY, DARK_GREY = "#b8bcc2", "#868c96"
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


COLOURS = {  # of the blob's parts
    "params": BLUE, "grads": ORANGE, "m": GREEN, "v": GREEN,
    "activations": GREY, "logits": DARK_GREY, "work space": ORANGE,
}  # fmt: skip
FIRST_LOGITS = "logits in the first micro-batch"  # which lie in the gradients
COLOURS[FIRST_LOGITS] = DARK_GREY


def blob_parts(config, B, T):
    """{part: {tensor: its slice of the blob}}, in the order of memory, then FIRST_LOGITS."""
    params = gpt2.GPT2.param_shapes(config)
    row = gpt2.count(params)
    parts = {part: {} for part in COLOURS}
    for number, part in enumerate(("params", "grads", "m", "v")):
        for name, place in gpt2.places(params).items():
            parts[part][name] = slice(number * row + place.start, number * row + place.stop)

    work_space = gpt2.GPT2.work_shapes(config, B, T)
    for name, place in gpt2.places(gpt2.GPT2.act_shapes(config, B, T)).items():
        part = "work space" if name in work_space else "activations"
        part = "logits" if name == "logits" else part
        parts[part][name] = slice(4 * row + place.start, 4 * row + place.stop)

    start = parts["grads"]["wpe"].start  # see Model.room_for_logits
    parts[FIRST_LOGITS]["logits"] = slice(start, start + B * T * config.vocab_size)
    return parts


def blob_uses(parts):
    """{who: [(whether it writes, part, names)]}; with names = None all of the part."""
    after_embedding = [name for name in parts["params"] if name not in ("wte", "wpe")]
    forward = [name for name in parts["activations"] if name != "losses"]
    work = [name for name in parts["work space"] if name != "dlnf"]
    return {
        "forward": [(False, "params", None), (True, "activations", forward)],
        "classifier": [
            (False, "params", ["wte"]), (False, "activations", ["lnf"]),
            (True, "grads", ["wte"]), (True, FIRST_LOGITS, None), (True, "logits", None),
            (True, "activations", ["losses"]), (True, "work space", ["dlnf"]),
        ],
        "backward": [
            (False, "params", after_embedding), (False, "activations", forward),
            (False, "work space", ["dlnf"]), (True, "work space", work), (True, "grads", None),
            (True, "activations", ["ln1", "ln2", "fch_gelu"]),  # computed again
        ],
        "update": [
            (True, "params", None), (False, "grads", None), (True, "m", None), (True, "v", None),
        ],
    }  # fmt: skip


def runs(places):
    """Slices in the order of memory, those that touch joined: [(begin, end)] in MB."""
    found = []
    for place in places:
        begin, end = 4 * place.start / 1e6, 4 * place.stop / 1e6
        if found and found[-1][1] == begin:
            begin, _ = found.pop()
        found.append((begin, end))
    return found


def draw_blob():
    config, B, T = gpt2.GPT2Config(), 4, 64
    parts = blob_parts(config, B, T)
    figure, axes = new_figure(10, 3.6)

    def bars(y, height, part, names=None, writes=True):
        for begin, end in runs(parts[part][name] for name in names or parts[part]):
            width = max(end - begin, 2.5)  # a hairline at least
            axes.barh(
                y, width, height, begin, align="edge",
                color=COLOURS[part], alpha=1.0 if writes else 0.4, linewidth=0,
            )  # fmt: skip

    def text(x, y, words, **more):
        axes.text(x, y, words, **{"ha": "center", "va": "center", **more})

    sizes = {}
    for part in list(parts)[:-1]:
        bars(0, 0.8, part)
        spans = runs(parts[part].values())
        begin, end = spans[0][0], spans[-1][1]
        sizes[part] = sum(end - begin for begin, end in spans)
        axes.plot([begin, begin], [0, 0.8], color=PAPER, linewidth=1)
        if sizes[part] > 150:
            text((begin + end) / 2, 0.54, part, color="w")
            text((begin + end) / 2, 0.26, f"{sizes[part]:.0f} MB", color="w")
    total = sum(sizes.values())
    small = ", ".join(f"{part} {size:.0f}" for part, size in list(sizes.items())[4:])
    text(total, 0.95, f"{small} MB", ha="right")

    for row, (who, uses) in enumerate(blob_uses(parts).items()):
        y = -0.5 - 0.45 * row
        text(-15, y + 0.16, who, ha="right")
        for writes, part, names in uses:
            bars(y, 0.32, part, names, writes)
        if who == "classifier":
            [(begin, middle), (_, end)] = (
                runs([parts["grads"]["wte"]]) + runs([parts[FIRST_LOGITS]["logits"]])
            )
            text((begin + middle) / 2, y + 0.16, "dwte", color="w")
            text(end + 10, y + 0.16, "logits *", ha="left")

    legend = [
        f"dark: writes, light: reads. GPT-2 124M, B = {B}, T = {T}, to scale: {total:,.0f} MB of "
        "1,000,000 bytes",
        "* in the first micro-batch of a step they lie in gradients that backward has not written "
        "yet; later ones use the place on the right",
        "backward computes ln1, ln2 and fch_gelu again (recompute=1), and so writes a part of the "
        "activations",
    ]
    for line, words in enumerate(legend):
        text(0, -2.3 - 0.27 * line, words, ha="left", fontsize=8)
    axes.set_xlim(-170, total + 5)
    axes.set_ylim(-3.05, 1.15)
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


def half_width(name):
    """About half of the width of a box with this name, where neighbours are 1 apart."""
    return 0.085 + 0.0355 * max(map(len, name.split("\n")))


def draw_layer():
    figure, axes = new_figure(12, 3.6)
    names = [name for name, _ in FORWARD]
    shared = gpt2.GPT2.shared_by_layers(names, recompute=1, training=True)

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

    # The functions stand between the two rows, and the arrows of the residual stream outside them.
    for i, (name, function) in enumerate(FORWARD):
        box(i, 1, name, GREY if name in shared else BLUE)
        if i > 0:
            arrow((i - 1 + half_width(names[i - 1]), 1), (i - half_width(name), 1))
            axes.text(i - 0.5, 0.74, function, ha="center", va="center", fontsize=7)
    for left in (0, 5):
        arrow((left, 1.16), (left + 5, 1.16), bend=-0.2)

    places = list(BACKWARD)
    for place, (name, _) in BACKWARD.items():
        box(place, 0, name, ORANGE)
    for right, left in zip(places, places[1:], strict=False):
        name, function = BACKWARD[left]
        start, end = right - half_width(BACKWARD[right][0]), left + half_width(name)
        arrow((start, 0), (end, 0))
        axes.text((start + end) / 2, 0.26, function, ha="center", va="center", fontsize=7)
    for right in (10, 5):
        arrow((right, -0.16 if right == 10 else -0.24), (right - 5, -0.24), bend=-0.2)

    legend = [
        (BLUE, "kept for every layer"),
        (GREY, "shared by all layers, computed again if backward needs it"),
        (ORANGE, "work space of backward (dfch_gelu and dfch are one)"),
    ]
    for i, (colour, text) in enumerate(legend):
        x = [-0.3, 1.9, 6.4][i]
        axes.plot(x, -1.3, "s", color=colour, markersize=8)
        axes.text(x + 0.15, -1.3, text, va="center", fontsize=8)
    axes.set_xlim(-0.6, 10.7)
    axes.set_ylim(-1.5, 1.85)
    axes.axis("off")
    save(figure, "layer.svg")


# --------------------------------------------------------------------------------------------------
# Losses

D6 = gpt2.GPT2Config(max_seq_len=1024, vocab_size=50257, num_layers=6, num_heads=6, channels=384)
B, T = 8, 64
UPDATES = 200
VAL_BATCHES = 5
VAL_EVERY = 50
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0


def make_loaders():
    paths = gpt2.prepro("provide", "tiny_shakespeare")
    train, val = (gpt2.open_shards([path]) for path in paths)
    return gpt2.DataLoader(train, B, T, shuffle_seed=1337), gpt2.DataLoader(val, B, T)


def learning_rate(step):
    return gpt2.learning_rate_at(step, UPDATES, 1e-3, warmup_iters=20, final_frac=0.1)


def train_both(validate, update):
    """{"train": [[update, loss], ...], "val": ...} of functions that take batches."""
    loader, val_loader = make_loaders()
    found = {"train": [], "val": []}
    for step in range(UPDATES + 1):
        if step % VAL_EVERY == 0:
            val_loader.seek([0, 0, 0])
            losses = [validate(*val_loader.next_batch()) for _ in range(VAL_BATCHES)]
            found["val"].append([step, sum(losses) / len(losses)])
        if step < UPDATES:
            found["train"].append([step + 1, update(loader, learning_rate(step))])
    return found


def train_ours(model):
    def validate(inputs, targets):
        return model.forward(inputs, targets, train=False)

    def update(loader, rate):
        return gpt2.train_step(model, loader, 1, rate, WEIGHT_DECAY, GRAD_CLIP)[0]

    return train_both(validate, update)


def train_torch(reference):
    import torch

    groups = []
    for decayed in (True, False):
        tensors = []
        for name in gpt2.GPT2.param_shapes(D6):
            if gpt2.GPT2.is_decayed(name) == decayed:
                tensors += reference.named(name)
        groups.append({"params": tensors, "weight_decay": WEIGHT_DECAY if decayed else 0.0})
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)

    def validate(inputs, targets):
        with torch.no_grad():
            return reference(torch.from_numpy(inputs), torch.from_numpy(targets)).item()

    def update(loader, rate):
        loss = reference(*map(torch.from_numpy, loader.next_batch()))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return loss.item()

    return train_both(validate, update)


def measure_losses():
    from test_gpt2 import TorchGPT2

    model = gpt2.GPT2(D6, B, T, seed=1337)
    reference = TorchGPT2(D6, model.params)
    found = {"train_gpt2.py": train_ours(model), "PyTorch": train_torch(reference)}
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
                processor = found["machine"]["processor"]
                processor = re.sub(r"\((R|TM)\)|\b(Processor|CPU)\b.*", "", processor)
                cpu = f"{' '.join(processor.split())}, {kernel}"
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
        for y, words in ((0.18, name), (-0.18, cpu)):  # a line each: a reader's font is another
            axes.text(-0.03, -i + y, words, ha="right", va="center", fontsize=8)
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
        sizes.append(gpt2.count(gpt2.GPT2.param_shapes(config)))
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
    ]
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
