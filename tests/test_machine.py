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
from helpers import FEW, POSIX, ROOT, SMALL, assert_same_weights, call, state
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compilers import nop
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import train
from model import MIN_T, DiT

SLOW = pytest.mark.slow
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILE = torch.compile


def small_model(dim=16):
    return DiT(16, 4, dim, depth=2, heads=2, class_names=["a", "b"])


def small_batch(n=4):
    """x, y, t, noise"""
    x = torch.zeros(n, 3, 16, 16)
    return x, torch.zeros(n, dtype=torch.long), torch.ones(n), torch.ones_like(x)


# Dtypes and devices


class Record(TorchDispatchMode):
    """Notes the dtypes of the tensors that operations take, by name, and all that they return; and
    how often a number was read out of a tensor."""

    def __init__(self):
        super().__init__()
        self.taken, self.returned, self.reads = {}, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.reads += name == "_local_scalar_dense"
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
    run = [*SMALL, "--conv-dim", 8, "--dataset", pictures, "--steps", 3, "--batch-size", 6]
    with Record() as record:  # MPS has no float64
        call("train", *run, cwd=tmp_path)
        call("sample", "--device", "cpu", "--eta", 1, "--steps", 2, cwd=tmp_path)
    assert torch.float32 in record.returned and torch.float64 not in record.returned


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA tensors have shapes, dtypes and devices, but no data."""
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)  # there is no number to read
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a real GPU
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)  # of autocast
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
    batch = machine.to_device(small_batch(), CUDA)
    with CUDA:
        model = small_model()
    with Record() as record, machine.autocast(CUDA):
        loss = train.rectified_flow_loss(model, *batch)
    assert loss.dtype == torch.float32 and loss.device.type == "cuda"
    assert record.taken["addmm"] == dtypes == {torch.bfloat16}
    for name in ("cos", "sin", "native_layer_norm", "mse_loss", "div"):
        assert record.taken[name] == {torch.float32}, name


def test_whole_training_steps_stay_on_cuda(fake_cuda, monkeypatch):
    generator, asked = torch.Generator, set()

    def recorded(device="cpu"):
        asked.add(torch.device(device).type)
        return generator()

    def backward(loss):  # the real one needs a driver
        assert loss.device.type == "cuda"
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)

    monkeypatch.setattr(torch, "Generator", recorded)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(train, "STEPS", 2)
    with CUDA:
        model, ema = small_model(), small_model().requires_grad_(False)
    data = torch.zeros(9, 3, 16, 16, dtype=torch.uint8), torch.arange(9) % 2, torch.arange(9)
    steps = list(train.training_steps(model, ema, train.make_optimizer(model), *data))
    assert [step for step, *_ in steps] == [1, 2] and asked == {"cpu", "cuda"}
    assert {tensor.device.type for _, *tensors in steps for tensor in tensors} == {"cuda"}


def test_on_cuda_samples_and_validation_stay_on_it(fake_cuda):
    with CUDA:
        model = small_model()
    x, y, t, _ = small_batch()
    with pytest.raises(RuntimeError):
        model(x.to(CUDA), t.to(CUDA), y)  # a mismatch of devices would be seen
    with Record() as record:
        (states,) = sample.generate_states(model, y, steps=2, eta=1)
        states = list(states)
    assert record.taken["addmm"] == {torch.bfloat16}
    assert {(z.device.type, z.dtype) for z in states} == {("cuda", torch.float32)}
    (pictures,) = sample.generate(model, y, steps=2)
    assert pictures.device.type == "cpu" and pictures.dtype == torch.uint8
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert train.losses_at((0.5, 1), model, images, y, torch.arange(4)) == [0.0, 0.0]


def test_a_network_on_cuda_gets_initial_weights(fake_cuda, monkeypatch):
    trained = small_model()  # on the CPU, as all that comes from a file; which no fake tensor does
    trained.lacking = []
    monkeypatch.setattr(DiT, "from_pretrained", lambda name, strict: trained)
    with CUDA:
        model = small_model()
    train.load_initial_weights("a network", model)
    assert {weight.device.type for weight in model.parameters()} == {"cuda"}


def test_what_is_small_and_the_noise_of_samples_are_drawn_on_the_cpu(monkeypatch):
    # Generators of CUDA differ between cards, and MPS has its own.
    drawn, model = [], small_model()

    def recorded(real, *arguments, **options):
        drawn.append((options.get("device"), options["generator"].device.type))
        return real(*arguments, **options)

    for name in ("randint", "rand", "randn"):
        monkeypatch.setattr(torch, name, functools.partial(recorded, getattr(torch, name)))
    images, labels = torch.zeros(3, 3, 16, 16, dtype=torch.uint8), torch.arange(3)
    batch = train.random_batch(images, labels, torch.arange(3), 3, step=1)
    assert len(drawn) == 5
    slices = [
        train.random_batch(images, labels, torch.arange(3), 3, 1, CPU, r, 5) for r in range(5)
    ]
    assert all(torch.equal(whole, torch.cat(parts)) for whole, parts in zip(batch, zip(*slices)))
    del drawn[5:]
    list(sample.generate(model, torch.tensor([0, 1]), steps=2, eta=1))
    assert len(drawn) == 5 + 2 * 3 and set(drawn) == {(None, "cpu"), ("cpu", "cpu")}


def test_devices_that_are_not_here_are_refused(monkeypatch):
    assert machine.pick_device("cpu") == CPU
    for name in ("cuda:77", "abacus", "", "cuda:x"):
        with pytest.raises(UserError, match=rf'no DEVICE "{name}" here: .* \(\w'):  # and why
            machine.pick_device(name)
    # The last one is a GPU that is there and cannot be used.
    for accelerator, found in ((None, "cpu"), ("meta", "meta"), ("cuda:77", "cpu")):
        device = accelerator and torch.device(accelerator)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda device=device: device)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda device=device: bool(device))
        assert machine.pick_device("auto").type == found
    monkeypatch.setenv("LOCAL_RANK", "88")  # with a GPU too few, no process uses the CPU instead
    with pytest.raises(UserError, match='no DEVICE "cuda:88" here'):
        machine.pick_device("auto")


def test_each_process_has_a_gpu_of_its_own_before_the_group_starts(fake_cuda, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    waits = []

    def init_process_group(backends, timeout):
        asked.append(backends)
        waits.append(timeout.total_seconds())

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    for name in ("cuda", "cuda:0"):
        device = machine.pick_device(name)
        machine.join_processes(device, batch_size=8)
    machine.join_processes(CPU, batch_size=8)
    # Named, as without a name the group would have the accelerator's backend alone.
    assert asked == ["cuda:1", "cpu:gloo,cuda:nccl"] * 2 + ["gloo"]
    assert min(waits) > 10 * 3600  # one may read its pictures for hours longer than another


LEFT_OVER = [
    {"RANK": "1"},
    {"WORLD_SIZE": "4", "LOCAL_RANK": "1"},
    {"RANK": "1", "MASTER_ADDR": "x"},
]


@pytest.mark.parametrize("variables", LEFT_OVER)
def test_variables_of_another_program_are_not_torchruns(pictures, tmp_path, variables):
    code = "import support, train; train.main()"
    flags = [*FEW, "--dataset", pictures, "--steps", 1, "--out-dir", tmp_path / "out"]
    command = [sys.executable, "-c", code, *map(str, flags)]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True)
    assert run.returncode == 0 and b"3 classes" in run.stdout
    assert (tmp_path / "out" / "train_state.pt").exists()


# Precision


@pytest.mark.parametrize("feature", [None, "_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_precision_is_what_the_device_computes_in_unless_it_is_set(monkeypatch, feature):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda known=name: known == feature, raising=False)
    assert machine.uses_bf16(CPU, "auto") == (feature is not None)
    assert machine.uses_bf16(CPU, "bf16") and not machine.uses_bf16(CPU, "fp32")
    assert not machine.uses_bf16(torch.device("mps"), "auto")


def losses(device, precision):
    """Of 50 steps, which begin alike whatever the precision."""
    torch.manual_seed(0)
    model = small_model(dim=64).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    y = torch.arange(32, device=device) % 2
    for _ in range(50):
        x, noise = (torch.rand(2, 32, 3, 16, 16) * 2 - 1).to(device)
        t = torch.rand(32).clamp_min(MIN_T).to(device)
        with machine.autocast(device, precision):
            loss = train.rectified_flow_loss(model, x, y, t, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def usable(name):
    """A test that is skipped, by this name, where a number cannot be put on the device."""
    try:
        torch.zeros(1, device=name)
        return name
    except Exception as error:  # whatever torch raises on a machine without it
        return pytest.param(name, marks=pytest.mark.skip(reason=f"no {name}: {str(error)[:60]}"))


@pytest.mark.parametrize("name", ["cpu", usable("cuda")])
def test_training_in_bf16_follows_training_in_fp32(name):
    device = torch.device(name)
    in_bf16, in_fp32 = list(losses(device, "bf16")), list(losses(device, "fp32"))
    assert in_bf16 != in_fp32 and in_bf16 == pytest.approx(in_fp32, rel=0.03)


@pytest.mark.parametrize("name", [usable("cuda"), usable("mps")])
@pytest.mark.parametrize("patch_size, pictures", [(2, 5), (4, 5), (8, 5), (16, 5), (4, 1)])
def test_a_gpu_computes_what_the_cpu_does(name, patch_size, pictures):
    # 64, 16, 4 tokens and one, and one picture: MPS has given wrong values for some shapes.
    computed = []
    for device in (CPU, torch.device(name)):
        torch.manual_seed(0)
        model = DiT(16, patch_size, 32, 2, 4, ["a", "b"], conv_dim=8)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        model, y = model.to(device), torch.zeros(pictures, dtype=torch.int64, device=device)
        x, noise = torch.randn(2, pictures, 3, 16, 16).to(device)
        t = torch.linspace(0.2, 1, pictures).to(device)
        loss = train.rectified_flow_loss(model, x, y, t, noise)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        drawn = [sample.sample_conditional_cfg(model, y, 3, w, noise) for w in (1, 3)]
        computed.append([tensor.cpu() for tensor in (loss, *gradients, *drawn)])
    for on_cpu, on_gpu in zip(*computed):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-3, rtol=1e-2)


def test_linear_layers_get_contiguous_input():
    # Of another, MPS made wrong values (pytorch#161641).
    model, seen = DiT(16, 4, 32, 2, 4, ["a", "b"], conv_dim=8), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].is_contiguous()))
    train.rectified_flow_loss(model, *small_batch())
    assert len(seen) > 10 and all(seen)


# Waiting: what reads a number out of a tensor makes the CPU wait for a GPU.


def test_steps_between_looks_at_the_loss_read_nothing_back(pictures, tmp_path):
    counts = []
    for steps in (12, 19):  # at LOG_EVERY's step 10 and at the end numbers are read
        run = [*FEW, "--dataset", pictures, "--steps", steps, "--out-dir", steps]
        with Record() as record:
            call("train", *run, cwd=tmp_path)
        counts.append(record.reads)
    assert counts[0] > 3 and counts[1] == counts[0]


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


@pytest.fixture
def compiled(pictures, tmp_path, monkeypatch):
    """Flags of a compiled run, for which the cache of compiled code is empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return [*FEW, "--dataset", pictures, "--compile", "on", "--steps"]


