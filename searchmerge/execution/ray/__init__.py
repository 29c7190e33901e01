"""Workers on a Ray cluster: the cluster, the actors, and the executor that has a pool of them."""

import os

from searchmerge.machine import wait_asleep

# Ray reads these when it is imported: no usage report, no raylet messages between our lines
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")

# a worker imports this before it imports torch
wait_asleep()
