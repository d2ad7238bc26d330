"""What only other machines run: CUDA by tensors without data, torchrun by its environment."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import POSIX, SMALL, call
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import sample
import train
from common import pick_device
from model import DiT, UserError

SIZES = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2}


class Record(TorchDispatchMode):
    """Notes the dtypes and devices of the tensors that operations are called with, by name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [a for a in tree_leaves((args, kwargs)) if torch.is_tensor(a)]
        name = function.overloadpacket.__name__
        self.calls.setdefault(name, []).append([(a.dtype, a.device.type) for a in tensors])
        return function(*args, **(kwargs or {}))

    def dtypes(self, *names):
        """Of all floating-point arguments of these operations."""
        calls = [call for name in names for call in self.calls.get(name, [])]
        return {dtype for call in calls for dtype, _ in call if dtype.is_floating_point}


@pytest.fixture
def fake_cuda(monkeypatch):
    """A mode in which CUDA tensors have shapes, dtypes and devices, but no data; with a model, and
    a batch of four."""
    monkeypatch.setattr(train, "PRECISION", "bf16")
    autocast = common.autocast
    monkeypatch.setattr(common, "autocast", lambda device, *precision: autocast(device, "bf16"))
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 0.0)  # there is no number to read
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    with FakeTensorMode():
        try:
            with torch.device("cuda"):
                model = DiT(**SIZES, class_names=["a", "b"])
        except RuntimeError:
            pytest.skip("this version of torch makes no CUDA tensors without a driver")
        with torch.device("cuda"):
            batch = torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.long), torch.ones(4)
        x, y, t = batch
        yield model, (x, y, t, torch.zeros_like(x))


@pytest.fixture
def attention_dtypes(monkeypatch):
    """What attention computes in: its result is bfloat16 only if autocast made q, k and v so."""
    dtypes, attention = set(), F.scaled_dot_product_attention

    def recorded(q, k, v):
        assert v.is_contiguous()  # pytorch#181133
        out = attention(q, k, v)
        dtypes.add(out.dtype)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return dtypes


def test_attention_on_the_cpu_is_in_bf16_too():
    model, x = DiT(**SIZES, class_names=["a", "b"]), torch.zeros(4, 3, 16, 16)
    with Record() as record, common.autocast(x.device, "bf16"):
        v = model(x, torch.ones(4), torch.zeros(4, dtype=torch.long))
    assert record.dtypes("addmm", "bmm") == {torch.bfloat16}  # bmm: queries, keys and values
    assert v.dtype == torch.float32


def test_a_training_step_on_cuda_has_the_dtypes_that_are_meant(fake_cuda, attention_dtypes):
    model, (x, y, t, noise) = fake_cuda
    with Record() as record, common.autocast(x.device, "bf16"):
        loss = train.rectified_flow_loss(model, x, y, t, noise)
    assert loss.dtype == torch.float32 and loss.device.type == "cuda"
    assert record.dtypes("addmm", "mm") == {torch.bfloat16}
    assert attention_dtypes == {torch.bfloat16}
    for name in ("cos", "sin", "native_layer_norm", "mse_loss", "div"):
        assert record.dtypes(name) == {torch.float32}, name


def test_the_residual_stream_and_the_velocity_stay_float32_on_cuda(fake_cuda):
    model, (x, y, t, _) = fake_cuda
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with common.autocast(x.device, "bf16"):
        v = model(x, t, y)
    assert seen == [torch.float32] * 2
    assert v.dtype == torch.float32 and v.shape == x.shape and v.device.type == "cuda"


def test_sampling_averaging_and_validation_run_on_cuda(fake_cuda):
    model, (x, y, _, noise) = fake_cuda
    for scale in (1, 3.0):
        z = sample.sample_conditional_cfg(model, y, 3, scale, noise)
        assert z.device.type == "cuda" and z.dtype == torch.float32
    (pictures,) = sample.generate(model, torch.tensor([0, 1]), steps=2, eta=1)
    assert pictures.device.type == "cpu" and pictures.dtype == torch.uint8
    with torch.device("cuda"):
        ema = DiT(**SIZES, class_names=["a", "b"])
    train.update_ema(ema, model, 1)
    assert all(weight.device.type == "cuda" for weight in ema.parameters())
    assert train.validation_loss(ema, x.to(torch.uint8), y) == 0.0


