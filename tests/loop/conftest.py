"""What the tests of the loop share."""

from __future__ import annotations

import torch

# tiny tensors: a second thread has nothing to do but wait, and long where other work has the cores
torch.set_num_threads(1)
