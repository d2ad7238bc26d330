"""Write a trained network as one ONNX file, which browsers and other programs run without PyTorch.

    pip install onnx onnxscript onnxruntime
    python -m experiments.export_onnx assets/laptop docs/butterflies.onnx

Inputs z (B,3,S,S), t (B,) and y (B,) int64, output v (B,3,S,S): as those of DiT.forward, for any B.
Weights are stored in half precision and computed with in single. Beside the file comes one called
.json with what a sampler has to know: sizes, guidance and class names.

Before it is written, ONNX Runtime runs it beside PyTorch. The pictures x = z - t v that the two
make of random noise must nowhere differ by more than 1 of 255.
"""

import importlib.util
import json

from support.settings import UserError, expanded, new_parser, run_command

import torch

from model import DiT

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FACTS = ("image_size", "num_classes", "cfg_scale", "class_names")


class HalfStored(torch.nn.Module):
    """A network whose weights are in half precision until it computes with them."""

    def __init__(self, network):
        super().__init__()
        self.network = network.half()

    def forward(self, z, t, y):
        weights = {name: weight.float() for name, weight in self.network.named_parameters()}
        return torch.func.functional_call(self.network, weights, (z, t, y))


def inputs(model, batch):
    """Noise, times from 1 to 0.01, and classes, of which the last is the null class."""
    z = torch.randn(batch, 3, model.image_size, model.image_size)
    return z, torch.linspace(1, 0.01, batch), torch.linspace(0, model.num_classes, batch).long()


def to_onnx(model):
    """The bytes of an ONNX file. The model's weights are then in half precision."""
    names = {"input_names": ["z", "t", "y"], "output_names": ["v"]}
    options = {"dynamic_shapes": [{0: torch.export.Dim.DYNAMIC}] * 3, "verbose": False, **names}
    program = torch.onnx.export(HalfStored(model).eval(), inputs(model, 2), dynamo=True, **options)
    for node in program.model.graph:
        node.metadata_props.clear()  # paths of this machine
    return program.model_proto.SerializeToString()


def main():
    parser = new_parser(__doc__)
    parser.add_argument("checkpoint", help="a folder with a trained network, or a Hub id")
    parser.add_argument("output", type=expanded, help="the .onnx file to write")
    flags = parser.parse_args()
    missing = [package for package in PACKAGES if not importlib.util.find_spec(package)]
    if missing:
        raise UserError(f"{missing[0]} is missing: pip install {' '.join(PACKAGES)}")
    from onnxruntime import InferenceSession

    model = DiT.from_pretrained(flags.checkpoint)
    z, t, y = inputs(model, 12)
    v = model(z, t, y).detach()
    content = to_onnx(model)
    feeds = {"z": z.numpy(), "t": t.numpy(), "y": y.numpy()}
    (v_onnx,) = InferenceSession(content).run(None, feeds)
    difference = (t[:, None, None, None] * (v - torch.from_numpy(v_onnx))).abs().max() * 127.5
    if not difference <= 1:  # nan included
        raise UserError(f"{difference:.2g} of 255 from PyTorch: {flags.output} was not written")

    flags.output.parent.mkdir(parents=True, exist_ok=True)
    flags.output.write_bytes(content)
    facts = {name: getattr(model, name) for name in FACTS}
    flags.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    print(f"{flags.output}: at most {difference:.2g} of 255 from PyTorch")


if __name__ == "__main__":
    run_command(main)
