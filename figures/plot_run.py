"""
A picture of one run or several: training and validation losses, and the learning rate.

    python figures/plot_run.py data/d6
        writes data/d6/run.svg

    python figures/plot_run.py data/d6 data/other --output both.png
        compares two runs; the ending says whether it is an SVG, a PNG or a PDF

It reads main.jsonl, which a run with --output_dir leaves, and needs matplotlib.
"""

import argparse
import json
import os
import sys


def read_log(folder):
    """The entries of a run's main.jsonl: a list of dicts. ValueError if there is no such log."""
    path = os.path.join(folder, "main.jsonl")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")  # what follows the last line's end is "", or half a line

    entries = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            right = all(type(value) in (int, float, bool) for value in entry.values())
            entries.append({"step": entry["step"]} | {k: float(v) for k, v in entry.items()})
        except (ValueError, AttributeError, KeyError, OverflowError, RecursionError, TypeError):
            right = False
        if not right:
            raise ValueError(f"{path}, line {number}: expected JSON of numbers, with a step")
    if not entries:
        raise ValueError(f"{path} is empty: the run has made no update yet")
    return entries


def columns(entries, name):
    """(steps, values) of those entries that have a value of this name."""
    found = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def label_of(folder):
    """A folder's name as matplotlib takes it: it hides labels that begin with _, and $ is TeX."""
    name = os.path.normpath(folder).encode(errors="replace").decode()
    return f" {name}".replace("$", r"\$")


def draw(logs, path):
    """Draw {folder: entries} into a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    for number, (folder, entries) in enumerate(logs.items()):
        colour = f"C{number}"
        name = label_of(folder)
        steps, values = columns(entries, "train_loss")
        losses.plot(
            steps, values, color=colour, linewidth=0.8, alpha=0.6, label=f"{name}, training"
        )
        steps, values = columns(entries, "val_loss")
        if values:
            losses.plot(steps, values, color=colour, marker="o", label=f"{name}, validation")
            best = min(zip(values, steps, strict=True))
            losses.annotate(
                f"{best[0]:.4f}", best[::-1], (0, 8), textcoords="offset points", ha="right"
            )
        rates.plot(*columns(entries, "lr"), color=colour)

    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("update")
    figure.savefig(path)
    pyplot.close(figure)


def main(argv=None):
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python figures/plot_run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="an --output_dir of the trainer")
    parser.add_argument("--output", metavar="FILE", help="the picture (default: DIR/run.svg)")
    args = parser.parse_args(argv)

    path = args.output or os.path.join(args.runs[0], "run.svg")
    try:
        draw({folder: read_log(folder) for folder in args.runs}, path)
    except ImportError:
        print("error: this needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