def test_a_mismatch_of_devices_would_be_seen(fake_cuda):
    model, (x, y, t, _) = fake_cuda
    with pytest.raises(RuntimeError):  # the device of y is not the model's
        model(x, t, y.cpu())


def test_what_was_drawn_is_moved_to_the_gpu(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a real GPU
    moved = common.to_device((torch.ones(3), torch.zeros(2)), torch.device("cuda"))
    assert [tensor.device.type for tensor in moved] == ["cuda", "cuda"]


def test_the_batch_is_drawn_on_the_cpu_whatever_the_device(monkeypatch):
    # Generators of CUDA differ between cards, and MPS has its own: none of them may be asked.
    images, labels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.arange(3)
    monkeypatch.setattr(train, "BATCH_SIZE", 5)
    with Record() as record:
        train.random_batch(images, labels, 3, step=1)
    assert sum(name.startswith("rand") for name in record.calls) == 3  # randint, rand, randn
    drawn = []
    for name in ("randint", "rand", "randn"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, f=real, **k: drawn.append(k.get("device")) or f(*a, **k)
        )
    train.random_batch(images, labels, 3, step=1)
    assert len(drawn) == 5 and set(drawn) == {None}


@pytest.fixture
def two_processes(monkeypatch):
    """The environment of the second of two processes; what it asks of torch, in order."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend: asked.append(backend))
    return asked


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_each_process_sets_a_gpu_of_its_own_before_the_group_starts(
    two_processes, name, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device, rank, world_size = common.start_process(torch.device(name), batch_size=8)
    assert str(device) == "cuda:1" and (rank, world_size) == (1, 2)
    assert two_processes == ["cuda:1", "cpu:gloo,cuda:nccl"]


def test_more_processes_than_gpus_are_refused(two_processes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="more processes than GPUs"):
        common.start_process(torch.device("cuda"), batch_size=8)
    assert two_processes == []


def test_processes_on_the_cpu_have_the_backend_of_the_cpu(two_processes):
    device, _, _ = common.start_process(torch.device("cpu"), batch_size=8)
    assert device.type == "cpu" and two_processes == ["gloo"]


ACCELERATOR = """
import torch
import torch.distributed

real_init = torch.distributed.init_process_group
real_accelerator = torch.accelerator.current_accelerator

def init_process_group(*arguments, **options):
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("cuda")
    try:
        return real_init(*arguments, **options)
    finally:
        torch.accelerator.current_accelerator = real_accelerator

torch.distributed.init_process_group = init_process_group
"""


@POSIX
def test_torchrun_on_the_cpu_of_a_machine_with_an_accelerator(pictures, tmp_path):
    # Without a named backend, the group would have the accelerator's alone.
    (tmp_path / "sitecustomize.py").write_text(ACCELERATOR)
    run = [*SMALL, "--dataset", pictures, "--batch-size", 4, "--steps", 3]
    out, _ = call("train.py", *run, cwd=tmp_path, processes=2, PYTHONPATH=str(tmp_path))
    assert "trained in" in out
    state = torch.load(tmp_path / "out" / "train_state.pt", weights_only=True)
    assert state["step"] == 3


def test_devices_that_are_not_here_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 0)
    assert str(pick_device("auto")) == "cuda" and str(pick_device("cuda:1")) == "cuda:1"
    assert str(pick_device("cpu")) == "cpu"
    for name in ("cuda:2", "mps", "meta", "abacus", "", "cuda:x"):
        with pytest.raises(UserError, match="DEVICE"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert str(pick_device("auto")) == "cpu"
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    assert str(pick_device("auto")) == "mps"


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a Mac with MPS")
def test_gradients_on_mps_are_those_of_the_cpu():
    gradients = []
    for name in ("cpu", "mps"):
        torch.manual_seed(0)
        model = DiT(32, 4, 256, 2, 2, ["a", "b"])  # heads of 128: pytorch#181133 begins at 64
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.05)
        model = model.to(name)
        generator = torch.Generator().manual_seed(1)
        x, noise = torch.randn(2, 4, 3, 32, 32, generator=generator).to(name)
        y, t = torch.tensor([0, 1, 2, 0]).to(name), torch.tensor([0.1, 0.4, 0.7, 1.0]).to(name)
        train.rectified_flow_loss(model, x, y, t, noise).backward()
        gradients.append({name: w.grad.cpu() for name, w in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)
