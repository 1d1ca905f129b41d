"""The launchers against stand-ins of gcloud, xpk, kubectl, sbatch and the like.

A stand-in notes the words it was called with and answers what the test tells it to; no real tool is
called.
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

# Each call's words end with NUL, each call with a record separator. An answer is text for standard
# output; (code, text) fails with text on standard error; "sh: ..." is run, the call's words as $@.
STAND_IN = r"""#!/usr/bin/env bash
call=("${0##*/}" "$@")
{ printf '%s\0' "${call[@]}"; printf '\x1e'; } >>"$STAND_IN/calls"
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
        """Of the rules, words of a call to its answers in turn, the first that fits holds."""
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
        # A shell that these tests run in the background of has them ignore ctrl-C, and bash cannot
        # trap what it was started to ignore.
        default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            ["bash", str(REPO / "launch" / f"{launcher}.sh"), *words],
            preexec_fn=default,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

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
        return [call.split("\0")[:-1] for call in text.split("\x1e") if call]

    def steps(self) -> list[str]:
        """The calls in short, without those whose number depends on time: looks and the log."""
        names = []
        for call in self.calls():
            text = " ".join(call)
            for what, words in {
                "": "queued-resources describe|worker.sh (status|follow)|kubectl logs|^git "
                "|squeue|jobs queue",
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
QUOTA = (
    1,
    "ERROR: RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptiblePerProject' has been exceeded",
)
NONE = "worker a none"
RUNNING = "worker a running\nworker b running"
DONE = "worker a exited 0 5.0\nworker b exited 0 6.0"


def tpu(states: list[object], statuses: list[object] | None = None) -> dict[str, object]:
    """Rules of gcloud: what describe says, and what the workers say, in turn."""
    return {"queued-resources describe": states, "worker.sh status": statuses or [RUNNING, DONE]}


def program_words(command: str) -> list[str]:
    """The words after worker.sh start, as the worker's shell reads them."""
    words = shlex.split(command)
    return words[words.index("start") + 1 :]


# --- all launchers


@pytest.mark.parametrize(
    ("launcher", "command", "expected"),
    [
        ("tpu", "all", ["describe", "create", "describe", "archive", "scp", "install", "count",
                        "start", "follow", "status"]),
        ("tpu", "up", ["describe", "create", "describe"]),
        ("tpu", "down", ["delete"]),
        ("tpu", "status", ["describe", "status"]),
        ("gke", "up", ["cluster create", "storage attach"]),
        ("gke", "all", ["archive", "mkdir", "tar", "workload create", "kubectl", "workload list"]),
        ("gke", "down", ["workload delete"]),
        ("gke", "down-cluster", ["cluster delete"]),
        ("slurm", "install", ["install cuda"]),
        ("slurm", "all", ["mkdir", "sbatch", "tail"]),
        ("slurm", "down", ["scancel"]),
        ("sky", "all", ["jobs launch", "jobs logs"]),
        ("sky", "down", ["jobs cancel"]),
    ],
)  # fmt: skip
def test_a_dry_run_prints_every_command_and_runs_none(launch, launcher, command, expected):
    path = launch.settings(launcher, AWKWARD)
    result = launch(launcher, command, f"--settings={path}", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert launch.calls() == []
    lines = result.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith("$ ")
        assert words in line
        shlex.split(line)  # it can be pasted
    assert not list((launch.folder / "work").iterdir())


def test_a_dry_run_of_several_slices_asks_for_them(launch):
    create = launch("tpu", "up", "--dry-run", NUM_SLICES="4").stdout.splitlines()[1]
    assert "--node-count=4 --node-prefix=n" in create
    assert "--node-id" not in create
    assert "--num-slices=4" in launch("gke", "up", "--dry-run", NUM_SLICES="4").stdout


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_setting_that_is_missing_unknown_or_wrong_is_named(launch, launcher):
    path = launch.settings(launcher, CONFIG="")
    assert f"{path}: CONFIG has no value" in launch(launcher, "status", f"--settings={path}").stderr
    path = launch.settings(launcher, CONFG="secret")
    error = launch(launcher, "status", f"--settings={path}").stderr
    assert "unknown key CONFG" in error
    assert "CONFIG" in error.split("the keys are")[1]
    assert "secret" not in error
    for change, message in {
        'NAME="n"': "leave the quotes out",
        "NAME = n": "expected KEY=value",
        "MAX_STARTS=many": "MAX_STARTS=many: expected a number",
        "WORKDIR=runs": "WORKDIR=runs: expected a path",
    }.items():
        path = launch.settings(launcher)
        path.write_text(path.read_text() + f"\n{change}")
        result = launch(launcher, "status", f"--settings={path}")
        assert message in result.stderr
        assert result.returncode == 1
    assert "cannot be read" in launch(launcher, "status", "--settings=/none").stderr
    assert launch.calls() == []


def test_a_settings_file_is_not_executed(launch):
    path = launch.settings("tpu", NAME="$(touch hacked)`touch hacked`")
    launch.answers(tpu(["ACTIVE"]))
    launch("tpu", "up", f"--settings={path}")
    assert "$(touch hacked)`touch hacked`" in launch.calls()[0]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_settings_file_explains_every_key_and_help_shows_every_command(launch, launcher):
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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_a_terminal_and_yes_nothing_is_deleted(launch, launcher):
    result = launch(launcher, "down")
    assert result.returncode == 1
    assert "nothing was deleted" in result.stderr
    assert launch.calls() == []
    assert launch(launcher, "down", "--yes").returncode == 0
    [deleted] = launch.steps()
    assert deleted in (
        "delete by force",
        "xpk workload delete",
        "scancel --me --name=n",
        "sky jobs cancel",
    )


def test_an_unknown_command_and_a_missing_tool_are_named(launch):
    assert "fly: no such command" in launch("tpu", "fly").stderr
    assert "--fast: no such option" in launch("tpu", "up", "--fast").stderr
    (launch.folder / "bin" / "sky").unlink()
    launch.environment["PATH"] = f"{launch.folder / 'bin'}:/usr/bin:/bin"
    assert "sky is not on PATH" in launch("sky", "run").stderr


def interrupt(launch: Launch, launcher: str, command: str, when: str) -> tuple[int, str]:
    """Ctrl-C, as a terminal sends it: to the whole group, once the calls match `when`."""
    process = launch.start(launcher, command, f"--settings={launch.settings(launcher)}")
    for _ in range(400):
        calls = " ".join(" ".join(call) for call in launch.calls())
        if re.search(when, calls):
            break
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=15)
    return process.returncode, err


GIT_ARCHIVE = (
    'sh:for word; do case $word in --output=*) tar -czf "${word#*=}" -T /dev/null ;; esac; done'
)

SLOW = "sh:echo; exec sleep 20"


@pytest.mark.parametrize(
    ("launcher", "rules", "when"),
    [
        ("tpu", tpu([NOT_FOUND, "WAITING_FOR_RESOURCES", SLOW]), "create"),
        ("tpu", tpu(["ACTIVE"], [NONE, SLOW]) | {"worker.sh follow": SLOW}, "start.*sh status"),
        ("gke", {"git -C": GIT_ARCHIVE, "workload list": SLOW, "kubectl": SLOW}, "workload list"),
        ("slurm", {"squeue": ["", SLOW]}, "sbatch"),
        ("sky", {"jobs logs": SLOW}, "jobs logs"),
    ],
    ids=["tpu queued", "tpu runs", "gke", "slurm", "sky"],
)
def test_ctrl_c_leaves_all_as_it_is_and_says_how_to_go_on(launch, launcher, rules, when):
    code, err = interrupt(launch.answers(rules), launcher, "all", when)
    assert code == 130
    assert "interrupted" in err
    assert f"launch/{launcher}.sh logs --settings={launch.folder}" in err
    assert f"launch/{launcher}.sh down" in err
    assert not re.search("delete|cancel", " ".join(launch.steps()))
    time.sleep(0.1)
    before = launch.calls()
    time.sleep(0.3)
    assert launch.calls() == before  # nothing goes on in the background


# --- Cloud TPU


def test_tpu_all_goes_from_nothing_to_the_end_of_the_run(launch):
    launch.answers(
        tpu(
            [NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], [RUNNING, RUNNING, DONE]
        )
    )
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
    words = program_words(start[-1].removeprefix("--command="))
    assert words[:2] == ["--config=configs/digits.py", "--workdir=/mnt/repulsor/run"]
    assert words[2:5] == [AWKWARD, "--mode=sample", "two words"]


def test_tpu_every_slice_is_installed_started_and_watched(launch):
    states = [NOT_FOUND, "ACTIVE first second"]  # the names are the request's
    launch.answers(tpu(states, [RUNNING, RUNNING, DONE, RUNNING, DONE, DONE]))
    result = launch("tpu", "all", NUM_SLICES="2")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == ["create", *["copy"] * 2, *["install"] * 2, "count", *["start"] * 2]
    for what in ("tpu-vm scp", "worker.sh install", "worker.sh start", "worker.sh status"):
        calls = [" ".join(call) for call in launch.calls() if what in " ".join(call)]
        assert ["first" in call for call in calls] == [True, False] * (len(calls) // 2)
    [create] = [call for call in launch.calls() if "create" in call]
    assert {"--node-count=2", "--node-prefix=n"} <= set(create)


def test_tpu_no_answer_of_a_worker_is_not_the_end_of_the_run(launch):
    launch.answers(tpu(["ACTIVE"], [RUNNING, "", "", RUNNING, DONE]))
    assert launch("tpu", "all", RETRIES="3").returncode == 0
    assert [" ".join(call).count("worker.sh status") for call in launch.calls()].count(1) == 5


def test_tpu_all_looks_after_a_run_that_goes_on_already(launch):
    launch.answers(tpu(["ACTIVE"], [RUNNING, RUNNING, DONE]))
    assert launch("tpu", "all").returncode == 0
    assert launch.steps() == []


def test_tpu_quota_refused_at_once_leaves_nothing(launch):
    launch.answers({"queued-resources create": QUOTA, "queued-resources describe": NOT_FOUND})
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "the quota of p does not allow 1 x v5litepod-8 (spot) in z" in result.stderr
    assert launch.steps() == ["create"]


def test_tpu_a_new_request_that_fails_is_removed_without_force(launch):
    launch.answers(tpu([NOT_FOUND, "WAITING_FOR_RESOURCES", "FAILED"]))
    result = launch("tpu", "up")
    assert result.returncode == 1
    assert "nothing is left behind" in result.stderr
    assert launch.steps() == ["create", "delete"]


def test_tpu_a_request_that_failed_before_is_left_alone(launch):
    launch.answers(tpu(["FAILED"]))
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert launch.steps() == []


def test_tpu_preempted_while_installing_is_made_anew(launch):
    launch.answers(
        {
            "worker.sh install": [(1, "connection closed"), (1, "connection closed"), ""],
            **tpu([NOT_FOUND, "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"]),
        }
    )
    result = launch("tpu", "all")
    assert result.returncode == 0, result.stderr
    lost = ["create", "copy", "install", "install", "delete"]
    assert launch.steps() == [*lost, "create", "copy", "install", "count", "start"]


def test_tpu_preempted_again_and_again_before_a_start_comes_to_an_end(launch):
    launch.answers(
        {
            "worker.sh install": (1, "closed"),
            **tpu([NOT_FOUND, *["ACTIVE", "SUSPENDED", "SUSPENDED"] * 9]),
        }
    )
    result = launch("tpu", "all", RETRIES="0")
    assert result.returncode == 1
    assert "lost its machines 4 times" in result.stderr
    assert launch.steps().count("create") == 4


def test_tpu_an_installation_that_fails_on_machines_that_are_there_is_reported(launch):
    launch.answers({"worker.sh install": (1, "no space left"), **tpu([NOT_FOUND, "ACTIVE"])})
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "no space left" in result.stderr
    assert "was not started" in result.stderr
    assert launch.steps() == ["create", "copy", "install", "install"]


@pytest.mark.parametrize(
    "ended",
    [
        "worker a running\nworker b exited 137 5.0",  # killed
        "worker a exited 1 9.0\nworker b exited 134 5.0",  # a's complaint follows from b's death
        "worker a exited 75 5.0\nworker b running",  # saved, run me again
        "worker a none\nworker b running",  # its machine is new
    ],
)
def test_tpu_a_worker_that_dies_or_saves_is_started_again(launch, ended):
    launch.answers(tpu([NOT_FOUND, "ACTIVE"], [RUNNING, ended, ended, RUNNING, DONE]))
    result = launch("tpu", "all")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == [
        "create",
        "copy",
        "install",
        "count",
        "start",
        "stop",
        "count",
        "start",
    ]


def test_tpu_a_program_that_fails_is_reported_and_not_started_again(launch):
    launch.answers(
        {
            "worker.sh tail b": "NonFiniteLossError",
            **tpu(
                [NOT_FOUND, "ACTIVE"], [RUNNING, "worker a exited 134 9.0\nworker b exited 1 5.0"]
            ),
        }
    )
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "failed on b with code 1" in result.stderr
    assert "NonFiniteLossError" in result.stdout
    assert launch.steps() == ["create", "copy", "install", "count", "start", "tail", "stop"]


def test_tpu_starts_without_progress_come_to_an_end(launch):
    limit = (1, "error: 3 starts in /mnt/repulsor/run without a new checkpoint")
    launch.answers(
        {"worker.sh count": ["", limit], **tpu([NOT_FOUND, "ACTIVE"], ["worker a exited 75 5.0"])}
    )
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "without a new checkpoint" in result.stderr
    assert launch.steps() == ["create", "copy", "install", "count", "start", "stop", "count"]


def test_tpu_preempted_while_running_is_made_anew_and_resumes(launch):
    gone = (255, "ssh: connect to host: timed out")
    launch.answers(
        tpu(
            [NOT_FOUND, "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"],
            [RUNNING, gone, RUNNING, DONE],
        )
    )
    result = launch("tpu", "all")
    assert result.returncode == 0, result.stderr
    once = ["create", "copy", "install", "count", "start"]
    assert launch.steps() == [*once, "delete", *once]


def test_tpu_preempted_is_not_made_anew_unless_the_settings_say_so(launch):
    launch.answers(tpu(["SUSPENDED"]))
    result = launch("tpu", "all", AUTO_RECREATE="false")
    assert result.returncode == 1
    assert "AUTO_RECREATE=true" in result.stderr
    assert launch("tpu", "up").returncode == 1  # up never deletes
    assert launch.steps() == []


@pytest.mark.parametrize("state", ["ACTIVE", "WAITING_FOR_RESOURCES"])
def test_tpu_deleted_by_someone_is_not_made_anew(launch, state):
    launch.answers(tpu([state, NOT_FOUND], [RUNNING, (255, "no such host")]))
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "was deleted by someone" in result.stderr
    assert launch.steps() == []


def test_tpu_looks_on_when_the_connection_is_away_for_long(launch):
    away = (1, "ERROR: network is unreachable")
    launch.answers(tpu(["ACTIVE", *[away] * 5], [RUNNING, *[away] * 5, RUNNING, DONE]))
    result = launch("tpu", "all")
    assert result.returncode == 0, result.stderr
    assert launch.steps() == []


def test_tpu_a_worker_that_stays_silent_is_reported(launch):
    launch.answers(tpu(["ACTIVE"], [RUNNING, (255, "timed out")]))
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "does not answer" in result.stderr
    assert launch.steps() == []


def test_tpu_a_state_that_cannot_be_read_is_no_reason_to_create(launch):
    launch.answers(tpu([(1, "ERROR: you do not have an active account")]))
    result = launch("tpu", "all")
    assert result.returncode == 1
    assert "active account" in result.stderr
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
        for _ in range(200):
            status = self("status").stdout
            if "running" not in status:
                return status.split(maxsplit=2)[2]
            time.sleep(0.02)
        raise AssertionError("still running")


@pytest.fixture
def worker(launch: Launch) -> Worker:
    return Worker(launch)


def test_a_worker_runs_the_program_detached_and_tells_how_it_ended(worker):
    assert worker("status").stdout.endswith("none\n")
    worker.behave("exit 3")
    worker("start", AWKWARD, "two words")
    assert worker.ended().startswith("exited 3 ")
    said = (worker.launch.folder / "program").read_text().split("\0")[:-1]
    assert said == ["-m", "repulsor_jax.main", AWKWARD, "two words"]
    assert "exit code 3" in worker("tail").stdout
    assert worker("tail", "another-host").stdout == ""


def test_a_worker_starts_once_and_stops_with_time_to_save(worker):
    worker.behave("sleep 20 & wait $!")
    worker("start")
    assert "runs already" in worker("start").stdout
    for _ in range(200):
        if "step 1" in worker("tail").stdout:
            break
    worker("stop", "20")
    assert worker.ended().startswith("exited 75 ")
    assert "told to save" in worker("tail").stdout


def test_a_worker_that_does_not_stop_is_ended_by_force(worker):
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
    """gcloud ssh runs its command here: what the launcher says is what the worker understands."""
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
    assert AWKWARD in (launch.folder / "program").read_text().split("\0")
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


def test_gke_quota_refused_says_what_may_be_there(launch):
    launch.answers({"cluster create": (1, "Quota exceeded")})
    result = launch("gke", "up")
    assert result.returncode == 1
    assert "down-cluster" in result.stderr
    assert launch.steps() == ["xpk cluster create"]


def test_gke_a_workload_that_is_not_accepted_or_fails_is_reported(launch):
    launch.answers({"git -C": GIT_ARCHIVE, "workload create": (1, "not found: cluster")})
    result = launch("gke", "all")
    assert result.returncode == 1
    assert "nothing runs" in result.stderr
    launch.answers({"git -C": GIT_ARCHIVE, "workload list": (125, "did not complete successfully")})
    result = launch("gke", "all")
    assert result.returncode == 1
    assert "did not complete (xpk: code 125)" in result.stderr


def test_gke_waits_for_longer_than_xpk_and_picks_the_log_up_again(launch):
    slow = "sh:sleep 0.5"
    launch.answers(
        {"git -C": GIT_ARCHIVE, "workload list": [(124, "timed out"), slow], "kubectl": ""}
    )
    assert launch("gke", "all").returncode == 0
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


def test_slurm_refused_or_queued_already_or_unreadable_submits_nothing(launch):
    launch.answers({"sbatch": (1, "Job violates accounting/QOS policy")})
    result = launch("slurm", "run")
    assert result.returncode == 1
    assert "nothing is in the queue" in result.stderr
    for queue in ("7", (1, "Unable to contact slurm controller")):
        launch.answers({"squeue": queue})
        before = len(launch.steps())
        assert launch("slurm", "run").returncode == 1
        assert len(launch.steps()) == before


def test_slurm_a_job_that_ends_early_is_reported(launch):
    launch.answers({"squeue": ["", "7", ""]})
    result = launch("slurm", "all")
    assert result.returncode == 1
    assert "before the run was complete" in result.stderr


class Job:
    """launch/slurm.sbatch under a stand-in of srun that runs two tasks, one after the other."""

    TASKS = (
        'sh:shift; code=0; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@" || '
        "{ one=$?; if ((one > code)); then code=$one; fi; }; done; exit $code"
    )

    def __init__(self, launch: Launch, worker: Worker) -> None:
        self.launch = launch
        self.worker = worker
        launch.environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
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
        ("if [ $SLURM_PROCID = 0 ]; then exit 75; fi; exit 2", 1, False),  # a failure is one
        ("exit 3", 1, False),
    ],
)
def test_slurm_job_goes_back_into_the_queue_when_it_can_go_on(job, shell, code, requeued):
    found, out = job.run(shell)
    assert found == code, out
    assert (REQUEUE in job.launch.steps()) == requeued
    assert ("is not run again" in out) == (code == 1)
    assert AWKWARD in (job.launch.folder / "program").read_text().split("\0")


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
    scancel = f"sh:touch {shlex.quote(str(job.launch.folder / 'told'))}"
    job.launch.answers({"srun": job.TASKS, "scancel": scancel})
    told = shlex.quote(str(job.launch.folder / "told"))
    job.worker.behave(f"until [ -e {told} ]; do sleep 0.02; done; exit 75")
    process = job.start()
    for _ in range(400):
        if (job.launch.folder / "program").exists():
            break
        time.sleep(0.02)
    process.send_signal(sent)
    if not cancelled:  # Slurm itself tells the tasks
        (job.launch.folder / "told").touch()
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
    launch.answers({"jobs logs": (100, "FAILED_NO_RESOURCE")})
    result = launch("sky", "all", f"--settings={path}")
    assert result.returncode == 1
    assert "sky jobs logs --controller --name=n" in result.stderr


def test_sky_refused_or_queued_already_launches_nothing(launch):
    launch.answers({"jobs launch": (1, "quota")})
    result = launch("sky", "all")
    assert result.returncode == 1
    assert "nothing runs" in result.stderr
    before = launch.steps()
    launch.answers({"jobs queue": '[{"job_name": "n", "status": "RUNNING"}]'})
    assert launch("sky", "all").returncode == 1
    assert launch.steps() == before


@pytest.mark.parametrize(("rank", "counted"), [("0", True), ("1", False)])
def test_sky_task_joins_its_nodes_and_counts_its_starts(launch, worker, rank, counted):
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
    given |= {"WORKDIR": str(launch.folder / "work"), "SKYPILOT_NODE_RANK": rank}
    given |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    result = subprocess.run(
        ["bash", "-c", task.split("run: |\n")[1]], cwd=folder, env={**launch.environment, **given}
    )
    assert result.returncode == 0
    words = (launch.folder / "program").read_text().split("\0")[:-1]
    assert words[4:6] == [AWKWARD, "two words"]
    assert f"--process_id={rank}" in words
    assert "--coordinator_address=10.0.0.1:8476" in words
    assert (launch.folder / "work" / ".starts").exists() == counted
