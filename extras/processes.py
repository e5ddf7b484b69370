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

import json
import math
import os
import sys
import time
import traceback
import warnings
import zlib

import numpy as np

import train_gpt2 as gpt2
from train_gpt2 import adamw, print_now, require

PIECE = 1 << 20  # numbers that are sent at a time


class SharedGPT2(gpt2.GPT2):
    """A GPT-2 that several processes train by train_step. What one of them calls, all must call.

    comm      MPI's communicator of all processes, the same for every model
    parts     the slices of the flat vector that they own; `own` is that of this process
    asked     the numbers of the signals that have come to this process
    signals   those that all processes know of
    """

    comm = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts = gpt2.cut(self.flat.shape[1], self.comm.size)
        self.lengths = [part.stop - part.start for part in self.parts]
        self.own = self.parts[self.comm.rank]
        self.asked, self.signals = [], []

    def together(self, number):
        """A list of one number of each process. Here all learn of a signal that came to one, so all
        leave the loop at the same place.
        """
        every = np.empty((self.comm.size, 2))
        self.comm.Allgather(np.array([number, (self.asked or [0])[0]], float), every)
        self.signals += {int(signal) for signal in every[:, 1]} - {0, *self.signals}
        return every[:, 0].tolist()

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean loss of all processes' batches. The gradients will be those of this mean."""
        size = self.comm.size
        loss = super().forward(inputs, targets, train, grad_scale / size)
        return sum(self.together(loss)) / size

    def batch_losses(self, inputs, targets):
        """The loss of each token of B rows for each process, (B * processes, T), in nats."""
        start = self.comm.rank * self.batch_size
        rows = slice(start, start + self.batch_size)
        self.forward(inputs[rows], targets[rows], train=False)
        losses = np.empty(inputs.shape, self.blob.dtype)
        self.comm.Allgather(self.acts["losses"], losses)
        return losses

    def grad_norm(self):
        """The norm of the sum of all gradients, of which this process has its own part afterwards.

        MPI takes what goes to the owners side by side. It is copied there, a piece of each part at
        a time, so that there is no second copy of the whole.
        """
        size = self.comm.size
        width = min(PIECE // size, max(self.lengths))
        side_by_side = np.zeros((size, width), self.blob.dtype)
        total = np.empty(width, self.blob.dtype)
        with self.whole("grad_norm()", "gradients"):
            for start in range(0, max(self.lengths), width):
                pieces = [self.flat[1, part][start : start + width] for part in self.parts]
                for row, piece in zip(side_by_side, pieces, strict=True):
                    row[: len(piece)] = piece
                self.comm.Reduce_scatter_block(side_by_side, total)
                own = pieces[self.comm.rank]
                own[...] = total[: len(own)]
            squares = gpt2.sum_of_squares(self.flat[1, self.own])
            return math.sqrt(sum(self.together(squares)))

    def update(self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, step=None,
               grad_scale=1.0):  # fmt: skip
        """After grad_norm: GPT2.update of this part. The others then come from their owners."""
        from mpi4py import MPI

        step = self.updates + 1 if step is None else step
        with self.whole("update()", "gradients"):
            self.keys = []  # they are those of the old parameters
            for name, place in gpt2.places(self.param_table).items():
                decay = learning_rate * weight_decay if self.is_decayed(name) else 0.0
                part = slice(max(place.start, self.own.start), min(place.stop, self.own.stop))
                if part.start < part.stop:
                    p, g, m, v = self.flat[:, part]
                    adamw(p, g, m, v, decay, learning_rate, beta1, beta2, eps, step, grad_scale)
            starts = [part.start for part in self.parts]
            self.comm.Allgatherv(MPI.IN_PLACE, [self.flat[0], (self.lengths, starts)])
            self.updates = step
            self.micro_batch = 0

    def generate(self, *args):
        """GPT2.generate, in the first process. The others have nothing to say."""
        return super().generate(*args) if self.comm.rank == 0 else iter(())

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
    """A loader that gives each process in turn one of another's batches. B and position are those
    of all processes.
    """

    def __init__(self, loader, comm):
        self.loader, self.comm = loader, comm
        self.B, self.T = loader.B * comm.size, loader.T

    @property
    def position(self):
        return self.loader.position

    def next_batch(self):
        batches = [self.loader.next_batch() for _ in range(self.comm.size)]
        return batches[self.comm.rank]


def train_together(argv, comm, MPI):
    """Train, in each process. Returns the exit code, the same in all."""
    if comm.rank > 0:
        comm.Barrier()
    run = gpt2.open_run(argv, SharedGPT2, first=comm.rank == 0)
    if comm.rank == 0:
        comm.Barrier()  # so the others find what it had to fetch
    args, model = run.args, run.model
    require(not args.inference_only, "one process continues a prompt: python train_gpt2.py")

    facts = json.dumps([vars(args) | {"output_dir": ""}, run.data, run.step])
    for what, found in ("flags or data", facts.encode()), ("weights", model.flat[0]):
        same = len(set(model.together(zlib.crc32(found)))) == 1
        require(same, f"the processes have different {what}: give all machines the same files")
    print_now(f"processes: {comm.size}, with so many threads and so much memory each")

    if run.loader:
        run.loader = SharedLoader(run.loader, comm)
    else:
        args.batch_size *= comm.size  # the rows that are evaluated at a time
    run.signals = model.signals
    gpt2.note_signals(model.asked)
    rows = model.flat[2:, model.own]
    model.windows = [MPI.Win.Create(row, row.itemsize, comm=comm) for row in rows]
    complete = gpt2.train(run)
    for window in model.windows:
        window.Free()  # when all are here: from one that had left MPI, the first could not read
    if comm.rank == 0:
        gpt2.finish(run, complete)
    return 0 if complete else 128 + run.signals[0]


def main(argv=()):
    """The command line of one of the processes. Returns the exit code."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        print_now(f"error: no mpi4py: {error}: pip install mpi4py mpich", to="stderr")
        return 1
    comm = SharedGPT2.comm = MPI.COMM_WORLD
    SharedGPT2.PROCESSES = comm.size
    gpt2.THREADS = gpt2.threads_wanted(comm.Split_type(MPI.COMM_TYPE_SHARED).size)
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="train_gpt2")

    if comm.rank > 0:
        sys.stdout = open(os.devnull, "w")
    try:
        return train_together(argv, comm, MPI)
    except (SystemExit, KeyboardInterrupt) as error:  # all that is to be said has been said
        code, message = getattr(error, "code", 130), ""
    except (gpt2.InputError, OSError, MemoryError) as error:
        code, message = 1, f"error: {error}\n"
    except BaseException:
        code, message = 1, traceback.format_exc()
    if comm.rank > 0:
        time.sleep(1)  # the first may be about to say the same, and to end all
    print_now(message, end="", to="stderr")
    time.sleep(0.5)  # for mpiexec to pass it on
    comm.Abort(code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a sample may hold what a terminal can't show
    sys.exit(main(sys.argv[1:]))