def test_the_compiled_network_is_one_graph_and_stays_it(compiler, capsys):
    graphs = []
    compiler(lambda graph, inputs: graphs.append(graph) or graph.forward)
    model = small_model()
    machine.compile_model(model)
    for _ in range(4):
        train.rectified_flow_loss(model, *small_batch()).backward()
    assert len(graphs) == 1 and capsys.readouterr().out.count("compiling") == 1
    assert "_orig_mod" not in "".join(model.state_dict())  # --resume may be without


def test_compiled_gradients_are_those_of_the_network(compiler, capsys):
    """The compiler may err: where q, k and v were split before the norms, it gave NaN."""
    compiler("inductor")
    torch.manual_seed(0)
    model = DiT(64, 8, 64, depth=1, heads=2, class_names=["a", "b"], conv_dim=32)
    for weight in model.parameters():  # some begin at zero, and then others have no gradient
        weight.data += 0.05 * torch.randn_like(weight)
    x, noise = torch.randn(2, 8, 3, 64, 64)
    batch = x, torch.ones(8).long(), torch.rand(8), noise

    def gradients():
        model.zero_grad()
        with machine.autocast(CPU, "bf16"):
            train.rectified_flow_loss(model, *batch).backward()
        return [weight.grad for weight in model.parameters()]

    eager = gradients()
    machine.compile_model(model)
    compiled = gradients()
    if "--compile off" in capsys.readouterr().err:
        pytest.skip("needs a C++ compiler")
    for ours, theirs in zip(eager, compiled):
        assert (ours - theirs).norm() <= 0.1 * ours.norm()


