"""The program: one configuration, one working directory, one mode.

python -m repulsor_jax.main --config=digits --workdir=runs/digits
"""

import contextlib
import gc
import io
import json
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from repulsor_jax import config as config_lib
from repulsor_jax import configs
from repulsor_jax import experiment as experiment_lib
from repulsor_jax.checkpoints import places
from repulsor_jax.checkpoints.checkpointer import CheckpointError, checkpoint_directory
from repulsor_jax.checkpoints.verify import verify
from repulsor_jax.config import Config, ConfigError
from repulsor_jax.data.pipeline import DamagedDataError
from repulsor_jax.encode import encode
from repulsor_jax.evaluate import evaluate
from repulsor_jax.evaluation.monitor import make_monitor
from repulsor_jax.evaluation.page import make_page, reported
from repulsor_jax.export import CONVENTIONS, export
from repulsor_jax.files import locks
from repulsor_jax.files.untrusted import printable
from repulsor_jax.inference.exported import TRAINING_CONFIG
from repulsor_jax.inference.generator import SamplingError, check_trajectory
from repulsor_jax.plan import Options, plan
from repulsor_jax.planning.topology import describe_machine
from repulsor_jax.runtime import distributed, preemption, wandb_tracker
from repulsor_jax.runtime.guard import DivergedError
from repulsor_jax.runtime.metrics import draw_curves
from repulsor_jax.sample import draw_trajectory, sample
from repulsor_jax.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="Configuration file, as configs/digits.py, or the name of one that is shipped, as "
    "digits or imagenet256:xl_2,repulsor; override one value by --config.section.key=value. "
    "configs/default.py explains every key. sample, evaluate, export and verify do without: the "
    "run in the workdir knows its own.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, pictures. Created where absent."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "encode", "sample", "evaluate", "export", "plan", "verify", "page"],
    "train: to total_steps, going on from the newest checkpoint in the workdir. encode: images to "
    "latents, once. sample: an .npz and a grid from a checkpoint's EMA parameters. evaluate: FID "
    "and other metrics of checkpoints, or of an .npz (config.evaluation.samples). export: weights "
    "for PyTorch and diffusers, with a card. plan: memory, FLOPs, collectives and estimated time "
    "on --topology, which need not be here. verify: reads every checkpoint and says which are "
    "whole. page: writes the workdir's report.html anew.",
)
_FORCE = flags.DEFINE_bool(
    "force",
    False,
    "train: go on with other data, or another flow or other terms, than the run was trained with.",
)
_CHECKPOINT_STEP = flags.DEFINE_string(
    "checkpoint_step",
    "",
    "Which checkpoint to sample from, evaluate or export; the newest by default. evaluate also "
    "takes several, 10000,20000, or 'all', or 'follow': each as it appears, to the last.",
)
_TRAJECTORY = flags.DEFINE_bool(
    "trajectory", False, "sample: also a strip and an animation from noise to images."
)
_CONVENTION = flags.DEFINE_enum(
    "convention",
    "sit",
    CONVENTIONS,
    "export: 'reversed' writes the weights as REPA's and SRA's code has them: t = 0 is data.",
)
_PUSH_TO = flags.DEFINE_string(
    "push_to", "", "export: also upload to this Hugging Face repository, as owner/name."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology",
    "local",
    "plan: a kind of TPU and the shape of a slice, as v5e:16x16; GPUs, as h100:8 or h100:4x8 "
    "(hosts x GPUs); or 'local', the devices here.",
)
_NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "plan: slices, joined by the network.")
_COMPARE = flags.DEFINE_string(
    "compare",
    "",
    "plan: variants to put beside the configuration, separated by ';', each key=value pairs "
    "separated by ',': 'mesh.fsdp=16; mesh.fsdp=16,model.remat=full; topology=v5p:4x4x4'.",
)
_PRICE = flags.DEFINE_float("price_per_chip_hour", 0.0, "plan: prints what the run would cost.")
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "plan: compile train steps with other meshes, split_update and remat, and print those than "
    "which none is both quicker and smaller, as commands.",
)
_SEARCH_BATCHES = flags.DEFINE_list(
    "search_batches", [], "plan: --search among these batches too: 256,512,1024."
)
_SEARCH_LIMIT = flags.DEFINE_integer("search_limit", 16, "plan: compilations of --search.")


_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "Join the other processes of the job: auto does where Cloud TPU, GKE, Slurm or Open MPI "
    "started several, or where the next three flags are given; on asks JAX for any launcher.",
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1
)
_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir", "", "Keeps compiled programs from run to run; empty is off."
)


