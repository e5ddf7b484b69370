"""train_gpt2.py alone: copied into an empty folder, with NumPy and the standard library.

    python tests/test_alone.py              a line for each check; needs NumPy, and no pytest
    python -m pytest tests/test_alone.py    the same

Whatever else is installed is hidden from the copy: every process here begins with a
sitecustomize.py that lets nothing through but NumPy and the standard library.
"""

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

TRAINER = Path(__file__).resolve().parent.parent / "train_gpt2.py"

ONLY_NUMPY = """
import os, sys

os.fsync = lambda handle: None  # what it protects from, a power cut, does not happen here

class OnlyNumPy:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in {"numpy", "train_gpt2", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyNumPy())
"""


def prepare(folder):
    """(the empty folder with the copy, the environment of a process that uses it)."""
    blocker, alone = folder / "blocker", folder / "alone"
    for made in (blocker, alone):
        made.mkdir()
    (blocker / "sitecustomize.py").write_text(ONLY_NUMPY)
    shutil.copy(TRAINER, alone)
    drop = ("PYTHON", "OMP_", "OPENBLAS_THREAD_TIMEOUT", "TIKTOKEN", "PMI_", "COLUMNS")
    environment = {name: x for name, x in os.environ.items() if not name.startswith(drop)}
    environment |= {"PYTHONPATH": str(blocker), "PYTHONIOENCODING": "utf-8"}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    return alone, environment


def run(place, *words, code=0):
    """What a process prints, with the exit code that it must have: (stdout, stderr)."""
    folder, environment = place
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == code, done
    return done.stdout, done.stderr


def run_python(place, program):
    """stdout of a Python program, which must end well and say nothing on stderr."""
    stdout, stderr = run(place, "-c", program)
    assert stderr == "", stderr
    return stdout


def error_of(place, *flags):
    """The one line with which the command line ends, with exit code 1."""
    _, stderr = run(place, "train_gpt2.py", *flags, code=1)
    assert re.fullmatch(r"error: .*\n", stderr), stderr
    return stderr


def write_tokens(path, tokens):
    """A token file of GPT-2's tokens."""
    header = struct.pack("<4i", 20240520, 1, len(tokens), 50257)
    path.write_bytes(header.ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens))


# --------------------------------------------------------------------------------------------------


def test_the_blocker_blocks(tmp_path):
    """Or else everything below would show nothing."""
    hidden = "tiktoken requests torch pytest prepro_tinyshakespeare extras".split()
    program = f"""if True:
        import importlib, json, numpy
        for name in {hidden}:
            try:
                importlib.import_module(name)
            except ImportError:
                print(name)
    """
    assert run_python(prepare(tmp_path), program).split() == hidden


def test_the_import_changes_nothing(tmp_path):
    """No thread, no library, no handler, no file, no variable of the environment."""
    program = """if True:
        import ctypes, os, pickle, signal, sys, threading, warnings
        import numpy as np

        seen = []
        def watch(owner, name):
            if hasattr(owner, name):
                before = getattr(owner, name)
                def watched(*args, **kwargs):
                    by_us = sys._getframe(1).f_globals["__name__"] == "train_gpt2"
                    seen.extend([name] * by_us)
                    return before(*args, **kwargs)
                setattr(owner, name, watched)

        def state():
            handlers = [signal.getsignal(number) for number in signal.valid_signals()]
            numpys = [np.geterr(), np.get_printoptions(), np.random.get_state()[2]]
            streams = [(s.encoding, s.errors, s.line_buffering) for s in (sys.stdout, sys.stderr)]
            process = [os.getcwd(), sys.path[:], sys.flags, sys.getswitchinterval(), os.listdir()]
            hooks = [sys.excepthook, sys.displayhook, threading.excepthook, sys.gettrace()]
            tasks = "/proc/self/task"
            threads = [len(os.listdir(tasks))] if os.path.exists(tasks) else []
            threads += [threading.active_count(), warnings.filters[:], sys.getrecursionlimit()]
            return [str(x) for x in (handlers, numpys, streams, process, hooks, threads)]

        np.ones((300, 300)) @ np.ones((300, 300))
        for name in ("CDLL", "PyDLL"):
            watch(ctypes, name)
        watch(threading.Thread, "start")
        watch(os, "register_at_fork")
        environment, before = dict(os.environ), state()
        import train_gpt2
        assert state() == before, (before, state())
        assert seen == [], seen
        assert dict(os.environ) == environment
        foreign = [name for name in sys.modules if name.startswith(("tiktoken", "extras"))]
        assert foreign == []
    """
    assert run_python(prepare(tmp_path), program) == ""


