"""A run over two processes of torchrun gives the result of one process to rounding, and one of the two writes.

This file is also the program that torchrun starts: ``torchrun … test_ablation_distributed.py FOLDER STOP``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ablation_support import environment, tiny_data, tiny_study
from torch import nn

from torch_pnn.ablation import distributed, progress, runner, training
from torch_pnn.ablation.records import Store, read

#: 64 training images in batches of 21: 21, 21, 21, and one that is left for both processes.
STUDY = tiny_study(epochs=3, batch_size=21, seeds=(0,), arms=("pnn", "control"), learning_rate=0.02)
INVOCATION = {"command": "", "started": "", "jobs": 1, "environment": {}}


def _keep_state(folder):
    """Saves each run's final state beside the rows, from every process."""
    plain = training.state_sha256

    def keep(model):
        if distributed.is_active() or folder.name == "alone":
            torch.save(model.state_dict(), folder / f"state {distributed.rank()}.pt")
        return plain(model)

    training.state_sha256 = keep


def _program(folder, dies_after):
    folder.mkdir(exist_ok=True)
    _keep_state(folder)
    distributed.start(STUDY.device)
    store = Store(folder, STUDY, "ab" * 32, INVOCATION) if distributed.rank() == 0 else None
    shown = progress.make_progress(STUDY.runs, 2, 3)
    if store is not None and dies_after:
        add, rows = store.add_epoch, []

        def add_epoch(row):
            rows.append(row)
            if len(rows) > dies_after:
                os._exit(9)
            return add(row)

        store.add_epoch = add_epoch
    runner.execute(STUDY, tiny_data(), store, shown, 1)
    if store is not None:
        store.close()
    distributed.stop()


def _torchrun(folder, dies_after=0):
    variables = environment(GLOO_SOCKET_IFNAME="lo", USE_LIBUV="1")
    variables["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), variables["PYTHONPATH"]])
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *(__file__, str(folder), str(dies_after)),
        ],
        env=variables,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch):
    together, alone = tmp_path / "together", tmp_path / "alone"
    cut = _torchrun(together, dies_after=2)
    assert cut.returncode != 0
    assert len(read(together).epochs) == 2
    done = _torchrun(together)
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(training, "state_sha256", training.state_sha256)
    _program(alone, 0)
    one, two = read(alone), read(together)
    assert two.missing == []
    assert one.results[0]["continued_after"] == []
    assert two.results[0]["continued_after"] in ([1], [2])  # the second process may have been ended a little earlier
    for first, second in zip(one.results, two.results, strict=True):
        assert second["status"] == "finished"
        for name in ("arm", "seed", "initial_sha256", "parameters", "macs", "epochs", "total"):
            assert first[name] == second[name], name
        assert second["test_loss"] == pytest.approx(first["test_loss"], rel=1e-3)
    for first, second in zip(one.epochs, two.epochs, strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)
        assert second["train_accuracy_running"] == pytest.approx(first["train_accuracy_running"], abs=0.05)
    states = [torch.load(path, weights_only=True) for path in (alone / "state 0.pt", together / "state 0.pt")]
    other = torch.load(together / "state 1.pt", weights_only=True)
    assert states[0].keys() == states[1].keys() == other.keys()
    for name, value in states[0].items():
        assert torch.equal(states[1][name], other[name]), name  # both processes have the same bits
        close = 0.2 if name.endswith("running_var") else 2e-3  # the last batch, of one image, counts twice in it
        torch.testing.assert_close(
            states[1][name], value, rtol=close, atol=2e-4, msg=lambda text, name=name: name + text
        )
    assert "[2/2]" in done.stderr
    assert done.stderr.count("control, seed 0") == 1


def test_moments_are_those_of_the_whole_batch_in_one_process():
    """With one process, the synchronised layer is PyTorch's own, in training and in tests."""
    torch.manual_seed(0)
    theirs, ours = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    distributed.synchronised(ours)
    assert type(ours) is distributed._BatchNorm
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for _ in range(3):
            x = torch.randn(4, 3, 5, 6) * 3 + 1
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            outputs = [layer(value) for layer, value in zip((theirs, ours), inputs, strict=True)]
            torch.testing.assert_close(outputs[1], outputs[0])
            weights = torch.randn_like(x)
            grads = [
                torch.autograd.grad((output * weights).sum(), [value, *layer.parameters()])
                for layer, output, value in zip((theirs, ours), outputs, inputs, strict=True)
            ]
            for first, second in zip(*grads, strict=True):
                torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    finally:
        dist.destroy_process_group()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_shares_of_a_batch():
    data = tiny_data()

    def batches(share):
        return [x for x, _ in data.train_batches(21, epoch=1, order=0, augmentation=0, share=share)]

    whole, parts = batches((0, 1)), [batches((number, 3)) for number in range(3)]
    assert [len(batch) for batch in whole] == [21, 21, 21, 1]
    for place, batch in enumerate(whole):
        pieces = [part[place] for part in parts]
        if len(batch) == 1:  # too small to be shared: everybody's
            assert all(torch.equal(piece, batch) for piece in pieces)
        else:
            assert torch.equal(torch.cat(pieces), batch)


if __name__ == "__main__":
    _program(Path(sys.argv[1]), int(sys.argv[2]))
