"""The first seconds of a run: its config and the server's process, before all else is imported."""
from pathlib import Path

from support.config import MultimodalRLConfig, command_line, mistakes


def begin(program: str) -> MultimodalRLConfig:
    """The config that the command line asks for, whose server starts if it is to be ours.

    A mistake in the words or in the file is one line, and exit code 2.
    """
    with mistakes():
        config = command_line(program)
        print(f"waiting for the vLLM server at {config.url}, with {config.model}", flush=True)
        from support import vllm_process  # after that line, which it would delay
        vllm_process.start_early(config, Path(f"{config.run_dir}-vllm.log"))
        return config
