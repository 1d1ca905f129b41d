"""The launchers against stand-ins of gcloud, xpk, kubectl, sbatch and the like.

A stand-in writes down the words of each call and gives the answer that the test set; no real tool
is called.
"""

import os
import pathlib
import re
import shlex
import signal
import subprocess
import time

import pytest

REPO = pathlib.Path(__file__).resolve().parents[2]
LAUNCHERS = ("tpu", "gke", "slurm", "sky")
TOOLS = (
    "gcloud",
    "git",
    "xpk",
    "kubectl",
    "sbatch",
    "squeue",
    "scancel",
    "scontrol",
    "srun",
    "sky",
)
AWKWARD = """--config.note=it's "a" $HOME; `test` \\ *"""

COMMON = {"NAME": "n", "CONFIG": "configs/digits.py", "POLL_SECONDS": "0"}
GOOGLE = {"PROJECT": "p", "ZONE": "z", "BUCKET": "b", "WORKDIR": "/mnt/repulsor/run"}
SETTINGS = {
    "tpu": COMMON
    | GOOGLE
    | {"ACCELERATOR_TYPE": "v5litepod-8", "RUNTIME_VERSION": "v", "PROVISIONING": "spot"}
    | {"AUTO_RECREATE": "true", "MAX_STARTS": "3", "RETRIES": "1", "RETRY_SECONDS": "0"},
    "gke": COMMON | GOOGLE | {"CLUSTER": "c", "TPU_TYPE": "v5litepod-8", "PROVISIONING": "spot"},
    "slurm": COMMON | {"NODES": "2", "GPUS_PER_NODE": "4", "TIME": "1:00:00"},
    "sky": {"NAME": "n", "GPUS": "H100:8", "BUCKET": "gs://b", "CONFIG": "configs/digits.py"}
    | {"WORKDIR": "/bucket/run"},
}

# In the file of calls, each word ends with NUL and each call with a record separator and NUL; a
# call is written at once, for stand-ins run at the same time. An answer is text for standard
# output; (code, text) fails with the text on standard error; "sh: ..." is run by the shell, with
# the call's words as $@.
STAND_IN = r"""#!/usr/bin/env bash
call=("${0##*/}" "$@")
printf '%s\0' "${call[@]}" $'\x1e' >>"$STAND_IN/calls"
in_turn() {
  local file=$STAND_IN/turn_$1 turn=0 answer code
  shift
  if [[ -f $file ]]; then turn=$(<"$file"); fi
  echo $((turn + 1)) >"$file"
  if ((turn >= $#)); then turn=$(($# - 1)); fi
  answer=${*:turn+1:1}
  case $answer in
    fail:*) code=${answer#fail:}; printf '%s\n' "${code#*:}" >&2; exit "${code%%:*}" ;;
    sh:*) set -- "${call[@]:1}"; eval "${answer#sh:}" ;;
    *) printf '%s' "${answer:+$answer$'\n'}" ;;
  esac
}
source "$STAND_IN/rules"
"""


