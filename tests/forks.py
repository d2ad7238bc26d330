"""Runs scripts as `python script arguments...` would, each in a fork of one process that has
imported their libraries already: importing takes most of the time of a short call.

Reads a line of JSON a call: [script, arguments, folder, environment, file of stdout, of stderr].
Answers each with a line: its exit status, or minus the signal that ended it."""

import json
import os
import runpy
import signal
import sys

import huggingface_hub.hf_api  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import torch.utils.flop_counter  # noqa: F401
import torchvision.transforms.functional  # noqa: F401
import tqdm.contrib.concurrent  # noqa: F401
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download  # noqa: F401
from PIL import Image, ImageOps  # noqa: F401

Image.init()


def become(script, arguments, cwd, environment, *outputs):
    signal.alarm(200)  # none takes as long, so it hangs: end it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.path[0] = os.path.dirname(script)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
    sys.exit()


for line in sys.stdin:
    if not (child := os.fork()):
        become(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
