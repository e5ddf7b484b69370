"""Programs, each for something that few need: python -m extras.NAME --help"""

import argparse
import os
import sys

from train_gpt2 import InputError


def command_line(name, about):
    """A parser for python -m extras.NAME. `about`, the file's docstring, is what --help prints."""
    return argparse.ArgumentParser(
        prog=f"python -m extras.{name}",
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def exit_code_of(work, *args):
    """Call work(*args), which is all that a program does, and return the program's exit code.

    That is what work returned, 0 if this is None; 1 after an error that its user can mend, which is
    said in one line; 130 after Ctrl-C; 0 if the reader of the output has enough, as in `| head`.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a token may hold what a terminal can't show
    try:
        exit_code = work(*args) or 0
        print(end="", flush=True)  # now, because Python would write the rest with a traceback
        return exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped: run it again", file=sys.stderr)
        return 130
    except (InputError, OSError, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