def test_a_model_learns(tmp_path):
    program = """if True:
        import numpy as np
        from train_gpt2 import GPT2, GPT2Config

        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 65, (2, 17))
        losses = []
        model = GPT2(GPT2Config(32, 65, 2, 4, 32), 2, 16, seed=1)
        for _ in range(60):
            losses.append(model.forward(tokens[:, :-1], tokens[:, 1:]))
            model.backward()
            model.update(1e-2)
        assert abs(losses[0] - np.log(65)) < 0.1 and losses[-1] < 0.5, losses
        found = list(model.generate(tokens[0, :4], 12, temperature=0))
        assert found == tokens[0, 4:16].tolist()
        [scored] = model.token_losses(tokens[0, :1], [tokens[0, 1:]])
        assert scored.shape == (16,)
        whole = model.forward(tokens[:, :-1], tokens[:, 1:], train=False)
        other = model.token_losses(tokens[1, :1], [tokens[1, 1:]])[0]
        assert abs((scored.mean() + other.mean()) / 2 - whole) < 1e-5
    """
    assert run_python(prepare(tmp_path), program) == ""


def test_weights_are_saved_and_read(tmp_path):
    """By the folder, and by the bare .safetensors in it, also where nothing else lies there."""
    program = """if True:
        import numpy as np, os, shutil
        from train_gpt2 import GPT2, GPT2Config

        model = GPT2(GPT2Config(16, 300, 2, 4, 32), 1, 8, seed=1)
        model.save_pretrained("saved")
        os.mkdir("bare")
        shutil.copy("saved/model.safetensors", "bare/some.safetensors")
        for source in ("saved", "saved/model.safetensors", "bare/some.safetensors"):
            other = GPT2.from_pretrained(source, 1, 8)
            assert other.config == model.config
            assert other.flat[0].tobytes() == model.flat[0].tobytes()
        print(*sorted(os.listdir("saved")))
    """
    found = run_python(prepare(tmp_path), program)
    assert found.split() == "README.md config.json generation_config.json model.safetensors".split()


def test_without_flags_it_learns_from_its_own_text(tmp_path):
    """No sibling, no network: that is said, with what is missing, and nothing is replaced."""
    place = prepare(tmp_path)
    stdout, stderr = run(place, "train_gpt2.py", "--num_iterations", 3, "--val_max_steps", 2)
    lines = stdout.splitlines()
    [said] = [i for i, line in enumerate(lines) if "from scratch, by bytes" in line]
    assert stderr == "" and said == 1 and "prepro_tinyshakespeare" in lines[0]
    assert any(line.startswith("training data: train_gpt2.py, ") for line in lines)
    steps = re.findall(r"(?m)^step (\d)/3: train loss (\S+) ", stdout)
    assert [number for number, _ in steps] == ["1", "2", "3"] and "--- sample" in lines
    assert lines[-1].startswith("3 updates, train loss ")
    assert os.listdir(place[0]) == ["train_gpt2.py"]


