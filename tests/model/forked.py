"""As torch.distributed.run, on CPUs: ranks are forked from a process that has the imports already.

    python -m tests.model.forked COUNT SCRIPT [ARGUMENT ...]

They take seconds per process, often more than what a small model does after them.
"""

import os
import runpy
import signal
import sys
from datetime import timedelta

import torch.distributed as dist
from transformers import Trainer  # noqa: F401  for the ranks, as all of what the helpers import

import tests.model.helpers  # noqa: F401


def start(rank: int, script: str) -> int:
    """The process of one rank."""
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(count: int, script: str) -> int:
    """The ranks' store is in this process, which outlives them all; the first failure ends them."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = {start(rank, script) for rank in range(count)}
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.discard(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    ranks = int(sys.argv[1])
    del sys.argv[:2]  # the script finds its own
    sys.exit(main(ranks, sys.argv[0]))
