"""What the machine decides: devices, dtypes, precision, torch.compile, signals. CUDA is tested by
tensors without data, torchrun by its environment."""

import functools
import os
import signal
import subprocess
import sys

from support import machine
from support.settings import UserError

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import FEW, POSIX, ROOT, SMALL, call, state
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from model import MIN_T, DiT

SLOW = pytest.mark.slow
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILE = torch.compile


def small_model(**sizes):
    sizes = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, **sizes}
    return DiT(**sizes, class_names=["a", "b"])


def small_batch(n=4, device=CPU):
    """x, y, t, noise"""
    x, t = torch.zeros(n, 3, 16, 16, device=device), torch.ones(n, device=device)
    return x, torch.zeros(n, dtype=torch.long, device=device), t, torch.ones_like(x)


# Dtypes and devices


class Record(TorchDispatchMode):
    """Notes the dtypes of the tensors that operations take, by name, and all that they return."""

    def __init__(self):
        super().__init__()
        self.taken, self.returned = {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [value for value in tree_leaves((args, kwargs)) if torch.is_tensor(value)]
        dtypes = {tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point}
        self.taken[name] = self.taken.get(name, set()) | dtypes
        out = function(*args, **(kwargs or {}))
        self.returned |= {value.dtype for value in tree_leaves(out) if torch.is_tensor(value)}
        return out


def test_attention_on_the_cpu_is_in_bf16_too():
    x, y, t, _ = small_batch()
    with Record() as record, machine.autocast(CPU, "bf16"):
        v = small_model()(x, t, y)
    assert record.taken["addmm"] == {torch.bfloat16}
    assert record.taken["bmm"] == {torch.bfloat16}  # queries, keys and values
    assert v.dtype == torch.float32


def test_training_validation_and_sampling_need_no_float64(pictures, tmp_path):
    run = [*SMALL, "--dataset", pictures, "--steps", 3, "--batch-size", 6]
    with Record() as record:  # MPS has no float64
        call("train", *run, cwd=tmp_path)
        call("sample", "--device", "cpu", "--eta", 1, "--steps", 2, cwd=tmp_path)
    assert torch.float32 in record.returned and torch.float64 not in record.returned
    with Record() as record:
        torch.zeros(1, dtype=torch.float64)
    assert torch.float64 in record.returned


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA tensors have shapes, dtypes and devices, but no data."""
    autocast = machine.autocast
    bf16 = lambda device, *precision: autocast(device, "bf16")  # noqa: E731
    monkeypatch.setattr(train, "autocast", bf16)
    monkeypatch.setattr(sample, "autocast", bf16)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)  # there is no number to read
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a real GPU
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    with FakeTensorMode():
        try:
            torch.zeros(1, device=CUDA)
        except RuntimeError:
            pytest.skip("this version of torch makes no CUDA tensors without a driver")
        yield


def test_a_training_step_on_cuda_has_the_dtypes_that_are_meant(fake_cuda, monkeypatch):
    attention, dtypes = F.scaled_dot_product_attention, set()

    def recorded(q, k, v):
        assert v.is_contiguous()  # pytorch#181133
        out = attention(q, k, v)
        dtypes.add(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    x, y, t, noise = machine.to_device(small_batch(), CUDA)
    with torch.device("cuda"):
        model = small_model()
    with Record() as record, machine.autocast(CUDA, "bf16"):
        loss = train.rectified_flow_loss(model, x, y, t, noise)
    assert loss.dtype == torch.float32 and loss.device.type == "cuda"
    assert record.taken["addmm"] == dtypes == {torch.bfloat16}
    for name in ("cos", "sin", "native_layer_norm", "mse_loss", "div"):
        assert record.taken[name] == {torch.float32}, name


def test_on_cuda_samples_ema_and_validation_stay_on_it(fake_cuda):
    with torch.device("cuda"):
        model, ema = small_model(), small_model()
    x, y, t, _ = small_batch()
    with pytest.raises(RuntimeError):
        model(x.to(CUDA), t.to(CUDA), y)  # a mismatch of devices would be seen
    assert model(x.to(CUDA), t.to(CUDA), y.to(CUDA)).device.type == "cuda"
    (states,) = sample.generate_states(model, y, steps=2, eta=1)
    assert {(z.device.type, z.dtype) for z in states} == {("cuda", torch.float32)}
    (pictures,) = sample.generate(model, y, steps=2)
    assert pictures.device.type == "cpu" and pictures.dtype == torch.uint8
    train.update_ema(ema, model, 1)
    assert all(weight.device.type == "cuda" for weight in ema.parameters())
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert train.validation_loss(ema, images, y, torch.arange(4)) == 0.0


def test_the_batch_and_the_noise_are_drawn_on_the_cpu_whatever_the_device(monkeypatch):
    # Generators of CUDA differ between cards, and MPS has its own: none of them may be asked.
    drawn, model = [], small_model()

    def recorded(real, *arguments, **options):
        drawn.append((options.get("device"), options["generator"].device.type))
        return real(*arguments, **options)

    for name in ("randint", "rand", "randn"):
        monkeypatch.setattr(torch, name, functools.partial(recorded, getattr(torch, name)))
    images, labels = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.arange(3)
    train.random_batch(images, labels, torch.arange(3), 3, step=1)
    assert len(drawn) == 5
    list(sample.generate(model, torch.tensor([0, 1]), steps=2, eta=1))
    assert len(drawn) == 5 + 3 and set(drawn) == {(None, "cpu")}


# The device, and the processes of torchrun


def test_devices_that_are_not_here_are_refused(monkeypatch):
    assert machine.pick_device("cpu") == CPU
    for name in ("cuda:77", "abacus", "", "cuda:x"):
        with pytest.raises(UserError, match=f'no DEVICE "{name}" here'):
            machine.pick_device(name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert machine.pick_device("auto") == CPU


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_auto_is_the_accelerator(monkeypatch, name):
    accelerator = torch.device(name)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    asked = []
    zeros = torch.zeros(0)
    monkeypatch.setattr(torch, "zeros", lambda size, device: asked.append(device) or zeros)
    machine.pick_device("auto")
    assert asked == [name]


def test_each_process_has_a_gpu_of_its_own_before_the_group_starts(fake_cuda, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", asked.append)
    for name in ("cuda", "cuda:0"):
        device = machine.pick_device(name)
        assert machine.start_process(device, batch_size=8) == (1, 2)
    assert asked == ["cuda:1", "cpu:gloo,cuda:nccl"] * 2
    machine.start_process(CPU, batch_size=8)
    assert asked[4:] == ["gloo"]  # named, as without a name an accelerator's would be taken


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac with MPS")
def test_gradients_on_mps_are_those_of_the_cpu():
    gradients = []
    for name in ("cpu", "mps"):
        torch.manual_seed(0)
        model = small_model(dim=256)  # heads of 128: pytorch#181133 begins at 64
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.05)
        model = model.to(name)
        x, y, _, noise = small_batch(device=name)
        t = torch.tensor([0.1, 0.4, 0.7, 1.0], device=name)
        train.rectified_flow_loss(model, x, y, t, noise).backward()
        gradients.append({name: weight.grad.cpu() for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)


# Precision

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_training_in_bf16_follows_training_in_fp32(name):
    device, losses = torch.device(name), {"fp32": [], "bf16": []}
    for precision in losses:
        torch.manual_seed(0)
        model = small_model(dim=64).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator = torch.Generator(device).manual_seed(0)
        draw = functools.partial(torch.rand, device=device, generator=generator)
        x, y = draw(32, 3, 16, 16) * 2 - 1, torch.arange(32, device=device) % 2
        for _ in range(50):
            noise, t = draw(x.shape) * 2 - 1, draw(len(x)).clamp_min(MIN_T)
            with machine.autocast(device, precision):
                loss = train.rectified_flow_loss(model, x, y, t, noise)
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[precision].append(loss.item())
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)


@pytest.mark.parametrize("feature", [None, "avx512_bf16", "amx_bf16"])
def test_precision_is_what_the_device_computes_in_unless_it_is_set(monkeypatch, feature):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {feature: True}, raising=False)
    assert machine.uses_bf16(CPU, "auto") == (feature is not None)
    assert machine.uses_bf16(CPU, "bf16") and not machine.uses_bf16(CPU, "fp32")
    assert not machine.uses_bf16(torch.device("mps"), "auto")


# Waiting: what reads a number out of a tensor makes the CPU wait for a GPU.


class Reads(TorchDispatchMode):
    """Counts what reads a number out of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_sampling_reads_nothing_back_on_the_way():
    noise = torch.randn(2, 3, 16, 16)
    with Reads() as reads:
        z = sample.sample_conditional_cfg(small_model(), torch.tensor([0, 1]), 7, 3.0, noise)
        assert reads.count == 0
        z.sum().item()
    assert reads.count == 1


def test_steps_between_looks_at_the_loss_read_nothing_back(pictures, tmp_path):
    counts = []
    for steps in (12, 19):  # at LOG_EVERY's step 10 and at the end numbers are read
        run = [*FEW, "--dataset", pictures, "--steps", steps, "--out-dir", steps]
        with Reads() as reads:
            call("train", *run, cwd=tmp_path)
        counts.append(reads.count)
    assert counts[0] > 5 and counts[1] == counts[0]


# torch.compile


@pytest.fixture
def compiler(monkeypatch):
    """A function that replaces the compiler by another: its name, or (graph, inputs) -> code."""
    torch._dynamo.reset()

    def replace(backend):
        compile_by = functools.partial(COMPILE, backend=backend, fullgraph=True)
        monkeypatch.setattr(torch, "compile", compile_by)

    yield replace
    torch._dynamo.reset()


def test_the_compiled_network_is_one_graph_and_stays_it(compiler, capsys):
    graphs = []
    compiler(lambda graph, inputs: graphs.append(graph) or graph.forward)
    model = small_model()
    machine.compile_model(model)
    for _ in range(4):
        train.rectified_flow_loss(model, *small_batch()).backward()
    assert len(graphs) == 1
    assert capsys.readouterr().out.count("compiling") == 1
    assert "_orig_mod" not in "".join(model.state_dict())  # --resume may be without


def failing(graph, inputs):
    raise RuntimeError("no compiler " * 100)


def test_a_compiler_that_fails_is_one_warning_and_the_model_is_run_once(compiler, capsys):
    compiler(failing)
    model = small_model()
    expected, calls = model(*small_batch(2)[::2], small_batch(2)[1]), []
    model.blocks[0].register_forward_hook(lambda *arguments: calls.append(1))
    machine.compile_model(model)
    for n in (1, 2):
        assert torch.equal(model(*small_batch(2)[::2], small_batch(2)[1]), expected)
        assert len(calls) == n
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: compiling failed" in line and "no compiler" in line
    assert "--compile off" in line and len(line) < 400


def test_without_torch_compile_the_model_stays_as_it_is(monkeypatch, capsys):
    def unsupported(*arguments, **options):
        raise RuntimeError("torch.compile is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", unsupported)
    model = small_model()
    machine.compile_model(model)
    assert train.rectified_flow_loss(model, *small_batch()).isfinite()
    assert "not supported on Python" in capsys.readouterr().err


def test_compiling_pays_in_long_runs_only():
    a_minute = 60 * 50e9 * torch.get_num_threads() / 6  # products of a parameter and a token
    assert not machine.compiling_pays(CPU, 19 * a_minute)
    assert machine.compiling_pays(CPU, 21 * a_minute)
    assert machine.compiling_pays(CUDA, 1)
    assert not machine.compiling_pays(torch.device("mps"), 1e9 * a_minute)


@pytest.fixture
def compiled(pictures, tmp_path, monkeypatch):
    """Flags of a compiled run, for which the cache of compiled code is empty."""
    torch._dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    yield [*FEW, "--dataset", pictures, "--compile", "on", "--steps"]
    torch._dynamo.reset()


def test_a_cache_that_cannot_be_written_is_a_warning(compiled, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    out, err = call("train", *compiled, 2, cwd=tmp_path)
    assert "trained in" in out and err.count("warning: compiling failed") == 1


@SLOW
def test_without_a_compiler_the_run_goes_on_with_a_warning(compiled, tmp_path):
    none = {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    out, err = call("train", *compiled, 2, cwd=tmp_path, **none)
    assert "trained in" in out and err.count("warning: compiling failed") == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_a_compiled_run_resumes_bit_for_bit(compiler, compiled, tmp_path, backend):
    compiler(backend)
    more = ["--warmup-steps", 1, "--decay-share", 0]
    _, err = call("train", *compiled, 7, *more, "--out-dir", "whole", cwd=tmp_path)
    if "compiling failed" in err:
        pytest.skip("needs a C++ compiler")
    call("train", *compiled, 4, *more, cwd=tmp_path)
    call("train", "--resume", "--steps", 7, cwd=tmp_path)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "out")
    assert parts["step"] == 7 and parts["settings"]["COMPILE"] == "on"
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, parts["model"][name]), name


# Signals


@pytest.fixture
def handlers():
    """The signals that stop a run; their handlers are Python's own, whatever started the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@POSIX
def test_signals_are_noted_and_their_handlers_put_back(handlers, capfd):
    before = [signal.getsignal(number) for number in handlers]
    with pytest.raises(KeyError), machine.stop_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        raise KeyError
    assert received == [signal.SIGTERM] * 2
    assert [signal.getsignal(number) for number in handlers] == before
    assert capfd.readouterr().err.count("stopping after this step; press Ctrl-C again") == 1


@POSIX
def test_what_nohup_ignores_stays_ignored(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with machine.stop_signals() as received:
        signal.raise_signal(signal.SIGHUP)
    assert received == [] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@POSIX
def test_a_second_ctrl_c_ends_a_step_that_does_not_end(handlers, pictures, tmp_path, monkeypatch):
    passed = []

    def endless(ema, model, step):
        signal.raise_signal(signal.SIGINT)
        passed.append("the first Ctrl-C waits for the step")
        signal.raise_signal(signal.SIGINT)
        passed.append("the second does not")

    monkeypatch.setattr(train, "update_ema", endless)
    call("train", *FEW, "--dataset", pictures, "--steps", 2, cwd=tmp_path, status=130)
    assert len(passed) == 1 and state(tmp_path / "out")["step"] == 0


@POSIX
def test_under_torchrun_a_second_ctrl_c_changes_nothing(handlers, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")  # it passes signals on, so that one Ctrl-C comes twice
    with machine.stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert received[0] == signal.SIGINT and "again" not in capfd.readouterr().err


# The user's own code, and OpenMP

OWN = [
    ("MIN_T = 0.05\n", "MIN_T = 0.05\nTABLES, CALLS = {}, []\n"),
    (
        "        c = F.silu(c)  # (B, dim)\n",
        "        if self.training:\n            CALLS.append(z.device.type)\n"
        "        c = F.silu(c) + TABLES.setdefault(0, torch.zeros(1, device=z.device))\n",
    ),
]


def test_an_edited_network_is_run_once_a_step_and_on_its_device_alone(pictures, tmp_path):
    from helpers import edited

    copy = edited(tmp_path, "model.py", *OWN)
    with open(copy / "train.py", "a") as file:
        file.write("\n    import model\n    print('calls:', model.CALLS, model.TABLES)\n")
    run = [*FEW, "--dataset", pictures, "--steps", 3]
    out, _ = call(copy / "train.py", *run, cwd=tmp_path)
    assert "calls: ['cpu', 'cpu', 'cpu'] {0: tensor([0.])}" in out


WAITING = "import os, support; print(os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME'])"


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "8"}])
def test_openmp_waits_briefly_unless_it_is_told_otherwise(given):
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    extra = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", WAITING]
    options = {"cwd": ROOT, "env": {**extra, **given}, "text": True, "check": True}
    out = subprocess.run(command, capture_output=True, **options).stdout.split()
    assert out == (list(given.values()) or ["1000", "0"])