def main(argv: list[str]) -> None:
    """Runs one mode; a complaint about the user's input is one line, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name may have letters it lacks
    logging.set_verbosity(logging.WARNING)  # of the libraries; what we say goes to the console
    # orbax logs the traceback of every error that it raises.
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":  # set by JAX where it finds no TPU
        describe_machine()
    if _MODE.value != "train":
        # The service would swallow SIGTERM: these modes keep their work without it.
        jax.config.update("jax_enable_preemption_service", False)
    with _one_line_errors(distributed.JoinError):
        joined = distributed.join(
            _DISTRIBUTED.value,
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            _JOIN_TIMEOUT.value,
        )
    if joined:
        print(joined, flush=True)
    if cache_dir := _path_of("compilation_cache_dir", _CACHE_DIR.value):
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not _WORKDIR.value:
        sys.exit("error: --workdir is empty: name the folder of the run")
    workdir = pathlib.Path(_path_of("workdir", _WORKDIR.value)).absolute()
    with _one_line_errors(*_OF_INPUT):
        config = config_lib.parse(_CONFIG.value)
        directories = (
            config.checkpoint.directory,
            config.sampling.guiding_run,
            config.residual.base_run,
        )
        places.check_address("config.checkpoint.directory", directories[0])
        places.check_address("config.sampling.guiding_run", directories[1])
        places.check_address("config.residual.base_run", directories[2])
        if any(map(places.is_bucket, directories)):
            places.bound_waiting()
        if _MODE.value not in _WRITE_NO_FOLDER:
            workdir.mkdir(parents=True, exist_ok=True)
        if _MODE.value != "train":
            _MODES[_MODE.value](config, workdir)
            return
    with contextlib.ExitStack() as held:
        _train(config, workdir, held)


def _path_of(flag: str, value: str) -> str:
    try:
        return config_lib.expand_path(value)
    except ValueError as error:
        sys.exit(f"error: --{flag}: {error}")


def _train(config: Config, workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
    """Trains; `held` is closed at the end of the job, and keeps other jobs away until then."""
    with _one_line_errors(*_OF_INPUT):
        wandb_tracker.check_installed(config.log.wandb)
        _hold(config, workdir, held)
        if config.data.encode_if_missing:
            experiment_lib.checked_mesh(config)  # refuses what training would refuse, hours earlier
            encode(config, workdir)
        experiment, dataset = experiment_lib.prepare(config, workdir)
        monitor = make_monitor(experiment) if experiment_lib.draws_pictures(config) else None
    # An error of any other kind is a fault of the program, and keeps its traceback.
    with _one_line_errors(DivergedError, DamagedDataError, CheckpointError, ConfigError, OSError):
        record = config_lib.plain_values(_CONFIG.value)
        train(experiment, dataset, monitor, record, force=_FORCE.value)
        if jax.process_index() == 0:
            try:
                draw_curves(workdir)
            except OSError as error:  # no reason to call the run a failure
                print(f"warning: the curves are not drawn ({error})", file=sys.stderr)
        preemption.settle()


def _hold(config: Config, workdir: pathlib.Path, held: contextlib.ExitStack) -> None:
    """Keeps other runs out of the working directory, and of checkpoints that lie elsewhere.

    Two runs in one folder delete each other's checkpoints. A bucket has no locks.
    """
    held.enter_context(locks.sole(workdir, "training", "give this one another --workdir"))
    checkpoints = checkpoint_directory(config.checkpoint, workdir)
    if isinstance(checkpoints, pathlib.Path) and checkpoints.resolve() != workdir.resolve():
        remedy = "give this one another config.checkpoint.directory"
        held.enter_context(locks.sole(checkpoints, "training", remedy))


# What is wrong with the input; an error of any other kind is a fault of the program.
_OF_INPUT = (ValueError, OSError, SamplingError, DamagedDataError)


@contextlib.contextmanager
def _one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Ends the program with one line where one of these errors, or an interruption, comes."""
    try:
        yield
    except UnicodeEncodeError as error:
        _stop(
            f"error: the locale's encoding, {error.encoding}, lacks letters of "
            f"{error.object!a:.200}: set LC_ALL=C.UTF-8, or PYTHONUTF8=1",
            1,
        )
    except errors as error:
        _stop(f"error: {error}", 1)
    except preemption.Preempted as told:
        # In order, for the other processes may still be saving.
        print(f"{told}; the same command goes on from there", file=sys.stderr, flush=True)
        sys.exit(preemption.EXIT_CODE)
    except KeyboardInterrupt:
        _stop("interrupted; the same command goes on from what is saved", 130)
    except Exception:
        if _is_one_of_several():
            traceback.print_exc()
            _end_at_once(1)
        raise


