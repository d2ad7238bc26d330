"""What the scripts need besides the method: settings, the machine, checkpoints, the Hub.

Nothing here is about diffusion. To understand nanoDiT, read model.py, train.py and sample.py.
"""

import os

# OpenMP's threads wait for each other in a busy loop. Beside another program that uses all cores,
# such as a second training, this made both up to twenty times slower; a short wait costs little.
# It has to be set before torch is imported, for which reason `support` is imported first.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's, on Linux: rounds of the loop
os.environ.setdefault("KMP_BLOCKTIME", "0")  # LLVM's and Intel's, on macOS and Windows: ms
