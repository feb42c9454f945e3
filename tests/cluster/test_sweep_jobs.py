"""One sweep file, three ways: an array without a server, `wandb agent`, and an array of agents; on a real SLURM."""

import json
import re

import pytest
import yaml

from biomerge_lib.core.composition import compose_parameters
from tests.cluster.mini_cluster import with_light_training

pytestmark = pytest.mark.integration
SHIPPED = "parameters/sweep/lora_ner_span.yaml"


def write_sweep(cluster, name, grid):
    """The shipped sweep file with a grid and a model for tests."""
    config = yaml.safe_load((cluster.project / SHIPPED).read_text())
    config["parameters"] = {parameter: {"values": values} for parameter, values in grid.items()}
    config["name"] = name
    config["command"] = [*config["command"][:-1], *cluster.tiny, "wandb_mode=online", config["command"][-1]]
    path = f"parameters/sweep/{name}.yaml"
    (cluster.project / path).write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def sweep_command(cluster, *words, expect=0):
    return cluster.call("python", "-m", "biomerge_lib", "sweep", *words, expect=expect)


@pytest.fixture(scope="module")
def light(cluster, tmp_path_factory):
    """An array's cost without training's."""
    finish = """import os
from biomerge_lib.core.files import write_json

write_json(run.checkpoints / "checkpoint-1/adapter_config.json", {})
score = parameters.learning_rate * 100 + parameters.lora_rank / 100
wandb = {"group": os.environ.get("WANDB_RUN_GROUP"), "name": os.environ.get("WANDB_NAME")}
run.finish({"eval_ner_f1": score, "best_checkpoint": "checkpoint-1", **wandb})"""
    return with_light_training(cluster, tmp_path_factory.mktemp("light") / "project", finish)


@pytest.fixture(scope="module")
def swept(light):
    """Six points, two at a time, the first made to fail; then the same command again. (file, first job, second)"""
    path = write_sweep(light, "tiny", {"learning_rate": [1e-3, 2e-3, 4e-3], "lora_rank": [4, 8]})
    run_id = re.search(r"0\s+(tiny-llama\S+)", sweep_command(light, path))[1]
    obstacle = light.runs / run_id / "parameters.yaml"
    obstacle.parent.mkdir(parents=True)
    other = compose_parameters([*light.tiny, f"run_id={run_id}", "lora_rank=2"])
    obstacle.write_text(yaml.safe_dump(other.model_dump()))
    first = submit_sweep(light, path)
    obstacle.unlink()
    return path, [first, submit_sweep(light, path)]


def submit_sweep(cluster, path):
    output = cluster.call("bash", "slurm/submit_sweep.sh", path, "wandb_mode=disabled", AT_ONCE="2")
    job, points = re.search(r"job (\d+) trains the points (\S+):", output).groups()
    cluster.wait(job)
    return job, points


def test_an_array_trains_the_grid_and_the_same_command_retries_what_failed(light, swept):
    path, [(first, all_points), (second, failed_points)] = swept
    assert (all_points, failed_points) == ("0,1,2,3,4,5", "0")
    assert light.log(f"{first}_0").count("FAILED") == 1 and "lora_rank=2 (not 4)" in light.log(f"{first}_0")
    for task in [f"{first}_{number}" for number in range(1, 6)] + [f"{second}_0"]:
        assert "finished after" in light.log(task)
    assert "all points are finished" in light.call(
        "bash", "slurm/submit_sweep.sh", path, "wandb_mode=disabled"
    )


def test_the_points_are_ranked_and_the_best_checkpoint_is_named(light, swept):
    lines = sweep_command(light, swept[0]).splitlines()
    assert lines[0] == "tiny: 6 of 6 points finished"
    assert lines[1].split() == ["rank", "eval_ner_f1", "learning_rate", "lora_rank", "point", "run"]
    scores = [float(line.split()[1]) for line in lines[2:8]]
    assert scores == sorted(scores, reverse=True)
    best = light.runs / lines[2].split()[-1]
    metrics = json.loads((best / "metrics.json").read_text())["stages"]["03_train"]["metrics"]
    assert f"{metrics['eval_ner_f1']:.4f}" == lines[2].split()[1]
    assert (metrics["group"], metrics["name"]) == ("tiny", "learning_rate=0.004 lora_rank=8")  # W&B's
    checkpoint = lines[8].removeprefix("best checkpoint: ")
    assert checkpoint.startswith(f"{best}/checkpoints/checkpoint-")
    assert (light.project / checkpoint / "adapter_config.json").is_file()
    assert not (best / "merged").exists()  # sweeps do not keep 16 GB a point