def _stop(message: str, code: int) -> NoReturn:
    """Ends this process with one line on standard error."""
    print(printable(message), file=sys.stderr, flush=True)
    if _is_one_of_several():
        _end_at_once(code)
    sys.exit(code)


def _is_one_of_several() -> bool:
    # Asking for the number of processes takes the devices, which another job may hold.
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _end_at_once(code: int) -> NoReturn:
    """Ends one of several processes: in order, it would wait for the others, and they for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _encode(config: Config, workdir: pathlib.Path) -> None:
    encode(config, workdir)
    if jax.process_index() == 0:
        print(f"latents: {experiment_lib.data_directory(config, workdir)}")


def _one_step() -> int | None:
    text = _CHECKPOINT_STEP.value
    if text and not text.isdecimal():
        raise ConfigError(f"--checkpoint_step={text!r}: --mode={_MODE.value} takes one step")
    return int(text) if text else None


def _sample(config: Config, workdir: pathlib.Path) -> None:
    if _TRAJECTORY.value:
        check_trajectory(config)
    path = sample(config, workdir, _one_step())
    if _TRAJECTORY.value:
        draw_trajectory(config, workdir, path)
    _refresh_page(workdir)


def _export(config: Config, workdir: pathlib.Path) -> None:
    export(config, workdir, _one_step(), convention=_CONVENTION.value, push_to=_PUSH_TO.value)


def _evaluate(config: Config, workdir: pathlib.Path) -> None:
    evaluate(config, workdir, _CHECKPOINT_STEP.value)
    _refresh_page(workdir)


def _verify(config: Config, workdir: pathlib.Path) -> None:
    if not verify(checkpoint_directory(config.checkpoint, workdir)):
        raise CheckpointError("some checkpoints are damaged, see above")


def _page(config: Config, workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        path = make_page(workdir)
        if path is None:
            raise ValueError(f"--workdir={workdir}: found no run there, of which to make a page")
        print(path)


def _refresh_page(workdir: pathlib.Path) -> None:
    if jax.process_index() == 0:
        with reported("the page is not made anew"):
            make_page(workdir)


def _plan(config: Config, workdir: pathlib.Path) -> None:
    if _TOPOLOGY.value != "local":
        jax.config.update("jax_platforms", "cpu")  # a plan takes no accelerator from anyone
        # JAX can write programs for devices elsewhere to its cache, but not read them back.
        jax.config.update("jax_enable_compilation_cache", False)
    options = Options(
        topology=_TOPOLOGY.value,
        num_slices=_NUM_SLICES.value,
        compare=_COMPARE.value,
        price_per_chip_hour=_PRICE.value,
        search=_SEARCH.value or bool(_SEARCH_BATCHES.value),
        search_batches=_batches(),
        search_limit=_SEARCH_LIMIT.value,
        command=("python", "-m", "repulsor_jax.main", *training_arguments(sys.argv[1:])),
    )
    plan(_CONFIG.value, workdir, options)


def _batches() -> tuple[int, ...]:
    wrong = [text for text in _SEARCH_BATCHES.value if not text.isdecimal() or not int(text)]
    if wrong:
        raise ConfigError(
            f"--search_batches: found {wrong[0]!r}, expected batch sizes, as 256,512,1024"
        )
    return tuple(map(int, _SEARCH_BATCHES.value))


def training_arguments(argv: list[str]) -> list[str]:
    """The arguments without those of the plan mode."""
    switches = ("search", "nosearch")
    values = (
        *("mode", "topology", "num_slices", "compare", "price_per_chip_hour"),
        *("search_batches", "search_limit"),
    )
    kept, skips = [], False
    for argument in argv:
        name, equals, _ = argument.lstrip("-").partition("=")
        is_of_plan = argument.startswith("-") and name in (*switches, *values)
        if not (skips or is_of_plan):
            kept.append(argument)
        skips = is_of_plan and not equals and name in values
    return kept


# Modes that need no --config: the checkpoint has the run's own.
_OF_A_RUN = ("sample", "evaluate", "export", "verify")
# What may then be set: how to sample and to evaluate, and where this machine has things.
_SETTABLE = (
    *("sampling.", "evaluation.", "conditioning.", "mesh."),
    *("checkpoint.directory", "data.dir", "data.autoencoder_weights"),
)


def _with_own_config(argv: list[str]) -> list[str]:
    """Adds, where a mode of a run has no --config, that of the run in --workdir."""
    given = {"config": "", "mode": "train", "workdir": "", "checkpoint_step": ""}
    keys = {}
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        name = flag.lstrip("-")
        if not flag.startswith("-"):
            continue
        if name in given:
            given[name] = value if equals else following
        elif name.startswith("config."):
            keys[name.removeprefix("config.")] = value if equals else following
    if given["config"] or given["mode"] not in _OF_A_RUN or not given["workdir"]:
        return argv
    record = pathlib.Path(os.path.expanduser(keys.get("model.init_from", ""))) / TRAINING_CONFIG
    is_export = bool(keys.get("model.init_from")) and record.is_file()  # of --mode=export
    settable = (*_SETTABLE, *(["model.init_", "model.learn_sigma"] if is_export else []))
    if wrong := [key for key in keys if not key.startswith(settable)]:
        sys.exit(
            f"error: --config.{wrong[0]}: without --config the run's own configuration holds, of "
            "which sampling, evaluation, conditioning, mesh, checkpoint.directory, data.dir and "
            "data.autoencoder_weights may be set; leave it out"
        )
    name = "default"
    if given["mode"] != "verify":
        workdir = os.path.expanduser(given["workdir"])
        directory = keys.get("checkpoint.directory") or os.path.join(workdir, "checkpoints")
        of = [os.path.expanduser(directory), given["checkpoint_step"]]
        if is_export:
            of = [str(record), ""]
        name = f"of_run:{json.dumps(of)}"
    return [argv[0], f"--config={name}", *argv[1:]]


_MODES: dict[str, Callable[[Config, pathlib.Path], None]] = {
    "encode": _encode,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _export,
    "plan": _plan,
    "verify": _verify,
    "page": _page,
}
_WRITE_NO_FOLDER = ("verify", "page")


def _with_config_paths(argv: list[str]) -> list[str]:
    """Puts the path of the configuration in the place of its name."""
    found = list(argv)
    for i, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-config") and equals:
            found[i] = f"{flag}={_config_path(value)}"
        elif argv[i - 1] in ("--config", "-config"):
            found[i] = _config_path(argument)
    return found


def _config_path(text: str) -> str:
    """The path of a configuration, and its variant: a file, or the name of one that is shipped."""
    name, colon, variant = text.partition(":")
    path = pathlib.Path(name).expanduser()
    files = pathlib.Path(configs.__file__).parent.glob("*.py")
    shipped = {file.stem: file for file in files if "def get_config(" in file.read_text("utf-8")}
    if not path.is_file() and name not in shipped:
        names = ", ".join(sorted(shipped.keys() - {"of_run"}))  # that one is for the program
        sys.exit(
            f"error: --config={text}: found no file {path.absolute()}; expected the path of a "
            f"configuration, or the name of one that is shipped: {names}"
        )
    return f"{path if path.is_file() else shipped[name]}{colon}{variant}"


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags; a key that the configuration lacks is one line that names it."""
    try:
        rest = flags.FLAGS(_with_config_paths(_with_own_config(argv)))
    except flags.Error as error:
        # Where a configuration file raises, the message holds a traceback before its own words.
        sys.exit(f"error: {str(error).strip().splitlines()[-1]}; --help lists the flags")
    except (AttributeError, KeyError) as error:  # how ml_collections says it
        hint = str(error).strip("\"'").replace("\\n", ". ").replace("\\'", "'")
        keys = [a.lstrip("-").split("=")[0] for a in argv if a.lstrip("-").startswith("config.")]
        wrong = [
            key for key in keys if {*key.split(".")} & {*re.findall(r"\w+", hint)} - {"config"}
        ]
        sys.exit(f"error: {', '.join(wrong) or '--config'}: unknown key {hint}")
    except Exception as error:  # of the configuration file, which is a program
        sys.exit(_of_config(error))
    if not isinstance(_CONFIG.value, ml_collections.ConfigDict):
        # ml_collections keeps the error of a file that it could not load for the first access.
        try:
            _CONFIG.value.to_dict()
        except Exception as error:
            sys.exit(_of_config(error))
    return rest


def _of_config(error: Exception) -> str:
    """The message for an error that a configuration, which is a program, raised."""
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name == "configs":
        hint = "; the shipped configurations are the package repulsor_jax.configs"
    return f"error: --config: {' '.join(str(error).split())}{hint}"


if __name__ == "__main__":
    gc.freeze()  # to look through the libraries for garbage takes a second, at exit too
    jax.config.config_with_absl()
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
