"""
Several processes, on one machine or on several, train one model.

    pip install mpi4py mpich
    mpiexec -n 4 python train_gpt2.py ...

starts the trainer four times. Each process has all parameters and all gradients, and takes its own
batches. And each owns a quarter of the flat vector: it alone updates that part of the parameters,
and it alone has AdamW's m and v for it. It never touches the rest of m and v, which therefore costs
no memory (ZeRO, stage 1; Rajbhandari et al., 2020). The processes exchange numbers by MPI.

The training loop knows nothing of this. It is given a model whose forward, grad_norm and update are
those of all processes together, and a loader that gives each process its own batches.
"""

import contextlib
import json
import math
import os
import sys
import threading
import time
import zlib

import numpy as np

PIECE = 1 << 20  # elements that are sent at a time
PATIENCE = 60.0  # seconds without an answer, after which a process says what it waits for


def join():
    """The Processes that mpiexec has started. ValueError if mpi4py is missing."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"mpiexec needs mpi4py, which is not there ({error}): pip install mpi4py mpich"
        ) from None
    return Processes(MPI.COMM_WORLD, MPI)


def say(line):
    """Print a line on stderr at one go, so that it doesn't mix with those of other processes."""
    if sys.stderr:  # None, if it was closed before the program began
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class Processes:
    """All processes of a run.

    comm         MPI's communicator
    rank, size   this is number `rank` of `size` processes
    local_size   how many of them share this machine
    asked        the numbers of the signals that have come to this process
    stopped      those that all processes know of
    """

    def __init__(self, comm, MPI):
        self.comm = comm
        self.MPI = MPI
        self.rank = comm.rank
        self.size = comm.size
        self.local_size = comm.Split_type(MPI.COMM_TYPE_SHARED).size
        self.asked = []
        self.stopped = []
        self.waiting = None  # (what for, since when), while another process is needed
        if self.rank > 0:
            sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
        threading.Thread(target=self.watch, daemon=True).start()

    @contextlib.contextmanager
    def waiting_for(self, what):
        """While this lasts, the other processes are needed."""
        self.waiting = (what, time.monotonic())
        try:
            yield
        finally:
            self.waiting = None

    def watch(self):
        """Say on stderr if another process, or the network, has not answered for a long time."""
        said = None
        while True:
            time.sleep(min(1.0, PATIENCE / 4))
            waiting = self.waiting
            if waiting and waiting is not said and time.monotonic() - waiting[1] > PATIENCE:
                said = waiting
                say(
                    f"process {self.rank} of {self.size} has waited {PATIENCE:.0f} s for "
                    f"{waiting[0]} of the others: is one of them, or the network, gone?"
                )

    def gathered(self, value, what):
        """A list of one value of each process."""
        with self.waiting_for(what):
            return self.comm.allgather(value)

    # What the command line needs

    def difference(self, facts):
        """A text that says in which of the facts {name: value} the processes differ, or ""."""
        text = {name: json.dumps(value, sort_keys=True) for name, value in facts.items()}
        hashes = {name: zlib.crc32(value.encode()) for name, value in text.items()}
        for rank, other in enumerate(self.gathered(hashes, "the settings")):
            for name in hashes:
                if other[name] != hashes[name]:
                    return f"process {rank} has other {name} than process {self.rank}"
        return ""

    def share_model(self, model):
        """The model of all processes."""
        return SharedModel(self, model)

    def share_loader(self, loader):
        """A loader of which each process gets its own batches."""
        return SharedLoader(self, loader)

    def part(self, n, rank=None):
        """The slice of a vector of n elements that a process owns: this one, or another."""
        rank = self.rank if rank is None else rank
        width = math.ceil(n / self.size)
        return slice(min(n, rank * width), min(n, (rank + 1) * width))

    def pieces(self, row):
        """A row of m or v (n,), piece by piece, for process 0. The other processes send theirs."""
        for owner in range(self.size):
            part = row[self.part(len(row), owner)]
            for start in range(0, len(part), PIECE):
                piece = part[start : start + PIECE]
                with self.waiting_for("a checkpoint's part"):
                    if owner > 0 and self.rank == owner:
                        self.comm.Send(piece, dest=0)
                    if owner > 0 and self.rank == 0:
                        piece = np.empty_like(piece)
                        self.comm.Recv(piece, source=owner)
                yield piece

    def report(self, line):
        """Print an error, once if all processes have the same one."""
        if self.rank > 0:
            time.sleep(1)  # process 0 may be about to say the same, and to end this one
        say(line)

    def end_all(self, code):
        """End all processes because this one can't go on."""
        time.sleep(0.5)  # so that mpiexec passes on what was printed, before it ends everything
        self.comm.Abort(code)
        return code


