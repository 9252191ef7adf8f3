"""What the children that processes.py starts need not import or read again. It must start no thread: a fork loses it.

An import that fails here is silent and costs time only: the children make up for it.
"""

import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401 (an optimizer imports it)
import torchmetrics.classification  # noqa: F401

import cutnmix.trainer.cli
import cutnmix.trainer.picture
import cutnmix.trainer.run
from cutnmix.pipeline import load_splits

for name in ("digits", "digits16"):  # read once
    load_splits(name)

try:
    import cutnmix.pipeline.dali  # noqa: F401
except ImportError:  # a platform without DALI
    pass
