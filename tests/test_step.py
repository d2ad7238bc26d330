"""The training step, on any device: no float64, no waiting, one graph, bf16 that follows fp32."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, environment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import sample
import train
from model import DiT

SIZES = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}


def small_model(**sizes):
    return DiT(**{**SIZES, **sizes}, class_names=["a", "b"])


class Refuse64(TorchDispatchMode):
    """Fails where a float64 tensor on a device comes out of an operation: MPS has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_flatten(out)[0]:
            assert not (torch.is_tensor(x) and x.dtype == torch.float64), function
        return out


def test_step_validation_and_sampling_need_no_float64(pictures, tmp_path):
    settings = [*SMALL, "--dataset", str(pictures), "--steps", "3", "--batch-size", "6"]
    with Refuse64():
        with pytest.raises(AssertionError):
            torch.zeros(1, dtype=torch.float64)
        train.main([*settings, "--out-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "samples" / "step-000003.png").exists()


class Reads(TorchDispatchMode):
    """Counts what reads a number out of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_sampling_reads_nothing_back_on_the_way():
    model, noise = small_model(), torch.randn(2, 3, 16, 16)
    with Reads() as reads:
        z = sample.sample_conditional_cfg(model, torch.tensor([0, 1]), 7, 3.0, noise)
        assert reads.count == 0
        z.sum().item()
    assert reads.count == 1


COUNT_READS = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train
from test_step import Reads

settings = sys.argv[1:]
for steps in (12, 19):
    with Reads() as reads:
        train.main([*settings, "--steps", str(steps), "--out-dir", f"out{{steps}}"])
    print("reads:", reads.count)
"""


def test_steps_between_looks_at_the_loss_read_nothing_back(pictures, tmp_path):
    """What reads a number out of a tensor makes the CPU wait for a GPU: none of that in a step."""
    # Of 12 and of 19 steps: at LOG_EVERY's step 10 and at the end numbers are read.
    code = COUNT_READS.format(root=str(ROOT))
    command = [sys.executable, "-c", code, *SMALL, "--dataset", str(pictures)]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    out = subprocess.run(command, **options, check=True).stdout
    first, second = map(int, re.findall(r"reads: (\d+)", out))
    assert first > 5 and second == first


def count_compilations(*batch_sizes):
    """Compile a model that must be one graph; how often, for batches of these sizes."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = small_model()
    model.compile(backend=backend, fullgraph=True)  # a break in the graph is an error
    for n in batch_sizes:
        z = torch.randn(n, 3, 16, 16)
        y, t = torch.zeros(n, dtype=torch.long), torch.rand(n)
        train.rectified_flow_loss(model, z, y, t, z).backward()
    return len(graphs)


def test_the_compiled_network_is_one_graph_and_stays_it():
    assert count_compilations(4, 4, 4, 4, 4) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_training_in_bf16_follows_training_in_fp32():
    device, losses = torch.device("cuda"), {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = small_model(dim=64).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(32, 3, 16, 16, device=device, generator=generator) * 2 - 1
        y = torch.randint(2, (32,), device=device, generator=generator)
        losses[bf16] = []
        for _ in range(100):
            noise = torch.randn(x.shape, device=device, generator=generator)
            t = torch.rand(len(x), device=device, generator=generator)
            with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
                loss = train.rectified_flow_loss(model, x, y, t, noise)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[bf16].append(loss.item())
    assert losses[True] == pytest.approx(losses[False], rel=0.03)
