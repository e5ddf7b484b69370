"""
Several processes, on one machine or on several, train one model.

    pip install mpi4py mpich
    mpiexec -n 4 python -m extras.processes FLAGS

The flags are the trainer's; --batch_size is that of each process. Each process has all parameters
and gradients, and runs the trainer's loop on batches of its own. And each owns a quarter of the
flat vector: it alone updates that part, and has AdamW's m and v for it. It never touches the rest
of m and v, which therefore costs no memory (ZeRO, stage 1; Rajbhandari et al., 2020). They exchange
numbers by MPI. The first process prints, samples and writes files.
"""

import os
import sys
import time
import traceback
import warnings
import zlib

import numpy as np

import train_gpt2 as gpt2
from train_gpt2 import print_now, require

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    if __name__ == "__main__":
        gpt2.parse_args(sys.argv[1:])  # --help needs no MPI
    sys.exit(f"error: no mpi4py: {error}: pip install mpi4py mpich")

COMM = MPI.COMM_WORLD  # all processes
SIZE, RANK = COMM.size, COMM.rank  # how many they are, and the number of this one
PIECE = 1 << 20  # numbers that are sent at a time


class SharedGPT2(gpt2.GPT2):
    """A GPT-2 that several processes train by train_step. What one of them calls, all must call.

    parts   the slices of the flat vector that they own; `own` is that of this process
    asked   the numbers of the signals that have come to it; `signals` are those that all know of
    """

    PROCESSES = SIZE

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = gpt2.cut(self.flat.shape[1], SIZE)
        self.lengths = [part.stop - part.start for part in self.parts]
        self.own = self.parts[RANK]
        self.asked, self.signals = [], []

    def together(self, number):
        """One number of each process. All learn of a signal here, to leave the loop together."""
        every = np.empty((SIZE, 2))
        COMM.Allgather(np.array([number, (self.asked or [0])[0]], float), every)
        self.signals[:] = [int(signal) for signal in every[:, 1] if signal]
        return every[:, 0].tolist()

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean loss of all processes' batches. The gradients will be those of this mean."""
        loss = super().forward(inputs, targets, train, grad_scale / SIZE)
        return sum(self.together(loss)) / SIZE

    def batch_losses(self, inputs, targets):
        """The loss of each token of B rows for each process, (B * processes, T), in nats."""
        rows = slice(RANK * self.batch_size, (RANK + 1) * self.batch_size)
        self.forward(inputs[rows], targets[rows], train=False)
        losses = np.empty(inputs.shape, self.blob.dtype)
        COMM.Allgather(self.acts["losses"], losses)
        return losses

    def grad_norm(self):
        """The norm of the sum of all gradients, of which this process has its own part afterwards.

        MPI wants side by side what goes to the owners. So a piece of each part is copied at a time.
        """
        with self.whole("grad_norm()", "gradients"):
            width = PIECE // SIZE
            for start in range(0, max(self.lengths), width):
                pieces = [self.flat[1, part][start : start + width] for part in self.parts]
                side_by_side = np.concatenate(pieces)
                COMM.Reduce_scatter(side_by_side, pieces[RANK], [len(piece) for piece in pieces])
            squares = gpt2.sum_of_squares(self.flat[1, self.own])
            return sum(self.together(squares)) ** 0.5

    def update(self, *args, **settings):
        """After grad_norm: GPT2.update of this part alone. The others come from their owners."""
        flat, table, own = self.flat, self.param_table, self.own
        ends = [place.stop for place in gpt2.places(table).values()]
        lengths = np.diff(np.clip(ends, own.start, own.stop), prepend=own.start)

        self.flat = flat[:, own]
        self.param_table = {name: (n,) for name, n in zip(table, lengths, strict=True) if n > 0}
        super().update(*args, **settings)
        self.flat, self.param_table = flat, table
        COMM.Allgatherv(MPI.IN_PLACE, [self.flat[0], self.lengths])

    @property
    def moments(self):
        """AdamW's m and v, for checkpoints."""
        return Moments(self)


class Moments:
    """AdamW's m and v, (2, parameters). moments[...] = array takes this process's part of an array.

    An iteration gives the parts of all, piece by piece. It reads the other processes' memory, while
    they do something else, through the windows that train_together opens.
    """

    def __init__(self, model):
        self.model = model
        self.shape = model.flat[2:].shape

    def __setitem__(self, everything, array):
        self.model.flat[2:, self.model.own] = array[:, self.model.own]

    def __iter__(self):
        for window in self.model.windows:
            for rank, length in enumerate(self.model.lengths):
                for start in range(0, length, PIECE):
                    piece = np.empty(min(PIECE, length - start), self.model.blob.dtype)
                    window.Lock(rank)
                    window.Get(piece, rank, start)
                    window.Unlock(rank)
                    yield piece


class SharedLoader:
    """Each process in turn gets one of a loader's batches. B and position are those of all."""

    def __init__(self, loader):
        self.loader = loader
        self.B, self.T, self.position = loader.B * SIZE, loader.T, loader.position

    def next_batch(self):
        batches = [self.loader.next_batch() for _ in range(SIZE)]
        self.position = self.loader.position
        return batches[RANK]


def train_together(argv):
    """Train, in each process. Returns the exit code, the same in all."""
    if RANK > 0:
        COMM.Barrier()
    run = gpt2.open_run(argv, SharedGPT2, first=RANK == 0)
    if RANK == 0:
        COMM.Barrier()  # so the others find what it had to fetch
    model = run.model
    require(run.loader, "one process evaluates or continues a prompt: python train_gpt2.py")

    args = vars(run.args) | {"output_dir": "", "sample_every": 0}  # which may differ
    facts = repr([args, run.data, run.step]).encode()
    same = len(set(model.together(zlib.crc32(facts, zlib.crc32(model.flat[0]))))) == 1
    require(same, "the processes differ in flags, data or weights: give all the same files")
    print_now(f"processes: {SIZE}, with so many threads and so much memory each")

    run.loader = SharedLoader(run.loader)
    run.signals = model.signals
    rows = model.flat[2:, model.own]
    model.windows = [MPI.Win.Create(row, row.itemsize, comm=COMM) for row in rows]
    with gpt2.noted(model.asked):
        complete = gpt2.train(run)
        for window in model.windows:
            window.Free()  # when all are here: from one that had left MPI, none could read
        gpt2.finish(run, complete)
    return 0 if complete else 128 + run.signals[0]


def main(argv=()):
    """The command line of one of the processes. Returns the exit code."""
    gpt2.THREADS = gpt2.threads_wanted(COMM.Split_type(MPI.COMM_TYPE_SHARED).size)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="train_gpt2")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        argv = [*argv, "--sample_every", "0"]  # nobody would read it
    code = 1
    try:
        return train_together(argv)
    except (SystemExit, KeyboardInterrupt) as error:  # all that is to be said has been said
        code = getattr(error, "code", 130)
    except (gpt2.InputError, OSError, MemoryError) as error:
        time.sleep(min(RANK, 1))  # the first may be about to say the same, and to end all
        print_now(f"error: {error}", to="stderr")
    except Exception:
        print_now(traceback.format_exc(), to="stderr")
    time.sleep(0.5)  # for mpiexec to pass it on
    COMM.Abort(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal can't show
    sys.exit(main(sys.argv[1:]))
