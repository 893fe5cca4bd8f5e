"""The vLLM process and its weights: start it, wait for it, stop it, send it the trainer's weights.

`python sync.py @ config.toml` runs the server alone, as vf-vllm does for verifiers. Weights travel
by vLLM's own RL API and engines: NCCL between GPUs, CUDA IPC within one, and on a CPU the NCCL
engine over gloo. The RL routes let a caller run code: a server that is started here listens on
127.0.0.1 unless told otherwise, and asks for the secret of support/secret.py.

The server says whose weights it has (support/owner.py): another trainer's are never trained on.
"""
import contextlib
import importlib
import re
import socket
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

from torch import Tensor

from support import secret, vllm_process
from support.config import mistakes
from support.finite import is_broken, refuse_broken
from support.gloo import use_gloo
from support.http import Refusal, ServerError, call, is_healthy, was_spoiled
from support.layout import as_in_files, file_shapes
from support.owner import Lease
from support.ranks import add_up, call_on_all
from support.server_flags import server_config
from support.text import plain, print_plainly

STARTS = 3  # attempts at bringing a lost server back
PACKED_BYTES = 2**26  # of weights that travel together
# How workers say that a weight is none of their model's, by its name or by its shape.
NOT_ITS_WEIGHT = r"no module or parameter named|torch\.Size|size of tensor|dimension|shape"


