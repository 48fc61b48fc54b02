"""
Engines as hops: their words, what is refused, what their own words mean.
"""

import pytest

from chaperone.model.hops import remote as remotes
from chaperone.model.hops.route import Route

pytestmark = pytest.mark.once


def route(*hops):
    return Route.of(remotes.hops({"hops": list(hops)}))


def test_srun_takes_what_is_asked_and_one_task():
    fields = {
        "partition": "main",
        "account": "etl",
        "time": "1-00:00:00",
        "memory": "4G",
        "cpus": 2,
        "gpus": "a100:1",
        "options": {"qos": "low", "exclusive": True, "overlap": False, "constraint": ["a", "b"]},
    }
    assert route({"srun": fields}).argv(["id", "-u n"]) == [
        "srun",
        "--partition=main",
        "--account=etl",
        "--time=1-00:00:00",
        "--mem=4G",
        "--cpus-per-task=2",
        "--gpus=a100:1",
        "--qos=low",
        "--exclusive",
        "--constraint=a",
        "--constraint=b",
        "--nodes=1",
        "--ntasks=1",
        "--unbuffered",
        "--",
        "id",
        "-u n",
    ]
    assert route({"srun": {}}).argv(["id"])[-2:] == ["--", "id"]


def test_container_is_entered_or_made_for_the_run():
    entered = route({"docker": {"container": "etl", "user": "1000:100", "workdir": "/data"}})
    assert entered.argv(["sh", "-c", "x"]) == [
        *("docker", "exec", "--interactive", "--user", "1000:100", "--workdir", "/data", "etl"),
        *("sh", "-c", "x"),
    ]
    made = route({"podman": {"image": "registry:5000/etl:3"}})
    assert made.argv(["sh", "-c", "x"]) == [
        *("podman", "run", "--rm", "--interactive", "--entrypoint", "sh", "registry:5000/etl:3"),
        *("-c", "x"),
    ]


def test_engines_stand_behind_other_hops():
    ssh = {"ssh": {"host": "head"}}
    assert route(ssh, {"srun": {"cpus": 2}}).argv(["id"])[-1] == (
        "exec srun --cpus-per-task=2 --nodes=1 --ntasks=1 --unbuffered -- id"
    )
    behind = route(ssh, {"srun": {"partition": "main"}}, {"podman": {"container": "etl"}})
    assert behind.place("me") == "in container etl, as whom the image names"
    assert route(ssh, {"srun": {"partition": "main"}}).place("me") == (
        "in a Slurm job of main, as whom ssh makes us"
    )
    assert behind.dies_with_client == "srun, because the job step ends when srun ends"
    assert route({"docker": {"image": "etl"}}).dies_with_client == (
        "docker run, because the container ends when docker run ends"
    )
    assert route(ssh, {"docker": {"container": "etl"}}).dies_with_client == ""


@pytest.mark.parametrize(
    "hop, sentence",
    [
        (
            {"srun": {"partition": "-x"}},
            "srun.partition: want a non-empty name that does not begin with '-', ",
        ),
        ({"srun": {"cpus": 0}}, "srun.cpus: want a whole number of at least 1, got 0"),
        ({"srun": {"cpus": True}}, "srun.cpus: want a whole number of at least 1, got true"),
        (
            {"srun": {"gpus": "--x"}},
            "srun.gpus: want a non-empty name that does not begin with '-', ",
        ),
        ({"srun": {"options": ["x"]}}, "srun.options: want an object of srun options, got a list"),
        (
            {"srun": {"options": {"--qos": "x"}}},
            "srun.options: want names of long options without '--', got '--qos'",
        ),
        (
            {"srun": {"options": {"pty": True}}},
            (
                "srun.options: want options that don't change the streams or the number of tasks, "
                "got 'pty'"
            ),
        ),
        (
            {"srun": {"options": {"qos": None}}},
            "srun.options.qos: want a text, a number, true or false, got null",
        ),
        ({"docker": {}}, "docker: want either container or image, got neither"),
        (
            {"podman": {"container": "a", "image": "b"}},
            "podman: want either container or image, got both",
        ),
        (
            {"docker": {"container": "-a"}},
            "docker.container: want a non-empty name that does not begin with '-', got '-a'",
        ),
        (
            {"docker": {"image": "--privileged"}},
            "docker.image: want an image that does not begin with '-', got '--privileged'",
        ),
        (
            {"docker": {"image": "a b"}},
            "docker.image: want an image without white space, got 'a b'",
        ),
        (
            {"docker": {"image": "a", "workdir": "data"}},
            "docker.workdir: want an absolute path, got 'data'",
        ),
        (
            {"docker": {"image": "a", "user": "-0"}},
            "docker.user: want a non-empty name that does not begin with '-', got '-0'",
        ),
    ],
)
def test_wrong_engine_is_refused_in_one_sentence(hop, sentence):
    with pytest.raises(ValueError) as caught:
        route(hop)
    assert str(caught.value).startswith(f"hops[0].{sentence}")


SRUN = "srun: job 5 queued and waiting for resources"
PULL = "Unable to find image 'etl:3' locally\n3: Pulling from etl\na1: Pull complete"


@pytest.mark.parametrize(
    "hop, words, queue",
    [
        ({"srun": {}}, SRUN, SRUN),
        ({"srun": {}}, f"hello\n{SRUN}\n", SRUN),
        ({"srun": {}}, f"{SRUN}\nsrun: job 5 has been allocated resources\n", None),
        ({"srun": {}}, "hello", None),
        ({"docker": {"image": "etl:3"}}, PULL, "a1: Pull complete"),
        ({"docker": {"image": "e"}}, f"{PULL}\nStatus: Downloaded newer image for etl:3", None),
        ({"podman": {"image": "etl:3"}}, "Trying to pull etl:3...\nCopying blob", "Copying blob"),
        ({"podman": {"image": "e"}}, "Trying to pull e...\nWriting manifest to image", None),
        ({"sudo": {"user": "u"}}, SRUN, None),
    ],
)
def test_queue_is_what_the_engine_says_of_it(hop, words, queue):
    assert route(hop).queue(words) == queue


@pytest.mark.parametrize(
    "hop, words, refusal",
    [
        (
            {"srun": {}},
            "srun: error: Unable to allocate resources: Invalid partition name specified",
            ("usage", False),
        ),
        (
            {"srun": {}},
            "srun: error: Unable to allocate resources: Unable to contact slurm controller",
            (None, True),
        ),
        ({"srun": {}}, "srun: Job allocation 5 has been revoked", ("connect", False)),
        (
            {"docker": {"container": "etl"}},
            "Error response from daemon: No such container: etl",
            ("name", False),
        ),
        (
            {"docker": {"container": "etl"}},
            "Error response from daemon: Container 0f is not running",
            (None, True),
        ),
        (
            {"podman": {"container": "e"}},
            'Error: no container with name or ID "e"',
            ("name", False),
        ),
    ],
)
def test_words_of_an_engine_mean_a_stage(hop, words, refusal):
    assert route(hop).refusal(words) == refusal
