import logging

import pytest


@pytest.fixture(scope="session")
def ray_session():
    """Start Ray once for all tests; executors join what runs already."""
    import os

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    yield ray
    ray.shutdown()
