import pytest

from tests.execution import workers


@pytest.fixture
def pool(cluster):
    """Start executors, and close them at the end."""
    from searchmerge.execution.ray.cluster import RaySettings
    from searchmerge.execution.ray.pool import RayExecutor

    executors = []

    def start(make=workers.make, **settings):
        settings = {"workers": 2, "cpus": 0.5, "deadline_s": 60.0, **settings}
        executors.append(RayExecutor(make, RaySettings(**settings)))
        return executors[-1]

    yield start
    for executor in executors:
        executor.close()