class Server:
    """A config's vLLM server: the one that is up, else, inside of `with`, a process of ours.

    Ours only on this machine; its output goes to output_dir/run_name-vllm.log. ValueError if it
    cannot start, is none for this run or is another trainer's; TimeoutError if nothing answers in
    vllm_server_timeout seconds.
    """

    def __init__(self, config):
        self.config, self.url, self.patience = config, config.url, config.vllm_server_timeout
        self.log = Path(f"{config.run_dir}-vllm.log")
        self.ours = False    # whether it is ours to start and stop
        self.process = None
        self.engine = None   # the trainer's side of the weight transfer
        self.version = None  # the weights that it has; None: other ones than ours
        self.refusal = None  # what its workers said to the update at hand, if they failed at it
        self.lease = Lease(self)

    def __enter__(self) -> "Server":
        is_starting = self.url in vllm_process.EARLY
        self.ours = is_starting or (self.config.local and not is_healthy(self.url))
        try:
            if self.ours and not is_starting:
                vllm_process.check_port(self.config)
            self.start()
            if not self.ours:
                self.lease.claim()
            return self
        except BaseException as error:
            self.stop()
            if isinstance(error, ServerError):  # nothing was lost yet: this is no server for us
                raise ValueError(str(error)) from error
            raise

    def __exit__(self, *_) -> None:
        self.stop()

    def restore(self) -> None:
        """Bring a lost server back. One that is slow, or does not start, is tried again."""
        for attempts_left in reversed(range(STARTS)):
            try:
                self.start()
                break
            except (OSError, ValueError) as error:
                if not attempts_left or not self.patience:
                    raise
                print(f"{error}; trying again", flush=True)

    def start(self) -> None:
        """Start our own process (anew), or wait until somebody else's answers (again)."""
        self.stop()
        if self.ours:
            self.process = vllm_process.start(self.config, self.log)
        # What send() needs of vLLM takes seconds to import: not after the server is up.
        threading.Thread(target=import_engines, daemon=True).start()
        start, told = time.monotonic(), -5.0
        while True:
            if self.process and self.process.poll() is not None:  # what answers is another one
                raise ValueError(
                    f"vLLM ended, code {self.process.returncode} ({self.log}): "
                    + vllm_process.last_errors(self.log, self.process.log_start))
            if is_healthy(self.url):
                return
            waited = time.monotonic() - start
            if waited > self.patience:
                raise TimeoutError(f"no vLLM server at {self.url} after {waited:.0f} s (see vllm_"
                                   "server_timeout); start one: `python sync.py @ CONFIG`")
            if waited >= told + 5:
                told = waited
                doing = f": {vllm_process.last_line(self.log)}" if self.process else ""
                print(f"waiting for the vLLM server at {self.url} ({waited:.0f} s){doing}",
                      flush=True)
            time.sleep(0.25)

    def stop(self) -> None:
        """Give the server up, and end our own process, if there is one."""
        self.engine = self.version = None
        self.lease.release()
        if self.process:
            vllm_process.stop(self.process)
            secret.forget(self.url)
            self.process = None

    def call(self, route: str, body: dict | None = None, method: str = "post") -> dict:
        return call(f"{self.url}/{route}", body, method, pauses=(1,),
                    timeout=self.config.vllm_server_timeout)

    def send(self, source: "CheckpointSource") -> None:
        """One whole update, checked by its version; ServerError if anything of it fails.

        ValueError, before the server hears of it, if a weight is not finite; and if its workers
        have no such weight, which no other try would change.

        Requests in flight go on, with the new weights. Every cache is emptied: image features are
        keyed by the image alone, not by the vision tower that made them.
        """
        if isinstance(source, CheckpointSource):
            refuse_broken(source.are_broken(), source.version)
        try:
            if self.config.inference_args.get("enable_sleep_mode"):
                self.call("wake_up")
            self.lease.claim()
            self.refusal = None
            caches_are_clean = self.engine is not None and not was_spoiled(self.url)
            engine = self.engine or self.meet(source)
            # And so they stay if anything below fails: both sides then meet anew.
            self.engine = self.version = None
            self.lease.write(None)
            with self.paused():
                engine.send_weights()
                if not caches_are_clean:
                    self.clean_caches()
                self.call("reset_prefix_cache?reset_running_requests=true")
                self.call("reset_mm_cache")
                self.call("reset_encoder_cache")
                self.lease.write(source.version)
            served = self.lease.served()
            if served != self.lease.version(source.version):
                raise RuntimeError(f"it serves {plain(served)!r}")
            self.engine, self.version = engine, source.version
        except (OSError, RuntimeError) as error:
            message = f"weights {source.version} did not reach {self.url}: {self.refusal or error}"
            if self.refusal and re.search(NOT_ITS_WEIGHT, str(self.refusal)):
                raise ValueError(message) from error
            raise ServerError(message) from error

    @contextlib.contextmanager
    def paused(self):
        """No token is sampled in here. However it ends, requests go on: others may wait, too."""
        self.call("pause?mode=keep")
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError, RuntimeError):
                call(f"{self.url}/resume", timeout=10, pauses=())
            raise
        self.call("resume")

    def clean_caches(self) -> None:
        """Remove what exploded weights have left, of this trainer or of one before it."""
        with contextlib.suppress(Refusal):  # from workers of somebody's own, which cannot do it
            self.call("collective_rpc", {"method": "clean_caches"})

    def meet(self, source: "CheckpointSource"):
        """Form a new group with the server's workers; the trainer's side of it, bound to source.

        Whoever's group the workers are in now, they leave it.
        """
        from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
        self.leave_old_group()
        source.all_names = self.keeps_a_head()
        source.names_and_shapes = None
        ends = {"client": make_client(self), "source": source}
        if self.config.backend == "ipc":
            return ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(
                ipc_engine.IPCTrainerInitInfo(rank=0, packed=True), **ends)
        if self.config.backend == "gloo":
            use_gloo()
            self.call("collective_rpc", {"method": "use_gloo"})
        workers = self.call("get_world_size", method="get")["world_size"]
        address = self.own_address()
        with socket.create_server((address, 0)) as probe:
            port = probe.getsockname()[1]
        return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(
            nccl_engine.NCCLTrainerInitInfo(address, port, workers + 1, rank=0,
                                            packed_buffer_size_bytes=PACKED_BYTES), **ends)

    def keeps_a_head(self) -> bool:
        """Whether the server has a head of its own also where the files tie it to the embedding.

        Such a one stays as it was unless it is sent, and a server without one refuses it.
        """
        try:
            answers = self.call("collective_rpc", {"method": "keeps_a_head"}).get("results", ())
        except Refusal:  # from workers of somebody's own
            answers = ["True"]  # most models skip what they do not have
        return "True" in map(str, answers)

    def leave_old_group(self) -> None:
        """Free the workers from an earlier trainer, also from one that died in an update."""
        try:
            self.call("shutdown_weight_transfer_engine")
        except RuntimeError:
            with contextlib.suppress(RuntimeError):
                # An update that cannot be read makes the workers give up the unfinished one.
                self.call("update_weights", {"update_info": {}})
            self.call("shutdown_weight_transfer_engine")

    def own_address(self) -> str:
        """The address of this machine that the server can reach."""
        server = urlsplit(self.url)
        with socket.create_connection((server.hostname, server.port), 60) as connection:
            return connection.getsockname()[0]


