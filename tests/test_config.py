"""What a run config may say."""

from pathlib import Path

import pytest
import yaml

from searchmerge.config import read_config
from searchmerge.errors import SpecError
from searchmerge.machine import available_cores

CONFIGS = Path(__file__).parents[1] / "configs"
README = CONFIGS.parent / "README.md"


@pytest.fixture
def config(tmp_path):
    def config(**data):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(data))
        return read_config(file)

    return config


def test_without_a_file_there_is_one_worker_in_this_process():
    assert read_config(None).executor == "local"


def test_workers_on_ray_have_defaults(config):
    assert config(executor="ray").workers.address == "local"
    workers = config(
        executor="ray", ray={"address": "head:6379", "gpus_per_worker": 0.5, "deadline": "30m"}
    ).workers
    assert (workers.address, workers.gpus_per_worker, workers.deadline) == ("head:6379", 0.5, 1800)


BAD = {
    "ray without its executor": ({"ray": {"workers": 2}}, "ray belongs to executor: ray"),
    "a client address": (
        {"executor": "ray", "ray": {"address": "ray://head:10001"}},
        r"ray\.address: allowed: local, auto, host:port; found 'ray://head:10001'",
    ),
    "one and a half GPUs": (
        {"executor": "ray", "ray": {"gpus_per_worker": 1.5}},
        r"ray\.gpus_per_worker: a fraction below 1 or a whole number is needed; found 1\.5",
    ),
    "no worker": ({"executor": "ray", "ray": {"workers": 0}}, r"ray\.workers: .*; found 0"),
    "no time": ({"executor": "ray", "ray": {"deadline": "soon"}}, r"ray\.deadline: .*'soon'"),
    "another executor": ({"executor": "dask"}, r"executor: .*'local' or 'ray'; found 'dask'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_by_line_and_key(config, name):
    data, message = BAD[name]
    with pytest.raises(SpecError, match=message) as refused:
        config(**data)
    assert "config.yaml:" in str(refused.value)


def test_the_cluster_file_starts_nodes_that_the_cluster_config_finds_room_on():
    cluster = yaml.safe_load((CONFIGS / "cluster" / "ray-up.yaml").read_text())
    types = cluster["available_node_types"]
    assert cluster["head_node_type"] in types
    assert cluster["max_workers"] == sum(kind.get("max_workers", 0) for kind in types.values())
    assert "ray start --head" in cluster["head_start_ray_commands"][-1]
    assert "ray start --address=$RAY_HEAD_IP" in cluster["worker_start_ray_commands"][-1]
    wanted = read_config(CONFIGS / "ray-cluster.yaml")
    assert (wanted.executor, wanted.workers.address) == ("ray", "auto")


def test_a_ray_worker_has_no_more_threads_than_it_may_use(config):
    ray = {"cpus_per_worker": 1000}
    assert config(executor="ray", ray=ray).worker_threads() == available_cores()
    assert config(executor="ray", ray={"cpus_per_worker": 0.5}).worker_threads() == 1
    assert config(executor="ray", ray=ray, threads=3).worker_threads() == 3


def test_the_load_of_this_machine_is_of_no_meaning_for_workers_elsewhere(config):
    assert config(executor="ray", ray={"address": "head:6379"}).crowding() == ""


@pytest.mark.parametrize(("gpus", "expected"), [(0, 1), (0.5, 1), (1, 1), (4, 4)])
def test_a_worker_has_a_model_spread_over_all_of_its_gpus(config, gpus, expected):
    workers = config(executor="ray", ray={"gpus_per_worker": gpus})
    assert workers.devices_per_worker == expected
    assert config().devices_per_worker == 1


def test_where_nothing_is_said_there_are_as_many_workers_here_as_there_are_processors(config):
    assert config().n_workers_here == 1
    assert config(executor="ray").n_workers_here == available_cores()
    assert config(executor="ray", ray={"workers": 3}).n_workers_here == 3
    assert config(executor="ray", ray={"gpus_per_worker": 1}).n_workers_here == 1


def test_the_readmes_configs_are_read_and_name_every_key(config):
    blocks = [block.split("```")[0] for block in README.read_text().split("```yaml")[1:]]
    shown = [yaml.safe_load(b) for b in blocks if b.lstrip().startswith("executor:")]
    read = [config(**data) for data in shown]
    assert [each.executor for each in read] == ["local", "ray"]
    assert {key for data in shown for key in data} == set(type(read[0]).model_fields)
    assert set(shown[1]["ray"]) == set(type(read[1].workers).model_fields)
