"""For `imports=[small_network]`: makes a network `small` known to a process that a test starts.

In the tests' own process NETWORKS must stay what it is: patch it with tasks.small there.
"""

from tasks import small

from cutnmix.models import NETWORKS

NETWORKS["small"] = small