class Launch:
    """Runs launchers with stand-ins on PATH."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "STAND_IN": str(folder), "HOME": str(folder / "home")}
        self.environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        for name in ("bin", "home", "work"):
            (folder / name).mkdir()
        for tool in TOOLS:
            self.tool(tool, STAND_IN)
        self.answers({})

    def tool(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, rules: dict[str, object]) -> "Launch":
        """Sets the answers: words in a call -> its answer, or a list of answers in turn.

        The first rule that fits a call holds; the last answer of a list is repeated.
        """
        cases = []
        for i, (pattern, given) in enumerate(rules.items()):
            words = []
            for answer in given if isinstance(given, list) else [given]:
                words.append(
                    f"fail:{answer[0]}:{answer[1]}" if isinstance(answer, tuple) else answer
                )
            cases.append(f"*{shlex.quote(pattern)}*) in_turn {i} {shlex.join(words)} ;;")
        (self.folder / "rules").write_text(f'case "${{call[*]}}" in\n{chr(10).join(cases)}\nesac\n')
        return self

    def settings(self, launcher: str, *arguments: str, **changes: str) -> pathlib.Path:
        values = {"WORKDIR": str(self.folder / "work"), **SETTINGS[launcher], **changes}
        path = self.folder / f"{launcher}.env"
        lines = [f"{key}={value}" for key, value in values.items()]
        path.write_text("\n".join(["# a comment", "", *lines, *(f"ARG={a}" for a in arguments)]))
        return path

    def start(self, launcher: str, *words: str) -> subprocess.Popen[str]:
        # A shell that runs these tests in the background lets them inherit that ctrl-C is ignored,
        # and bash cannot trap a signal that was ignored at its start. A handler is not inherited.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                ["bash", str(REPO / "launch" / f"{launcher}.sh"), *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def __call__(
        self, launcher: str, *words: str, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs one command with the settings of SETTINGS and `changes`."""
        if not any(word.startswith("--settings") for word in words):
            words = (words[0], f"--settings={self.settings(launcher, **changes)}", *words[1:])
        process = self.start(launcher, *words)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        return [call.split("\0")[:-1] for call in text.split("\x1e\0") if call]

    def steps(self) -> list[str]:
        """The calls in short, without status calls and logs, whose number depends on time."""
        names = []
        for call in self.calls():
            text = " ".join(call)
            for what, words in {
                "": "queued-resources describe|worker.sh (status|follow)|kubectl logs|^git "
                "|filter-by-job|squeue|jobs queue",
                "create": "queued-resources create",
                "delete by force": "queued-resources delete .*--force",
                "delete": "queued-resources delete",
                "copy": "tpu-vm scp",
            }.items():
                if re.search(words, text):
                    name = what
                    break
            else:
                worker = re.search(r"worker\.sh (\w+)", text)
                name = worker[1] if worker and call[0] == "gcloud" else " ".join(call[:3])
            if name:
                names.append(name)
        return names


@pytest.fixture
def launch(tmp_path: pathlib.Path) -> Launch:
    return Launch(tmp_path)


NOT_FOUND = (
    1,
    "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource",
)
NONE = "worker a none"
RUNNING = "worker a running\nworker b running"
DONE = "worker a exited 0 5.0\nworker b exited 0 6.0"


def tpu(states: list[object], statuses: list[object] | None = None) -> dict[str, object]:
    """Rules of gcloud: the answers of describe, and those of the workers."""
    return {"queued-resources describe": states, "worker.sh status": statuses or [RUNNING, DONE]}


def wait_for(condition):
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that in 20 s")


# --- all launchers