def import_engines() -> None:
    """Import the trainer's side of vLLM's weight transfer; if it fails, meet() says why."""
    with contextlib.suppress(Exception):
        importlib.import_module("vllm.distributed.weight_transfer.ipc_engine")
        importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")


def make_client(server: Server):
    """vLLM's own client of the weight routes, which calls them as we call all others.

    It keeps what a worker says that cannot load the weights. The trainer itself only sees that
    nobody receives them any more.
    """
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    class Client(HTTPVLLMWeightSyncClient):
        def _post(self, path: str, json: dict | None = None) -> None:
            try:
                call(f"{self.base_url}/{path}", json, timeout=self.timeout, pauses=())
            except Refusal as error:
                server.refusal = error
                raise

    return Client(server.url, server.config.vllm_server_timeout)


class CheckpointSource:
    """A policy's weights as the files of its checkpoint hold them, layer by layer (a WeightSource).

    On rank 0; where ranks hold slices, the others help it. The trainer sets the version.
    """

    def __init__(self, policy):
        self.policy = policy
        self.shapes = file_shapes(policy.model)
        self.all_names = True  # whether tied weights go under each of theirs; the server knows
        self.version = 0  # the step that made the weights
        self.names_and_shapes = None

    def metadata(self) -> list:
        """vLLM's ParamMeta of each weight. They stay the same, so weights are read for it once."""
        from vllm.distributed.weight_transfer import ParamMeta
        if self.names_and_shapes is None:
            self.names_and_shapes = [ParamMeta(name, tensor.dtype, tuple(tensor.shape))
                                     for name, tensor in self]
        return self.names_and_shapes

    def __iter__(self):
        """Yields (checkpoint name, tensor); one layer at a time exists as a copy.

        No conversion of names reaches across layers.
        """
        for number in range(len(self.policy.layers())):
            weights = as_in_files(self.policy.model, self.layer(number), self.shapes,
                                  self.all_names)
            for name, tensor in weights.items():
                yield name, tensor.contiguous()

    def layer(self, number: int) -> dict[str, Tensor]:
        """The whole weights of a layer, by the model's own names."""
        call_on_all("layer", number)
        return self.policy.gather(self.policy.layers()[number])

    def are_broken(self) -> dict[str, float]:
        """{name: on how many ranks it is not finite} of all weights."""
        call_on_all("are_broken")
        weights = self.policy.model.state_dict()
        return add_up({name: float(is_broken(tensor)) for name, tensor in weights.items()},
                      self.policy.device)


def main() -> None:
    """Run the server alone until it ends, or Ctrl-C."""
    sys.excepthook = print_plainly
    with mistakes():
        config = server_config()
        if is_healthy(config.url):
            raise ValueError(f"a server is up at {config.url} already")
        with Server(config) as server:
            print(f"serving at {server.url}; Ctrl-C stops it", flush=True)
            sys.exit(server.process.wait())


if __name__ == "__main__":
    main()
