"""Methods: what peers learn from one another. One file each, one line each in METHODS.

The contract is cutnmix.trainer.method; tests/test_methods.py holds every entry of METHODS to it.
"""

from typing import Any

from cutnmix.trainer.methods.baseline import Baseline
from cutnmix.trainer.methods.cs_kd import CSKD
from cutnmix.trainer.methods.cutnmix import CutnMixDistillation
from cutnmix.trainer.methods.ddgsd import DDGSD
from cutnmix.trainer.methods.dml import DML
from cutnmix.trainer.methods.kd import KD
from cutnmix.trainer.methods.kdcl import KDCL
from cutnmix.trainer.methods.okddip import OKDDip
from cutnmix.trainer.methods.one import ONE
from cutnmix.trainer.methods.pcl import PCL
from cutnmix.trainer.methods.ps_kd import PSKD
from cutnmix.trainer.methods.tf_kd import TfKD

METHODS: dict[str, Any] = {  # classes that keep the contract Method
    "baseline": Baseline,
    "dml": DML,
    "kdcl": KDCL,
    "cs_kd": CSKD,
    "ddgsd": DDGSD,
    "ps_kd": PSKD,
    "tf_kd": TfKD,
    "kd": KD,
    "one": ONE,
    "okddip": OKDDip,
    "pcl": PCL,
    "cutnmix": CutnMixDistillation,
}
