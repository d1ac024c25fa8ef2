"""What all tests share."""

import torch
from hypothesis import settings

# No deadline: how long an example takes says nothing about whether the property holds.
settings.register_profile("snparam", deadline=None)
settings.load_profile("snparam")

# Small matrices: two threads wait for each other longer than one computes, on a busy machine forty
# times as long.
torch.set_num_threads(1)
