import logging
import os

import pytest

from searchmerge.search.scores import ScoreStore

STORE_BYTES = 128 * 2**20

os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DEDUP_LOGS_SKIP_REGEX=".",
    # that a node or a worker is dead is heard of at once, and not after seconds
    RAY_health_check_initial_delay_ms="0",
    RAY_health_check_period_ms="300",
    RAY_kill_worker_timeout_milliseconds="200",
)


@pytest.fixture(scope="session")
def cluster():
    """Start a cluster of one node with 4 CPUs once for all tests; executors join it."""
    import ray
    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    node = {"num_cpus": 4, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def store(tmp_path):
    store = ScoreStore(tmp_path / "scores.db")
    yield store
    store.close()


@pytest.fixture
def notes(tmp_path):
    """Return a folder in which workers note what they do."""
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder
