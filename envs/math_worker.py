"""Whether two answers are the same mathematics, asked of math-verify in processes of its own.

A policy may answer 9^(9^(9^9)). Working that out never ends, holds Python's lock meanwhile, and
would stop the whole trainer. So a worker has a few seconds for each pair, and is ended by a signal
that needs no lock; an answer that takes longer is not right.
"""
import importlib.util
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress

SECONDS = 10
MEMORY = 2**32  # bytes, of a worker
IDLE = queue.SimpleQueue()  # workers that wait for a question
PLACES = threading.BoundedSemaphore(os.cpu_count() or 1)


def same(answer: str, completion: str) -> bool:
    """Whether a completion ends with this answer, both in LaTeX or plain.

    ValueError if the answer cannot be read.
    """
    with PLACES:
        try:
            worker = IDLE.get_nowait()
        except queue.Empty:
            worker = start()
        said = ""
        with suppress(BrokenPipeError):
            worker.stdin.write(json.dumps([answer, completion]) + "\n")
            worker.stdin.flush()
            said = worker.stdout.readline()
        if not said:  # out of time, or of memory
            worker.communicate()
            return False
        IDLE.put(worker)
    found = json.loads(said)
    if found is None:
        raise ValueError(f"{answer!r:.80} is nothing that math-verify can read")
    return found


def start() -> subprocess.Popen:
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("the reward 'math' needs the package math-verify: "
                         "pip install math-verify")
    worker = subprocess.Popen([sys.executable, __file__, str(SECONDS)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              start_new_session=True)
    if worker.stdout.readline() != "ready\n":
        raise RuntimeError(f"{__file__} does not start: exit code {worker.wait()}")
    return worker


def main() -> None:
    """Answer each line [answer, completion] with true, false, or null: the answer is unreadable."""
    import logging

    from math_verify import parse, verify

    logging.disable()  # it warns that its own limits of time are off
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever it is doing
    print("ready", flush=True)
    for line in sys.stdin:
        signal.alarm(int(sys.argv[1]))
        answer, completion = json.loads(line)
        wanted = parse(f"${answer}$", parsing_timeout=None)
        found = None
        if wanted:
            found = verify(wanted, parse(completion, parsing_timeout=None), timeout_seconds=None)
        signal.alarm(0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