def test_a_finished_point_is_skipped_until_the_data_change(light, swept):
    assert "nothing to do" in sweep_command(light, "--point", "2", swept[0])
    dev = light.project / "data/tiny/dev.jsonl"
    lines = dev.read_text()
    try:
        dev.write_text(lines + lines.splitlines(keepends=True)[0])
        assert "(dev.jsonl changed since)" in sweep_command(light, swept[0])
        assert sweep_command(light, "--pending", swept[0]).strip() == "0,1,2,3,4,5"
    finally:
        dev.write_text(lines)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"Dropout": [0.05]}, "unknown parameter 'Dropout'. Did you mean 'lora_dropout'?"),
        ({"lora_rank": ["many"]}, "lora_rank='many'"),
    ],
)
def test_a_sweep_key_that_is_no_parameter_is_refused_before_anything_is_submitted(cluster, grid, message):
    path = write_sweep(cluster, "wrong", grid)
    output = cluster.call("bash", "slurm/submit_sweep.sh", path, expect=2)
    assert message in output and "trains the points" not in output


def create_sweep(cluster, path):
    output = cluster.call("wandb", "sweep", "--project", "TaskMerge", path)
    return re.search(r"wandb agent (\S+)", output)[1]


@pytest.fixture(scope="module")
def agents(cluster, light, campaign):
    """``wandb sweep`` on a file of two points, then an array of three ``wandb agent --count 1``. (sweep, job)

    Meanwhile one agent outside SLURM has a sweep to itself.
    """
    local = create_sweep(light, write_sweep(light, "local", {"learning_rate": [3e-3, 5e-3]}))
    sweep = create_sweep(cluster, write_sweep(cluster, "agents", {"learning_rate": [5e-4, 3e-3]}))
    job = cluster.submit("--array=0-2", "slurm/job_sweep_ner.sbatch", sweep)
    light.call("wandb", "agent", local)
    cluster.wait(job)
    return sweep, job


def test_agents_train_each_point_once_through_the_notebook(cluster, agents, wandb_server):
    sweep = wandb_server.sweeps[agents[0].rpartition("/")[2]]
    assert not sweep["waiting"] and len(sweep["given"]) == 2
    for name in sweep["given"]:
        run = wandb_server.runs[name]
        config = json.loads(run["config"])
        folder = cluster.runs / config["run_id"]["value"]
        metrics = json.loads((folder / "metrics.json").read_text())["stages"]["03_train"]["metrics"]
        assert json.loads((folder / "wandb.json").read_text())["id"] == name
        assert run["summary"]["eval_ner_f1"] == metrics["eval_ner_f1"]  # what the server ranks by
        assert run["displayName"] == f"learning_rate={config['learning_rate']['value']}"
        assert run["groupName"] == run["sweep"] == agents[0].rpartition("/")[2]
        assert any("eval_ner_f1" in entry for entry in run["history"])
    assert "6 of 6" not in sweep_command(cluster, "parameters/sweep/agents.yaml")
    assert "2 of 2 points finished" in sweep_command(cluster, "parameters/sweep/agents.yaml")


def test_an_agent_outside_slurm_trains_every_point(light, agents):
    assert "2 of 2 points finished" in sweep_command(light, "parameters/sweep/local.yaml")


def test_parameters_behind_a_server_sweep_are_refused_not_ignored(cluster):
    job = cluster.submit(
        "--array=0", "slurm/job_sweep_ner.sbatch", "local/TaskMerge/s1", "model=smollm2_135m"
    )
    cluster.wait(job)
    assert cluster.state(job) == "FAILED"
    assert "ERROR: model=smollm2_135m: W&B's agents run the command that the server has" in cluster.log(job)


def test_the_shipped_sweep_is_one_that_wandb_takes(cluster, wandb_server):
    cluster.call("wandb", "sweep", "--project", "TaskMerge", SHIPPED)
    [*_, sweep] = wandb_server.sweeps.values()
    assert len(sweep["waiting"]) == 18
    assert sweep_command(cluster, "--pending", SHIPPED).strip() == ",".join(map(str, range(18)))
    small = ("model=smollm2_135m", "runtime=cpu_debug")  # the same grid with another model
    assert "smollm2-135m" in sweep_command(cluster, SHIPPED, *small)
