"""What stands alone: the chapter without the tool, and train_gpt2.py without the other files.

    python tests/test_alone.py              a line for each check; needs NumPy, and no pytest
    python -m pytest tests/test_alone.py    the same

Whatever else is installed is hidden from every process here: it begins with a sitecustomize.py that
lets nothing through but NumPy and the standard library.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TRAINER = (Path(__file__).resolve().parent.parent / "train_gpt2.py").read_text("utf-8")
CHAPTER, _, _ = TRAINER.partition("\n# Here the algorithm ends")  # as its header says

ONLY_NUMPY = """
import sys

class OnlyNumPy:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in {"numpy", "train_gpt2", "chapter", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyNumPy())
"""
FILES = {"train_gpt2.py": TRAINER, "chapter.py": CHAPTER, "sitecustomize.py": ONLY_NUMPY}


def run(folder, *words, code=0):
    """What Python prints in a folder where these files lie: (stdout, stderr)."""
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    own = {"PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=os.environ | own,
        capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done
    return done.stdout, done.stderr


def losses_in(stdout):
    """[(number of the step, its train loss), ...]"""
    found = re.findall(r"(?m)^step (\d+)/\d+: train loss (\S+) ", stdout)
    return [(int(step), float(loss)) for step, loss in found]


def test_everything_else_is_hidden(tmp_path):
    """Or else what follows would show nothing."""
    for name in ("torch", "tiktoken", "pytest"):
        assert "No module named" in run(tmp_path, "-c", f"import {name}", code=1)[1]


def test_the_chapter_trains_and_writes(tmp_path):
    """Cut off at the line, the algorithm is a program."""
    stdout, _ = run(tmp_path, "-c", "import chapter; chapter.demo(steps=30)")
    losses = [loss for _, loss in losses_in(stdout)]
    assert len(losses) == 30 and losses[-1] < losses[0] - 0.5
    written = stdout.partition("step 30/30: ")[2].partition("\n")[2]
    assert written.startswith("def ") and len(written.encode()) > 300


SIDE_BY_SIDE = """if True:
    import numpy as np
    import chapter, train_gpt2
    train_gpt2.THREADS = 2
    tokens = np.random.default_rng(1).integers(0, 256, 3000)
    models = []
    for trainer, make in ((chapter, chapter.Model), (train_gpt2, train_gpt2.GPT2)):
        model = make(trainer.GPT2Config(64, 256, 2, 4, 256), 8, 64, dtype=np.float64)
        loader = trainer.DataLoader([tokens], 8, 64, shuffle_seed=2)
        for _ in range(3):
            trainer.train_step(model, loader, 2, 1e-2, weight_decay=0.1, grad_clip=0.5)
        models.append(model)
    for part in ("params", "grads", "m", "v", "acts"):
        ours, theirs = (getattr(model, part) for model in models)
        assert len(ours) >= 16 and ours.keys() == theirs.keys()
        for name in ours:
            error = np.linalg.norm(ours[name] - theirs[name])
            assert error <= 1e-10 * np.linalg.norm(theirs[name]), (part, name, error)
"""


def test_the_tool_computes_what_the_chapter_computes(tmp_path):
    """In float64, three updates of two micro-batches leave the same tensors, to 1e-10."""
    run(tmp_path, "-c", SIDE_BY_SIDE)


def test_a_run_is_saved_resumed_and_loaded(tmp_path):
    """As if it had not been stopped. By its folder and by the bare .safetensors in it."""
    flags = "train_gpt2.py --model bytes --val_max_steps 1 --max_new_tokens 9".split()
    whole, _ = run(tmp_path, *flags, "--num_iterations", 4)
    first, _ = run(tmp_path, *flags, "--num_iterations", 2, "--output_dir", "o")
    second, _ = run(tmp_path, *flags, "--num_iterations", 4, "--output_dir", "o", "--resume", 1)
    assert losses_in(first) + losses_in(second) == losses_in(whole)
    assert [step for step, _ in losses_in(whole)] == [1, 2, 3, 4]

    speak = "train_gpt2.py --inference_only 1 --prompt def --max_new_tokens 5 --model".split()
    texts = {run(tmp_path, *speak, name)[0] for name in ("o", "o/model.safetensors")}
    assert len(texts) == 1


def test_without_flags_it_learns_from_its_own_text(tmp_path):
    """Since OpenAI's weights can't be had."""
    stdout, _ = run(tmp_path, "train_gpt2.py", "--num_iterations", 3, "--val_max_steps", 1)
    assert [step for step, _ in losses_in(stdout)] == [1, 2, 3]


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            with tempfile.TemporaryDirectory() as made:
                check(Path(made))
            print(f"well: {name.removeprefix('test_').replace('_', ' ')}", flush=True)
