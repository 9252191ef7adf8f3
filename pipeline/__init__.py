"""From a data set to mixed batches: plan, loaders, CutnMix.

>>> from cutnmix.pipeline import CutnMix
>>> mix = CutnMix(num_peers=2, num_classes=100, data_keys=["input", "class"])
>>> image_JBCHW, target_BK = mix(image_BCHW, label_B)
"""

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.cutnmix import CutnMix, mix_target, paste
from cutnmix.pipeline.dataset import DataError, Dataset, Splits
from cutnmix.pipeline.datasets import DATASETS, load_splits
from cutnmix.pipeline.distort import view_size
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.loader import Loader, make_loader
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws, Plan
from cutnmix.pipeline.resident import ResidentLoader

__all__ = [
    "DATASETS",
    "Batch",
    "Colour",
    "CutnMix",
    "DataError",
    "Dataset",
    "Distort",
    "Draws",
    "Loader",
    "Mix",
    "MixBatch",
    "Plan",
    "ResidentLoader",
    "Splits",
    "Views",
    "load_splits",
    "make_loader",
    "make_plan",
    "mix_target",
    "paste",
    "view_size",
]
