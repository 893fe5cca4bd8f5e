"""Python processes that start at once: forks of one process that has imported everything.

A run of the tests starts some eighty Python processes (trainers, ranks under torchrun, vLLM's API
servers, engines and workers), and most of their time would go to importing torch, transformers and
vLLM. So one process, the nursery, imports these once, and a Python process is then a fork of it:

    command --- arguments, folder, environment, open files --> nursery --- fork --> real process
       <------- its process id, and in the end its exit code ----

`python()` starts a nursery and yields the path of the command, which takes `FILE`, `-m MODULE` and
`-c CODE` as Python does (and becomes Python itself for all else). It passes signals on and ends as
the real process ends; when it is killed, the nursery kills the real process and its group. The code
that runs and its arguments are those of a usual Python process; only its imports came earlier.
"""
import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.spawn
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from pathlib import Path

MODULES = ["train", "support.check", "torch.distributed.run",
           "vllm.distributed.weight_transfer.ipc_engine",
           "vllm.distributed.weight_transfer.nccl_engine",
           "vllm.entrypoints.launchers.api_server.entry", "vllm.v1.engine.async_llm",
           "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor",
           "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2_vl"]
PASSED_ON = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@contextlib.contextmanager
def python(folder: Path):
    """Start a nursery; yields the path of its command. Both are of use until the context ends."""
    command = folder / "python"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" '
                       f'"{sys.executable}" "{folder}/socket" "$@"\n')
    command.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener, open(folder / "log", "w") as log:
        listener.bind(f"{folder}/socket")
        listener.listen(100)  # commands that come before all is imported wait
        nursery = subprocess.Popen(
            [sys.executable, "-c", "import processes; processes.nursery()", command,
             str(listener.fileno())], pass_fds=[listener.fileno()], stdin=subprocess.PIPE,
            stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
                              "OPENBLAS_NUM_THREADS": "1"})  # a fork inherits no threads
    try:
        yield str(command)
    finally:
        nursery.stdin.close()
        nursery.wait()


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """A signal, at once, to the real process of a command, which ends as soon as that has ended."""
    if process.poll() is None:
        name = Path(f"/proc/{process.pid}/comm").read_text().strip()
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(int(name) if name.isdigit() else process.pid, number)


# ---- in the command

def command(python: str, address: str, *words: str) -> None:
    """Let the nursery run Python with these words; from the outside, be that process."""
    if not run_as([*words]):
        os.execv(python, [python, *words])
    files = [number for number in map(int, os.listdir("/proc/self/fd"))
             if is_inherited(number)]
    request = {"words": words, "folder": os.getcwd(), "environment": {**os.environ},
               "files": files}
    with socket.socket(socket.AF_UNIX) as nursery:
        nursery.connect(address)
        socket.send_fds(nursery, [b"."], files)
        nursery.sendall(json.dumps(request).encode() + b"\n")
        for number in files:  # who waits for the end of a pipe waits for the real process alone
            os.close(number)
        answers = nursery.makefile()
        pid = int(answers.readline())
        Path("/proc/self/comm").write_text(str(pid))  # what `kill` reads
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        code = int(answers.readline())
    if code < 0 and -code in PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def is_inherited(number: int) -> bool:
    """Whether a file was opened by the process that started this one."""
    try:
        return os.get_inheritable(number)
    except OSError:  # it was closed meanwhile
        return False


def run_as(words: list[str]):
    """("-m", MODULE, arguments), ("-c", CODE, arguments) or ("", FILE, arguments); or None."""
    while words and words[0] in ("-B", "-u"):
        words = words[1:]
    if len(words) > 1 and words[0] in ("-m", "-c"):
        return words[0], words[1], words[2:]
    return ("", words[0], words[1:]) if words and not words[0].startswith("-") else None


# ---- in the nursery, and in the process that is forked from it

def nursery() -> None:
    """Import everything, then fork for every command, until stdin ends, as it does with its owner.
    """
    import setproctitle
    path, descriptor = sys.argv[1], int(sys.argv[2])
    setproctitle.setproctitle("nursery")  # finds its place while the environment is untouched
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()  # no collection writes to the memory that all forks share
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"{len(threads)} threads, of which a fork would have one"
    listener, events, running = socket.socket(fileno=descriptor), selectors.DefaultSelector(), {}
    events.register(sys.stdin, selectors.EVENT_READ)
    events.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj is sys.stdin:
                for pid in running:
                    end_group(pid)
                os._exit(0)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                request, files = receive(connection)
                if not request:  # the command was killed before it could say what it wants
                    connection.close()
                    continue
                if not (pid := os.fork()):
                    end_after(become, path, request, files)
                for number in files:
                    os.close(number)
                running[pid] = connection
                answer(connection, pid)
                events.register(connection, selectors.EVENT_READ, pid)
                events.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            elif key.fileobj is running[key.data]:  # the command was killed
                events.unregister(key.fileobj)
                end_group(key.data)
            else:  # the process has ended
                events.unregister(key.fileobj)
                os.close(key.fileobj)
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                connection = running.pop(key.data)
                with contextlib.suppress(KeyError):  # else the command was killed before
                    events.unregister(connection)
                answer(connection, code)
                connection.close()


def receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """What a command asks for, and the files that it has open; (None, []) if it is gone."""
    _, files, _, _ = socket.recv_fds(connection, 1, 250)
    with connection.makefile() as lines:
        line = lines.readline()
    if not line.endswith("\n"):
        for number in files:
            os.close(number)
        return None, []
    return json.loads(line), files


def answer(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the command may have been killed
        connection.sendall(f"{number}\n".encode())


def end_group(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # if it had no time to make a group
        os.killpg(pid, signal.SIGKILL)


def end_after(action, *arguments) -> None:
    """End this process as Python does, but do not take down all that the nursery has imported."""
    code = 0
    try:
        action(*arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and code is not end.code:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # waits for threads, as multiprocessing's forks do
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def become(path: str, request: dict, files: list[int]) -> None:
    """In the fork: be the Python process that was asked for."""
    os.setsid()
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, 1000) for number in files]
    os.closerange(0, 1000)
    for number, wanted in zip(moved, request["files"], strict=True):
        os.dup2(number, wanted)
        os.close(number)
    os.chdir(request["folder"])
    before = os.environ["PYTHONPATH"].split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    if "OMP_NUM_THREADS" in os.environ:  # else read when torch is imported
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.executable = path  # its own Python processes are such forks, too
    multiprocessing.spawn.set_executable(path)
    kind, name, arguments = run_as(request["words"])
    sys.modules["setproctitle"].setproctitle(" ".join([path, *request["words"]]))
    sys.argv = [kind or name, *arguments]
    folder = os.getcwd() if kind == "-m" else "" if kind else str(Path(name).resolve().parent)
    after = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [folder, *after, *(p for p in sys.path if p not in ("", *before))]
    if kind == "-m":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(name, vars(main))
    else:
        runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    command(*sys.argv[1:])