def failing(*arguments, **options):
    raise RuntimeError("no compiler " * 100)


@pytest.mark.parametrize("what", ["the compiler", "its backward pass", "torch.compile"])
def test_a_compiler_that_fails_is_one_warning_and_a_step_is_run_once(
    compiler, monkeypatch, capsys, what
):
    compiler(failing)
    if what == "its backward pass":  # which is compiled when it is first needed
        compiler(aot_autograd(fw_compiler=nop, bw_compiler=failing))
    if what == "torch.compile":  # as with a Python that is too new for it
        monkeypatch.setattr(torch, "compile", failing)
    model, calls = small_model(), []
    model.blocks[0].register_forward_hook(lambda *arguments: calls.append(1))
    machine.compile_model(model)
    for n in (1, 2):
        train.rectified_flow_loss(model, *small_batch()).backward()
        assert len(calls) == n + (what == "its backward pass")  # which needs a rehearsal
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning" in line and "no compiler" in line
    assert "--compile off" in line and len(line) < 400


def test_a_compiled_network_takes_keywords_as_any_other(compiler):
    compiler("eager")
    model = small_model()
    x, y, t, _ = small_batch()
    expected = model(x, t, y)
    machine.compile_model(model)
    for _ in range(2):  # the first call compiles
        torch.testing.assert_close(model(x, t=t, y=y), expected)


