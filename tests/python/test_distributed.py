"""Two processes with gloo, started by torchrun: DistributedDataParallel, FSDP2, distributed checkpoints.

The checks themselves are in distributed_checks.py, which runs once for all of them; each is reported here by itself.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("distributed_checks.py")
CHECKS = re.findall(r"^def check_(\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo"
    ),
]


@dataclasses.dataclass
class Run:
    """What the two processes left: their folder, what each rank reports, and everything they printed."""

    folder: Path
    ranks: list[dict[str, object]]
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs all checks once."""
    folder = tmp_path_factory.mktemp("distributed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "USE_LIBUV": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # Not --standalone, which would look up the machine's own name: all of it stays on the loopback interface.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(folder)],
        env=environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    files = [folder / f"rank{rank}.json" for rank in range(2)]
    ranks = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if done.returncode != 0 or len(ranks) != 2:
        pytest.fail(f"the processes ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return Run(folder, ranks, done.stdout)


def test_there_are_checks() -> None:
    assert len(CHECKS) > 10


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(name: str, run: Run) -> None:
    for rank, report in enumerate(run.ranks):
        results = report["results"]
        assert isinstance(results, dict)
        assert results[f"check_{name}"] is None, f"rank {rank}: {results[f'check_{name}']}"


def test_masks_are_the_same_before_the_processes_meet(run: Run) -> None:
    assert run.ranks[0]["digest"] == run.ranks[1]["digest"]


def test_nothing_warns_of_a_leak(run: Run) -> None:
    assert "destroy_process_group" not in run.output
    assert "unused parameters" not in run.output.lower()


def test_a_sharded_checkpoint_loads_into_one_process(run: Run) -> None:
    import torch.distributed.checkpoint as dcp
    from distributed_checks import Net, data, exact

    net, expected = Net(seed=1), exact(Net(seed=21))
    state = {"model": net.state_dict()}
    dcp.load(state, checkpoint_id=str(run.folder / "sharded"), no_dist=True)
    net.load_state_dict(state["model"])
    for (name, ours), theirs in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    x, _ = data()
    assert torch.equal(net(x), expected(x))


def test_a_replicated_checkpoint_loads_into_one_process(run: Run) -> None:
    import torch.distributed.checkpoint as dcp
    from distributed_checks import Net
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = Net(seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.5)
    state = {"model": net.state_dict(), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(state, checkpoint_id=str(run.folder / "replicated"), no_dist=True)
    net.load_state_dict(state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])
    expected = torch.load(run.folder / "replicated.pt", weights_only=True)
    for name, ours in net.state_dict().items():
        assert torch.equal(ours, expected[name]), name
    assert all("momentum_buffer" in optimizer.state[parameter] for parameter in net.parameters())