ARCHIVE = ["archive", "mkdir", "tar"]
DRY_RUNS = {
    "tpu": {
        "all": ["describe", "create", "describe", "archive", "scp", "install", "count", "start",
                "follow", "status"],
        "up": ["describe", "create", "describe"],
        "down": ["delete"],
        "status": ["describe", "status"],
    },
    "gke": {
        "up": ["cluster create", "storage attach"],
        "all": [*ARCHIVE, "workload create", "kubectl", "workload list"],
        "down": ["workload delete"],
        "down-cluster": ["cluster delete"],
    },
    "slurm": {"install": ["install cuda"], "all": ["mkdir", "sbatch", "tail"], "down": ["scancel"]},
    "sky": {"all": ["jobs launch", "jobs logs"], "down": ["jobs cancel"]},
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_prints_every_command_and_runs_none(launch, launcher):
    path = launch.settings(launcher, AWKWARD)
    for command, expected in DRY_RUNS[launcher].items():
        result = launch(launcher, command, f"--settings={path}", "--dry-run")
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert len(lines) == len(expected)
        for line, words in zip(lines, expected, strict=True):
            assert line.startswith("$ ")
            assert words in line
            shlex.split(line)  # it can be pasted
    assert launch.calls() == []
    assert not list((launch.folder / "work").iterdir())


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_explains_its_settings_and_deletes_nothing_unasked(launch, launcher):
    script = (REPO / "launch" / f"{launcher}.sh").read_text()
    required = re.search(r"REQUIRED=\(([^)]*)\)", script)[1].split()
    optional = re.search(r"OPTIONAL=\(([^)]*)\)", script)[1].split()
    lines = (REPO / "launch" / f"{launcher}.env").read_text().splitlines()
    keys = [line.lstrip("# ").split("=")[0] for line in lines if re.match(r"(# )?[A-Z_]+=", line)]
    assert sorted(keys) == sorted([*required, *(word.split("=")[0] for word in optional), "ARG"])
    usage = launch(launcher, "--help").stdout
    commands = re.findall(r"^  ([a-z-]+)\)(?: |$)", script, re.MULTILINE)
    assert set(commands) >= {"all", "run", "logs", "status", "down"}
    for command in commands:
        assert re.search(rf"^  {command}  ", usage, re.MULTILINE)
    refused = launch(launcher, "status", WORKDIR="runs")
    assert "WORKDIR=runs: expected a path" in refused.stderr

    result = launch(launcher, "down")
    assert result.returncode == 1
    assert "nothing was deleted" in result.stderr
    assert launch.calls() == []
    assert launch(launcher, "down", "--yes").returncode == 0
    deletes = {"tpu": "delete by force", "gke": "xpk workload delete",
               "slurm": "scancel --me --name=n", "sky": "sky jobs cancel"}  # fmt: skip
    assert launch.steps() == [deletes[launcher]]


def test_installing_on_a_cluster_needs_no_settings(launch):
    result = launch("slurm", "install", "--settings=/none", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "worker.sh install cuda" in result.stdout


def test_a_wrong_command_line_or_setting_is_named(launch):
    assert "fly: no such command" in launch("tpu", "fly").stderr
    assert "--fast: no such option" in launch("tpu", "up", "--fast").stderr
    assert "cannot be read" in launch("tpu", "status", "--settings=/none").stderr
    path = launch.settings("tpu", CONFIG="")
    assert f"{path}: CONFIG has no value" in launch("tpu", "status", f"--settings={path}").stderr
    path = launch.settings("tpu", CONFG="secret")
    error = launch("tpu", "status", f"--settings={path}").stderr
    assert "unknown key CONFG" in error
    assert "CONFIG" in error.split("the keys are")[1]
    assert "secret" not in error
    for change, message in {
        'NAME="n"': "leave the quotes out",
        "NAME = n": "expected KEY=value",
        "MAX_STARTS=many": "MAX_STARTS=many: expected a number",
    }.items():
        path = launch.settings("tpu")
        path.write_text(path.read_text() + f"\n{change}")
        result = launch("tpu", "status", f"--settings={path}")
        assert message in result.stderr
        assert result.returncode == 1
    assert launch.calls() == []
    (launch.folder / "bin" / "sky").unlink()
    launch.environment["PATH"] = f"{launch.folder / 'bin'}:/usr/bin:/bin"
    assert "sky is not on PATH" in launch("sky", "run").stderr


def test_a_settings_file_is_not_executed(launch):
    path = launch.settings("tpu", NAME="$(touch hacked)`touch hacked`")
    launch.answers(tpu(["ACTIVE"]))
    launch("tpu", "up", f"--settings={path}")
    assert "$(touch hacked)`touch hacked`" in launch.calls()[0]


GIT_ARCHIVE = (
    'sh:for word; do case $word in --output=*) tar -czf "${word#*=}" -T /dev/null ;; esac; done'
)
SLOW = "sh:echo; exec sleep 20"


@pytest.mark.parametrize(
    ("launcher", "rules", "when"),
    [
        ("tpu", tpu([NOT_FOUND, "WAITING_FOR_RESOURCES", SLOW]), "create"),
        ("tpu", tpu(["ACTIVE"], [NONE, SLOW]) | {"worker.sh follow": SLOW}, "start.*sh status"),
        ("gke", {"git -C": GIT_ARCHIVE, "wait-for-job": SLOW, "kubectl": SLOW}, "wait-for-job"),
    ],
    ids=["tpu queued", "tpu runs", "gke"],
)
def test_ctrl_c_leaves_all_as_it_is_and_says_how_to_go_on(launch, launcher, rules, when):
    launch.answers(rules)
    process = launch.start(launcher, "all", f"--settings={launch.settings(launcher)}")
    wait_for(lambda: re.search(when, " ".join(" ".join(call) for call in launch.calls())))
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "interrupted" in err
    assert f"launch/{launcher}.sh logs --settings={launch.folder}" in err
    assert f"launch/{launcher}.sh down" in err
    assert not re.search("delete|cancel", " ".join(launch.steps()))
    time.sleep(0.1)
    before = launch.calls()
    time.sleep(0.2)
    assert launch.calls() == before  # nothing goes on in the background


# --- Cloud TPU


def test_tpu_all_goes_from_nothing_to_the_end_of_the_run(launch):
    states = [NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    launch.answers(tpu(states, [RUNNING, RUNNING, DONE]))
    path = launch.settings("tpu", AWKWARD)
    result = launch("tpu", "all", f"--settings={path}", "--", "--mode=sample", "two words")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == ["create", "copy", "install", "count", "start"]
    assert "the run is complete" in result.stderr
    assert "cost" in result.stderr  # the machines are still there
    [create] = [call for call in launch.calls() if "create" in call]
    assert create[5:] == [
        "n", "--zone=z", "--project=p", "--accelerator-type=v5litepod-8", "--runtime-version=v",
        "--node-id=n", "--spot",
    ]  # fmt: skip
    [start] = [call for call in launch.calls() if "worker.sh start" in call[-1]]
    assert start[1:6] == ["compute", "tpus", "tpu-vm", "ssh", "n"]
    assert "--worker=all" in start
    words = shlex.split(start[-1].removeprefix("--command="))
    words = words[words.index("start") + 1 :]
    assert words[:2] == ["--config=configs/digits.py", "--workdir=/mnt/repulsor/run"]
    assert words[2:5] == [AWKWARD, "--mode=sample", "two words"]


def test_tpu_every_slice_is_installed_started_and_watched(launch):
    states = [NOT_FOUND, "ACTIVE first second"]  # describe gives the names
    launch.answers(tpu(states, [RUNNING, RUNNING, DONE, RUNNING, DONE, DONE]))
    result = launch("tpu", "all", NUM_SLICES="2")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == ["create", *["copy"] * 2, *["install"] * 2, "count", *["start"] * 2]
    for what in ("tpu-vm scp", "worker.sh install", "worker.sh start", "worker.sh status"):
        calls = [" ".join(call) for call in launch.calls() if what in " ".join(call)]
        assert ["first" in call for call in calls] == [True, False] * (len(calls) // 2)
    [create] = [call for call in launch.calls() if "create" in call]
    assert {"--node-count=2", "--node-prefix=n"} <= set(create)
    assert "--num-slices=4" in launch("gke", "up", "--dry-run", NUM_SLICES="4").stdout


ONCE = ["create", "copy", "install", "count", "start"]
GONE = (255, "ssh: connect to host: timed out")
AWAY = (1, "ERROR: network is unreachable")
CLOSED = (1, "connection closed")


RECOVERIES = {
    "no answer for long": (
        tpu(["ACTIVE", *[AWAY] * 5], [RUNNING, "", "", *[AWAY] * 5, RUNNING, DONE]), []
    ),
    "preempted at install": (
        tpu([NOT_FOUND, "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"])
        | {"worker.sh install": [CLOSED, CLOSED, ""]},
        ["create", "copy", "install", "install", "delete", *ONCE],
    ),
    "preempted": (
        tpu([NOT_FOUND, "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"],
            [RUNNING, GONE, RUNNING, DONE]),
        [*ONCE, "delete", *ONCE],
    ),
}  # fmt: skip
ENDS = {
    "killed": "worker a exited 1 9.0\nworker b exited 134 5.0",  # a complained because b was killed
    "saved": "worker a exited 75 5.0\nworker b running",
    "machine is new": "worker a none\nworker b running",
}
RECOVERIES |= {
    name: (
        tpu([NOT_FOUND, "ACTIVE"], [RUNNING, ended, ended, RUNNING, DONE]),
        [*ONCE, "stop", *ONCE[1:]],
    )
    for name, ended in ENDS.items()
}


@pytest.mark.parametrize("name", RECOVERIES)
def test_tpu_a_run_survives(launch, name):
    rules, steps = RECOVERIES[name]
    result = launch.answers(rules)("tpu", "all")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == steps


def test_tpu_a_preempted_request_is_kept_unless_the_settings_say_otherwise(launch):
    launch.answers(tpu(["SUSPENDED"]))
    result = launch("tpu", "all", AUTO_RECREATE="false")
    assert result.returncode == 1
    assert "AUTO_RECREATE=true" in result.stderr
    assert launch("tpu", "up").returncode == 1  # up never deletes
    assert launch.steps() == []


# --- what runs on the machines

PYTHON = """#!/usr/bin/env bash
trap 'echo told to save; exit 75' TERM
printf '%s\\0' "$@" >"$STAND_IN/program"
echo "step 1"
eval "$(<"$STAND_IN/behave")"
"""


class Worker:
    """launch/worker.sh with a stand-in for Python, whose behaviour is a piece of shell."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        launch.tool("program", PYTHON)
        launch.environment["REPULSOR_PYTHON"] = str(launch.folder / "bin" / "program")
        self.behave("exit 0")

    def behave(self, shell: str) -> None:
        (self.launch.folder / "behave").write_text(shell)

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPO / "launch" / "worker.sh"), *words]
        return subprocess.run(
            command, env=self.launch.environment, capture_output=True, text=True, timeout=30
        )

    def ended(self) -> str:
        wait_for(lambda: "running" not in self("status").stdout)
        return self("status").stdout.split(maxsplit=2)[2]

    def words(self) -> list[str]:
        """The words that the program was started with."""
        return (self.launch.folder / "program").read_text().split("\0")[:-1]


@pytest.fixture
def worker(launch: Launch) -> Worker:
    return Worker(launch)


def test_a_worker_runs_the_program_detached_and_tells_how_it_ended(worker):
    assert worker("status").stdout.endswith("none\n")
    worker.behave("exit 3")
    worker("start", AWKWARD, "two words")
    assert worker.ended().startswith("exited 3 ")
    assert worker.words() == ["-m", "repulsor_jax.main", AWKWARD, "two words"]
    assert "exit code 3" in worker("tail").stdout
    assert worker("tail", "another-host").stdout == ""


def test_a_worker_starts_once_and_stops_with_time_to_save_or_by_force(worker):
    worker.behave("sleep 20 & wait $!")
    worker("start")
    assert "runs already" in worker("start").stdout
    wait_for(lambda: "step 1" in worker("tail").stdout)
    worker("stop", "20")
    assert worker.ended().startswith("exited 75 ")
    assert "told to save" in worker("tail").stdout
    worker.behave("trap '' TERM; sleep 20 & wait $!")
    worker("start")
    worker("stop", "1")
    assert worker.ended().startswith("exited 137 ")


def test_starts_are_counted_until_there_is_a_new_checkpoint(worker, tmp_path):
    count = ("count", str(tmp_path / "run"), "2")
    assert [worker(*count).returncode for _ in range(2)] == [0, 0]
    refused = worker(*count)
    assert refused.returncode == 1
    assert "2 starts" in refused.stderr
    assert worker(*count).returncode == 0  # by hand, after a look
    (tmp_path / "run/checkpoints/100.orbax-checkpoint-tmp").mkdir(parents=True)
    assert worker(*count).returncode == 0
    assert worker(*count).returncode == 1  # an unfinished checkpoint is no progress
    for step in ("20", "100"):
        (tmp_path / "run/checkpoints" / step).mkdir()
        assert [worker(*count).returncode for _ in range(2)] == [0, 0]


def test_tpu_and_worker_together(launch, worker, tmp_path):
    """gcloud ssh runs its command here: the worker understands the launcher's words."""
    home = launch.folder / "home"
    (home / "repulsor_jax").mkdir()
    (home / "repulsor_jax" / "launch").symlink_to(REPO / "launch")
    remote = 'sh:for word; do case $word in --command=*) cd && bash -c "${word#*=}" ;; esac; done'
    workdir = tmp_path / "run with a space"
    starts = shlex.quote(str(workdir / ".starts"))
    worker.behave(f"read -r _ n <{starts}; if [ $n = 1 ]; then exit 75; fi; exit 0")
    launch.answers(
        {"worker.sh install": "", "queued-resources describe": [NOT_FOUND, "ACTIVE"], "ssh": remote}
    )
    path = launch.settings("tpu", AWKWARD, WORKDIR=str(workdir), STOP_SECONDS="1")
    result = launch("tpu", "all", f"--settings={path}")
    assert result.returncode == 0, result.stderr
    assert launch.steps().count("start") == 2
    assert AWKWARD in worker.words()
    assert (workdir / ".starts").read_text() == "none 2\n"


# --- GKE


def test_gke_from_nothing_to_the_end_of_the_workload(launch):
    launch.answers({"git -C": GIT_ARCHIVE, "kubectl logs": "step 1"})
    path = launch.settings("gke", AWKWARD)
    assert launch("gke", "up", f"--settings={path}").returncode == 0
    result = launch("gke", "all", f"--settings={path}", "--", "two words")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == [
        "xpk cluster create", "xpk storage attach", "xpk workload create", "xpk workload list",
    ]  # fmt: skip
    [create] = [call for call in launch.calls() if call[1:3] == ["workload", "create"]]
    assert "--restart-on-exit-codes=75" in create
    assert "--max-restarts=100" in create
    [command] = [
        word.removeprefix("--command=") for word in create if word.startswith("--command=")
    ]
    assert "\n" not in command  # xpk puts it into a block of YAML
    words = shlex.split(command.split("exec ")[1])
    assert words[:3] == [".venv/bin/python", "-m", "repulsor_jax.main"]
    assert words[5:7] == [AWKWARD, "two words"]


def test_gke_waits_longer_than_xpk_and_picks_the_log_up_again(launch):
    slow = "sh:sleep 0.3"
    launch.answers(
        {"git -C": GIT_ARCHIVE, "wait-for-job": [(124, "timed out"), slow], "kubectl": ""}
    )
    result = launch("gke", "all")
    assert result.returncode == 0
    assert "kubectl" not in result.stderr  # commands in the background are not printed
    assert launch.steps().count("xpk workload list") == 2
    assert sum(call[0] == "kubectl" for call in launch.calls()) > 1


# --- Slurm


def test_slurm_submits_one_task_for_each_gpu_and_waits_for_the_job(launch):
    log = launch.folder / "work" / "slurm.log"
    end = f"sh:echo '--- the run is complete' >>{shlex.quote(str(log))}"
    launch.answers({"squeue": ["", "7", end], "sbatch": "7"})
    path = launch.settings("slurm", AWKWARD)
    result = launch("slurm", "all", f"--settings={path}", "--", "two words")
    assert result.returncode == 0, result.stderr
    [submitted] = [call for call in launch.calls() if call[0] == "sbatch"]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"} <= set(submitted)
    assert "--signal=B:USR1@300" in submitted
    job = submitted[submitted.index(str(REPO / "launch" / "slurm.sbatch")) + 1 :]
    assert job[:2] == [str(launch.folder / "work"), "5"]
    assert job[4:6] == [AWKWARD, "two words"]


class Job:
    """launch/slurm.sbatch under a stand-in of srun that runs two tasks, one after the other."""

    TASKS = (
        "sh:while case $1 in --*) ;; *) false ;; esac; do shift; done; code=0; "
        'for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" || '
        "{ one=$?; if ((one > code)); then code=$one; fi; }; done; exit $code"
    )

    def __init__(self, launch: Launch, worker: Worker) -> None:
        self.launch = launch
        self.worker = worker
        launch.environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
        launch.environment |= {"SLURM_CPUS_PER_TASK": "8"}  # which srun does not read everywhere
        launch.answers({"srun": self.TASKS})

    def start(self, max_starts: str = "5") -> subprocess.Popen[str]:
        script, workdir = str(REPO / "launch/slurm.sbatch"), str(self.launch.folder / "work")
        return subprocess.Popen(
            ["bash", script, workdir, max_starts, AWKWARD],
            cwd=REPO,
            env=self.launch.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, shell: str, **options: str) -> tuple[int, str]:
        self.worker.behave(shell)
        process = self.start(**options)
        out, _ = process.communicate(timeout=30)
        return process.returncode, out


@pytest.fixture
def job(launch: Launch, worker: Worker) -> Job:
    return Job(launch, worker)


REQUEUE = "scontrol requeue 7"


@pytest.mark.parametrize(
    ("shell", "code", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 75", 0, True),
        ("if [ $SLURM_PROCID = 1 ]; then kill -KILL $$; fi", 0, True),  # one task dies
        ("if [ $SLURM_PROCID = 0 ]; then exit 75; fi; exit 2", 1, False),  # one task fails
    ],
)
def test_slurm_job_is_requeued_if_it_can_go_on(job, shell, code, requeued):
    found, out = job.run(shell)
    assert found == code, out
    assert (REQUEUE in job.launch.steps()) == requeued
    assert ("is not run again" in out) == (code == 1)
    assert AWKWARD in job.worker.words()
    [srun] = [call for call in job.launch.calls() if call[0] == "srun"]
    assert "--cpus-per-task=8" in srun


def test_slurm_job_without_progress_comes_to_an_end(job):
    codes = [job.run("exit 75", max_starts="2")[0] for _ in range(3)]
    assert codes == [0, 0, 1]
    assert job.launch.steps().count(REQUEUE) == 2


def test_slurm_job_that_cannot_be_requeued_says_so(job):
    job.launch.answers({"srun": job.TASKS, "scontrol": (1, "Requested operation is disabled")})
    code, out = job.run("exit 75")
    assert code == 75
    assert "submit it again" in out


@pytest.mark.parametrize(
    ("sent", "cancelled", "requeued"),
    [(signal.SIGUSR1, True, True), (signal.SIGTERM, False, False)],
)
def test_slurm_job_saves_before_its_time_is_up_and_stays_cancelled(job, sent, cancelled, requeued):
    """USR1 is Slurm's warning; TERM comes with scancel by hand and with preemption."""
    told = job.launch.folder / "told"
    scancel = f"sh:touch {shlex.quote(str(told))}"
    job.launch.answers({"srun": job.TASKS, "scancel": scancel})
    job.worker.behave(f"until [ -e {shlex.quote(str(told))} ]; do sleep 0.02; done; exit 75")
    process = job.start()
    wait_for((job.launch.folder / "program").exists)
    process.send_signal(sent)
    if not cancelled:  # Slurm itself tells the tasks
        told.touch()
    out, _ = process.communicate(timeout=30)
    assert ("scancel --signal=TERM 7" in job.launch.steps()) == cancelled, out
    assert (REQUEUE in job.launch.steps()) == requeued


# --- SkyPilot


def test_sky_launches_follows_and_returns_how_the_job_ended(launch):
    path = launch.settings("sky", AWKWARD, NUM_NODES="2", USE_SPOT="true")
    result = launch("sky", "all", f"--settings={path}", "--", "two words")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == ["sky jobs launch", "sky jobs logs"]
    [called] = [call for call in launch.calls() if "launch" in call]
    assert {"--num-nodes=2", "--gpus=H100:8", "--use-spot", "--env=BUCKET=gs://b"} <= set(called)


def test_sky_task_joins_its_nodes_and_the_first_counts_the_start(launch, worker):
    path = launch.settings("sky", AWKWARD)
    launch("sky", "run", f"--settings={path}", "--", "two words")
    [called] = [call for call in launch.calls() if "launch" in call]
    given = dict(word.removeprefix("--env=").split("=", 1) for word in called if "--env=" in word)
    task = (REPO / "launch" / "sky.yaml").read_text()
    assert set(given) == set(re.findall(r"^  ([A-Z_]+): null", task, re.MULTILINE))
    assert "recover_on_exit_codes: [75]" in task
    folder = launch.folder / "node"
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/python").symlink_to(launch.folder / "bin" / "program")
    (folder / "launch").symlink_to(REPO / "launch")
    given |= {"WORKDIR": str(launch.folder / "work")}
    given |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    for rank in ("1", "0"):
        assert not (launch.folder / "work" / ".starts").exists()
        environment = {**launch.environment, **given, "SKYPILOT_NODE_RANK": rank}
        run = task.split("run: |\n")[1]
        assert subprocess.run(["bash", "-c", run], cwd=folder, env=environment).returncode == 0
        words = worker.words()
        assert words[4:6] == [AWKWARD, "two words"]
        assert {"--distributed=on", f"--process_id={rank}"} <= set(words)
        assert "--coordinator_address=10.0.0.1:8476" in words
    assert (launch.folder / "work" / ".starts").exists()


# --- failures

QUOTA = (1, "ERROR: RESOURCE_EXHAUSTED: Quota limit exceeded")
LIMIT = (1, "error: 3 starts without a new checkpoint")
FAILURES = {  # message: launcher, answers, steps
    "the quota of p does not allow 1 x v5litepod-8 (spot) in z": (
        "tpu", tpu([NOT_FOUND]) | {"queued-resources create": QUOTA}, ["create"]
    ),
    "nothing is left behind": (  # the failed request is deleted without force
        "tpu", tpu([NOT_FOUND, "WAITING_FOR_RESOURCES", "FAILED"]), ["create", "delete"]
    ),
    "the request failed": ("tpu", tpu(["FAILED"]), []),  # earlier, and perhaps not by this script
    "active account": ("tpu", tpu([(1, "ERROR: you do not have an active account")]), []),
    "lost its machines 4 times": (
        "tpu",
        tpu([NOT_FOUND, *["ACTIVE", "SUSPENDED", "SUSPENDED"] * 4]) | {"worker.sh install": CLOSED},
        (["create", "copy", "install", "install", "delete"] * 4)[:-1],
    ),
    "was not started": (
        "tpu", tpu([NOT_FOUND, "ACTIVE"]) | {"worker.sh install": (1, "no space left")},
        ["create", "copy", "install", "install"],
    ),
    "failed on b with code 1": (
        "tpu",
        tpu([NOT_FOUND, "ACTIVE"], [RUNNING, "worker a exited 134 9.0\nworker b exited 1 5.0"]),
        [*ONCE, "tail", "stop"],
    ),
    "without a new checkpoint": (
        "tpu",
        tpu([NOT_FOUND, "ACTIVE"], ["worker a exited 75 5.0"]) | {"worker.sh count": ["", LIMIT]},
        [*ONCE, "stop", "copy", "install", "count"],
    ),
    "was deleted by someone": ("tpu", tpu(["ACTIVE", NOT_FOUND], [RUNNING, GONE]), []),
    "does not answer": ("tpu", tpu(["ACTIVE"], [RUNNING, GONE]), []),
    "the workload was not accepted": (
        "gke", {"git -C": GIT_ARCHIVE, "workload create": (1, "not found")}, ["xpk workload create"]
    ),
    "did not complete (xpk: code 125)": (
        "gke", {"git -C": GIT_ARCHIVE, "wait-for-job": (125, "failed")},
        ["xpk workload create", "xpk workload list"],
    ),
    "the workload n is there": ("gke", {"filter-by-job": "Jobset Name  Created\nn  Monday"}, []),
    "the workloads cannot be read": ("gke", {"filter-by-job": (1, "no such cluster")}, []),
    "nothing is in the queue": ("slurm", {"sbatch": (1, "Job violates policy")}, ["sbatch"]),
    "is in the queue already (job 7)": ("slurm", {"squeue": "7"}, []),
    "the queue cannot be read": ("slurm", {"squeue": (1, "Unable to contact controller")}, []),
    "before the run was complete": ("slurm", {"squeue": ["", "7", ""]}, ["sbatch"]),
    "nothing runs": ("sky", {"jobs launch": (1, "quota")}, ["sky jobs launch"]),
    "n is in the queue already": ("sky", {"jobs queue": '[{"job_name": "n"}]'}, []),
    "sky jobs logs --controller --name=n": (
        "sky", {"jobs logs": (100, "FAILED_NO_RESOURCE")}, ["sky jobs launch", "sky jobs logs"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", FAILURES)
def test_a_failure_is_reported_and_deletes_no_machine(launch, message):
    launcher, rules, steps = FAILURES[message]
    result = launch.answers(rules)(launcher, "all")
    assert result.returncode == 1
    assert message in result.stderr
    assert [step.split(" --")[0] for step in launch.steps()] == steps


def test_gke_a_cluster_that_is_not_created_may_leave_parts_behind(launch):
    result = launch.answers({"cluster create": (1, "Quota exceeded")})("gke", "up")
    assert result.returncode == 1
    assert "down-cluster deletes them" in result.stderr
    assert launch.steps() == ["xpk cluster create"]