def test_the_first_call_of_a_compiled_network_leaves_no_trace(compiler, capsys):
    model = small_model()
    model.forward = lambda x: model.final_layer(torch.dropout(x, 0.5, True))
    model.final_layer.bias.requires_grad_(False)  # someone trains a part of the layers alone
    compiler("eager")
    machine.compile_model(model)
    x, random_state = torch.rand(4, 16), torch.get_rng_state()
    model(x)
    after = torch.get_rng_state()
    torch.set_rng_state(random_state)
    torch.dropout(x, 0.5, True)
    assert torch.equal(torch.get_rng_state(), after)  # as of one pass
    assert all(weight.grad is None for weight in model.parameters())
    assert capsys.readouterr().err == ""


def test_a_cache_that_cannot_be_written_is_a_warning(compiled, compiler, tmp_path):
    (tmp_path / "cache").write_text("a file in its place")
    out, err = call("train", *compiled, 2, cwd=tmp_path)
    assert "trained for" in out and err.count("--compile off") == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
def test_a_compiled_run_resumes_bit_for_bit(compiler, compiled, tmp_path, backend):
    compiler(backend)
    compiled = ["--warmup-steps", 1, "--decay-share", 0, *compiled]
    _, err = call("train", *compiled, 7, "--out-dir", "whole", cwd=tmp_path)
    if backend == "inductor" and "--compile off" in err:
        pytest.skip("needs a C++ compiler")
    call("train", *compiled, 4, cwd=tmp_path)
    call("train", "--resume", "--steps", 7, cwd=tmp_path)
    assert state(tmp_path / "out")["step"] == 7 and "--compile off" not in err
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


def test_compiling_pays_in_long_runs_only():
    a_minute = 60 * 50e9 * torch.get_num_threads() / 6 / 64  # parameters x pictures x 64 tokens
    assert not machine.compiling_pays(CPU, 1000, 19 * a_minute / 1000)
    assert machine.compiling_pays(CPU, 1000, 21 * a_minute / 1000)
    assert machine.compiling_pays(CUDA, 1, 1)
    assert not machine.compiling_pays(torch.device("mps"), 1000, 1e9 * a_minute)


# Signals


@pytest.fixture
def handlers():
    """The signals that stop a run; their handlers are Python's own, whatever started the tests."""
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield list(before)
    for number, handler in before.items():
        signal.signal(number, handler)


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_are_noted_and_their_handlers_put_back(handlers, monkeypatch, capfd, name):
    # torchrun passes signals on, so that one Ctrl-C comes twice.
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = [signal.getsignal(number) for number in handlers]
    with pytest.raises(KeyError), machine.stop_signals() as received:
        signal.raise_signal(getattr(signal, name))
        signal.raise_signal(getattr(signal, name))
        raise KeyError
    assert [number.name for number in map(signal.Signals, received)] == [name, name]
    assert [signal.getsignal(number) for number in handlers] == before
    assert capfd.readouterr().err == 2 * "\nstopping after this step, which is saved\n"


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


# OpenMP


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}])
def test_openmp_waits_briefly_unless_it_is_told_otherwise(given):
    extra = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    code = "import os, support; print(os.environ['GOMP_SPINCOUNT'])"
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, cwd=ROOT, env={**extra, **given}, text=True)
    assert out.split() == (list(given.values()) or ["1000"])