class SharedLoader:
    """A loader that gives each process in turn one of the batches of another loader."""

    def __init__(self, processes, loader):
        self.processes = processes
        self.loader = loader

    @property
    def position(self):
        return self.loader.position

    def seek(self, position):
        self.loader.seek(position)

    def next_batch(self):
        batches = [self.loader.next_batch() for _ in range(self.processes.size)]
        return batches[self.processes.rank]


class SharedModel:
    """A model that several processes train together, with those methods of GPT2 that a run uses."""

    def __init__(self, processes, model):
        self.processes = processes
        self.model = model
        self.config, self.flat = model.config, model.flat
        self.params, self.grads, self.acts = model.params, model.grads, model.acts
        self.own = processes.part(len(model.flat[0]))

    def together(self, value, what):
        """A list of one value of each process.

        All processes learn here of the signals that have come to one of them. So all leave the loop
        at the same place.
        """
        asked, stopped = self.processes.asked, self.processes.stopped
        values = self.processes.gathered((value, asked), what)
        for _, signals in values:
            stopped += [number for number in signals if number not in stopped]
        return [value for value, _ in values]

    def forward(self, inputs, targets, train=True, grad_scale=1.0):
        """The mean loss of all processes' batches; the gradients will be those of this mean."""
        size = self.processes.size
        loss = self.model.forward(inputs, targets, train, grad_scale / size)
        return sum(self.together(loss, "the loss")) / size

    def backward(self):
        self.model.backward()

    def grad_norm(self):
        """Add up the gradients of all processes. Each part of the sum goes to its owner."""
        self.sum_gradients(self.flat[1])
        squares = self.together(self.model.grad_norm(self.own) ** 2, "the gradient's norm")
        return math.sqrt(sum(squares))

    def update(self, learning_rate, **kwargs):
        """Update the part of this process, and fill in those that other processes have updated."""
        self.model.update(learning_rate, part=self.own, **kwargs)
        n, processes = len(self.flat[0]), self.processes
        parts = [processes.part(n, rank) for rank in range(processes.size)]
        starts = [part.start for part in parts]
        lengths = [part.stop - part.start for part in parts]
        with processes.waiting_for("the parameters"):
            in_place = processes.MPI.IN_PLACE
            processes.comm.Allgatherv(in_place, [self.flat[0], (lengths, starts)])

    def sum_gradients(self, grads):
        """Replace this process's part of the gradients (n,) by its sum over all processes.

        MPI takes the pieces for all owners side by side. They are copied there, a piece of each
        part at a time, so that there is no second copy of the whole.
        """
        processes = self.processes
        size, n = processes.size, len(grads)
        parts = [grads[processes.part(n, rank)] for rank in range(size)]
        side_by_side = np.zeros((size, PIECE // size), grads.dtype)
        total = np.empty(PIECE // size, grads.dtype)

        with processes.waiting_for("the gradients"):
            for start in range(0, len(parts[0]), len(total)):
                piece = slice(start, start + len(total))
                for rank, part in enumerate(parts):
                    side_by_side[rank, : len(part[piece])] = part[piece]
                processes.comm.Reduce_scatter_block(side_by_side, total)
                own = parts[processes.rank][piece]
                own[...] = total[: len(own)]

    def token_losses(self, context, continuations):
        """GPT2.token_losses; each process computes some of the continuations."""
        rank, size = self.processes.rank, self.processes.size
        mine = list(continuations)[rank::size]
        losses = self.model.token_losses(context, mine) if mine else []
        theirs = self.together(losses, "the losses of a text")
        return [theirs[i % size][i // size] for i in range(len(continuations))]

    def generate(self, *args):
        """GPT2.generate, in process 0. The others have nothing to say."""
        return self.model.generate(*args) if self.processes.rank == 0 else iter(())
