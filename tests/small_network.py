"""For `imports=[small_network]`: makes networks `small` and `dropping` known to a process that a test starts.

In the tests' own process NETWORKS must stay what it is: patch it with those of tasks.py there.
"""

from tasks import dropping, small

from cutnmix.models import NETWORKS

NETWORKS |= {"small": small, "dropping": dropping}