def test_a_model_of_bytes_is_kept_goes_on_and_speaks(tmp_path):
    place = prepare(tmp_path)
    flags = "train_gpt2.py --model bytes --val_max_steps 1 --max_new_tokens 10 --output_dir o"
    flags = flags.split()
    run(place, *flags, "--num_iterations", 2)
    stdout, _ = run(place, *flags, "--num_iterations", 4, "--resume", 1)
    assert re.findall(r"(?m)^step (\d)/4: ", stdout) == ["3", "4"]
    speak = "train_gpt2.py --model o --inference_only 1 --prompt def".split()
    assert "\ndef" in run(place, *speak, "--max_new_tokens", 5)[0]


def losses_in(stdout):
    return re.findall(r"(?m)^step (\d+)/\d+: train loss (\S+) ", stdout)


def test_token_files_are_trained_on_stopped_and_resumed(tmp_path):
    """With GPT-2's vocabulary there are no samples, since tiktoken is missing: one line says so."""
    place = folder, environment = prepare(tmp_path)
    write_tokens(folder / "x.bin", [(i * i) % 50257 for i in range(200)])
    write_tokens(folder / "y.bin", [(7 * i) % 50257 for i in range(100)])
    flags = """train_gpt2.py --model d6 --input_bin x.bin --input_val_bin y.bin --batch_size 1
        --sequence_length 8 --val_loss_every 3 --val_max_steps 1 --sample_every 1
        --num_iterations 5""".split()
    whole, stderr = run(place, *flags)
    assert stderr == "" and len(losses_in(whole)) == 5
    assert len(re.findall("(?m)^.*pip install tiktoken.*no samples$", whole)) == 1

    kept = [*flags, "--output_dir", "o"]
    if os.name == "nt":  # where a process can't send Ctrl-C to one of its children
        first, _ = run(place, *kept, "--num_iterations", 2)
    else:
        command = [sys.executable, *kept]
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
        )
        first = ""
        for line in child.stdout:
            first += line
            if line.startswith("step 2/"):
                child.send_signal(signal.SIGINT)
        assert child.wait(timeout=300) == 130 and "--resume 1" in first.splitlines()[-1], first
        child.stdout.close()
    second, stderr = run(place, *kept, "--resume", 1)
    assert stderr == "" and losses_in(first) + losses_in(second) == losses_in(whole)
    assert 2 <= len(losses_in(first)) < 5
    names = set(os.listdir(folder / "o"))
    assert {"main.log", "config.json", "model.safetensors"} < names
    assert "checkpoint_00000005.safetensors" in names


def test_what_is_missing_is_one_line_that_says_where_to_get_it(tmp_path):
    """OpenAI's weights, and what the extras do."""
    place = folder, environment = prepare(tmp_path)
    program = """if True:
        from train_gpt2 import GPT2, InputError
        try:
            GPT2.from_pretrained("gpt2")
        except InputError as error:
            print(error)
    """
    line = run_python(place, program)
    assert line.count("\n") == 1 and "prepro_tinyshakespeare" in line and "get it from" in line
    assert line.strip() in error_of(place, "--model", "gpt2", "--inference_only", 1)

    (folder / "model.bin").write_bytes(bytes(2000))
    assert "extras" in error_of(place, "--model", "model.bin", "--inference_only", 1)
    bytes_run = "--model bytes --num_iterations 1".split()
    assert "extras" in error_of(place, *bytes_run, "--hellaswag_eval", 1)
    assert "extras" in error_of((folder, environment | {"PMI_SIZE": "2"}), *bytes_run)
    assert sorted(os.listdir(folder)) == ["model.bin", "train_gpt2.py"]


def test_help_needs_no_docstrings(tmp_path):
    """python -OO throws them away."""
    place = prepare(tmp_path)
    stdout, stderr = run(place, "-OO", "train_gpt2.py", "--help")
    assert stderr == "" and "--num_iterations" in stdout
    assert stdout == run(place, "train_gpt2.py", "--help")[0]


def main():
    checks = [check for name, check in globals().items() if name.startswith("test_")]
    for check in checks:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))
        print(f"well: {check.__name__.removeprefix('test_').replace('_', ' ')}", flush=True)


if __name__ == "__main__":
    main()
