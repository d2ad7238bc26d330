"""What the scripts need besides the method: settings, the machine, checkpoints, the Hub.

Nothing here is about diffusion. To understand nanoDiT, read model.py, train.py and sample.py.
"""

import os

# torchrun sets all of these. If only some are set, they are left over from something else, and are
# removed. (A launcher such as srun, with variables of your own, has to set them all.)
TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"}
if TORCHRUN - os.environ.keys():
    for name in TORCHRUN & os.environ.keys():
        del os.environ[name]

# OpenMP's threads wait for each other in a busy loop. Beside another program that uses all cores,
# such as a second training, this made both up to twenty times slower; a short wait costs little.
# It has to be set before torch is imported, for which reason `support` is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # rounds of the loop, on Linux
