"""The same grid on a Ray cluster, one of whose machines is lost on the way."""

from __future__ import annotations

import json

import pytest
from test_tradeoff import GRID, without_times

from fltoolkit.errors import InputError
from fltoolkit.tradeoff import run
from fltoolkit.tradeoff.engines import OnRay
from fltoolkit.tradeoff.running import jobs_of

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_grid_survives_the_loss_of_one_of_two_workers(cluster, tmp_path):
    workers = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    cluster.wait_for_nodes()
    counts = []

    def report(done, of, text):
        counts.append(done)
        if done == 3:
            cluster.remove_node(workers[0], allow_graceful=False)

    content = run(GRID, tmp_path / "ray", engine_name="ray", address=cluster.address, report=report)
    jobs = len(list(jobs_of(GRID)))
    assert counts == list(range(1, jobs + 1))
    assert len(list((tmp_path / "ray" / "cells").glob("*.json"))) == jobs
    alone = run(GRID, tmp_path / "alone")
    assert json.dumps(without_times(content)) == json.dumps(without_times(alone))


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"that of a running Ray cluster, got '127\.0\.0\.1:1'"):
        OnRay("127.0.0.1:1", 1)
