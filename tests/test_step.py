"""The training step, on any device: no float64, no waiting, one graph, bf16 that follows fp32."""

import functools
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL, call, environment
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import common
import sample
import train
from common import autocast, uses_bf16
from model import MIN_T, DiT

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


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_training_in_bf16_follows_training_in_fp32(name):
    device, losses = torch.device(name), {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = small_model(dim=64).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.rand(32, 3, 16, 16, device=device, generator=generator) * 2 - 1
        y = torch.randint(2, (32,), device=device, generator=generator)
        losses[precision] = []
        for _ in range(100):
            noise = torch.randn(x.shape, device=device, generator=generator)
            t = torch.rand(len(x), device=device, generator=generator).clamp_min(MIN_T)
            with autocast(device, precision):
                loss = train.rectified_flow_loss(model, x, y, t, noise)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


def test_precision_is_what_the_device_computes_in_unless_it_is_set(monkeypatch):
    cpu = torch.device("cpu")
    for features, expected in (
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f, raising=False)
        assert uses_bf16(cpu, "auto") is expected
        assert uses_bf16(cpu, "bf16") and not uses_bf16(cpu, "fp32")
    assert not uses_bf16(torch.device("mps"), "auto")


def unique_graphs(monkeypatch, uneven, sizes):
    """How many graphs torch.compile makes of three blocks, for micro-batches of these sizes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(COMPILE, backend="eager"))
    model = small_model(depth=3)

    def loss(n):
        z, t = torch.randn(n, 3, 16, 16), torch.rand(n).clamp_min(MIN_T)
        return train.rectified_flow_loss(model, z, torch.zeros(n, dtype=torch.long), t, z)

    common.compile_model(model, lambda: loss(sizes[0]), uneven)
    assert all(weight.grad is None for weight in model.parameters())
    for n in sizes:
        loss(n).backward()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


COMPILE = torch.compile


def test_without_torch_compile_the_model_stays_as_it_is(monkeypatch, capsys):
    def unsupported(*arguments, **options):
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", unsupported)
    model = small_model(depth=1)
    common.compile_model(model, lambda: None, uneven=False)
    assert "not supported on Python" in capsys.readouterr().err
    z, y = torch.randn(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)
    assert model(z, torch.ones(1), y).shape == z.shape


def test_uneven_micro_batches_are_compiled_once(monkeypatch):
    assert unique_graphs(monkeypatch, False, [4, 4, 4]) == 1
    assert unique_graphs(monkeypatch, True, [4, 4, 3, 3, 2]) == 1
    assert unique_graphs(monkeypatch, False, [4, 3]) > 1  # what it would be without


def test_compiling_pays_in_long_runs_only():
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    assert not common.compiling_pays(cpu, 0.8e12)  # the laptop preset
    assert not common.compiling_pays(cpu, 50e9 * threads * 60 * 19)
    assert common.compiling_pays(cpu, 50e9 * threads * 60 * 21)
    assert common.compiling_pays(torch.device("cuda"), 1)
    assert not common.compiling_pays(torch.device("mps"), 1e18)


@pytest.fixture
def compiled(pictures, tmp_path):
    """Flags of a compiled run, and the environment of an empty cache of compiled code."""
    flags = [*SMALL, "--dataset", pictures, "--batch-size", 4, "--compile", "on", "--steps"]
    return flags, {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}


def test_without_a_compiler_the_run_goes_on_with_a_warning(compiled, tmp_path):
    flags, extra = compiled
    none = {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    out, err = call("train.py", *flags, 2, cwd=tmp_path, **extra, **none)
    assert "trained in" in out and "compiled in" not in out
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert "torch.compile failed" in line and "--compile off" in line and len(line) < 400


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_a_compiled_run_resumes_bit_for_bit(compiled, tmp_path):
    flags, extra = compiled
    more = ["--warmup-steps", 1, "--decay-share", 0]
    out, _ = call("train.py", *flags, 9, *more, "--out-dir", "whole", cwd=tmp_path, **extra)
    assert "compiled in" in out
    call("train.py", *flags, 5, *more, cwd=tmp_path, **extra)
    call("train.py", "--resume", "--steps", 9, cwd=tmp_path, **extra)
    whole, parts = (
        torch.load(tmp_path / folder / "train_state.pt", weights_only=True)
        for folder in ("whole", "out")
    )
    assert parts["step"] == 9
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name
    assert not any("_orig_mod" in name for name in whole["model"])
