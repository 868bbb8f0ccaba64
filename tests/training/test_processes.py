"""Two processes that share each update train what one trains; they stop, fail and resume together.

Importing takes most of the time of a process, so that two processes act all scenes, once for all tests.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smidgen import threads
from smidgen.adapters.methods.lora import LoraConfig
from smidgen.errors import TrainingStopped, UsageError
from smidgen.models.peft_model import get_peft_model
from smidgen.recipe import TrainRecipe, load_recipe
from smidgen.training import checkpoint, launch, processes, zero
from smidgen.training.guards import Interrupted
from smidgen.training.loop import Loop, read_log
from smidgen.training.objectives import Objective
from tests.conftest import tiny_llama
from tests.training.conftest import make_loop, make_rows, tiny_lora, write_recipe
from tests.training.test_loop import Signalling, Spoiling

ROOT = Path(__file__).parents[2]
LENGTHS = [5, 12, 7, 3, 9, 16, 4, 11, 6]  # the last update has a single row: one process has none
PATH = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
PROGRAM = "import sys; from tests.training.test_processes import act; act(*sys.argv[1:])"
MODELS: dict[str, Any] = {
    "lora": tiny_lora,
    "lora16": lambda: half(tiny_lora()),
    "dora": lambda: dora(),
    "full": tiny_llama,
    "tied": lambda: tiny_llama(tied=True),
}
ADAPTERS = ("lora", "lora16", "dora")
RESUMED = {"lora": lambda: tiny_lora(dropout=0.2), "full": tiny_llama}
# One process and two differ by the order of sums, which AdamW's mean gradients show. AdamW turns the sign of a gradient
# near zero into a whole step, so the steps are small, and a few numbers may go the other way.
SMALL = {"learning_rate": 1e-5, "save_steps": 3}
TOLERANCE = 1e-5
# In 16 bits a row's activations change with its neighbours in a micro-batch; alone, they do not.
ALONE: dict[str, Any] = {"lora16": {"lengths": [9] * 9, "budget": 9}}


def dora() -> Any:
    """A tiny Llama with DoRA, a trained copy of its last norm, and gradient checkpointing."""
    torch.manual_seed(3)
    config = LoraConfig(r=3, use_dora=True, modules_to_save=["model.norm"], target_modules="all-linear")
    model = get_peft_model(tiny_llama(), config)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def half(model: Any) -> Any:
    """The model with its base in bfloat16; the adapter stays in float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    return model


def train(folder: Path, model: Any, way: str = "", **options: Any) -> tuple[Loop, dict[str, torch.Tensor]]:
    """Train, with "fsdp" or "zero" where `way` says so, and answer the loop and the whole trained tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    resume = options.pop("resume", False)
    skeleton = processes.shard(model, torch.device("cpu")) if way == "fsdp" else None
    rows = make_rows(options.pop("lengths", LENGTHS), prompt=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "asked", lambda: way == "zero")
        loop = make_loop(model, rows, folder, held_out=rows, **{"max_steps": 3, "budget": 24} | options)
    torch.manual_seed(7 + launch.rank())
    if resume:
        found = checkpoint.latest(folder / "checkpoints")
        assert found
        loop.resume(found)
    loop.fit()
    whole = processes.gathered(model, skeleton, torch.device("cpu")) if skeleton else model
    return loop, {name: p.detach().clone() for name, p in whole.named_parameters() if p.requires_grad}


# ---- what the two processes do ----


def act(place: str, *ways: str) -> None:
    """All scenes; the first process writes down what came of them, and the second fails at the end."""
    folder, rank = Path(place), launch.rank()
    sys.stderr = (folder / f"error{rank}").open("w", encoding="utf-8")
    try:
        with launch.one_voice():
            scenes(folder, rank, ways)
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def scenes(folder: Path, rank: int, ways: Sequence[str]) -> None:
    loop = make_loop(tiny_lora(), make_rows(LENGTHS), folder / "introduction")
    told = processes.introduce(loop.accelerator, 16)
    uneven = processes.introduce(loop.accelerator, 5)
    processes.check_same_start({"a": torch.zeros(3)}, loop.device)
    with pytest.raises(UsageError, match="rank 1 starts from other weights than rank 0"):
        processes.check_same_start({"a": torch.full((3,), float(rank))}, loop.device)
    for name, way in itertools.product(MODELS, ways):
        if way != "zero" or name in ADAPTERS:
            place = folder / f"{name}-{way}"
            _, tensors = train(place, MODELS[name](), way, **SMALL, **ALONE.get(name, {}))
            if rank == 0:
                save_file(tensors, place / "trained.safetensors")
    for name, way in itertools.product(RESUMED, ways):
        if way == "zero" and name not in ADAPTERS:
            continue
        _, straight = train(folder / f"straight-{name}-{way}", RESUMED[name](), way, max_steps=7)
        objective = Signalling(at=5) if rank == 1 else Objective()  # only the second process gets the signal
        place = folder / f"resumed-{name}-{way}"
        with contextlib.suppress(Interrupted):
            train(place, RESUMED[name](), way, max_steps=7, objective=objective)
            raise AssertionError("the signal to one process did not stop the other")
        _, resumed = train(place, RESUMED[name](), way, max_steps=7, resume=True)
        assert straight.keys() == resumed.keys()
        assert all(torch.equal(straight[key], resumed[key]) for key in straight), (name, way)
    for way in ways:
        words = io.StringIO()
        with contextlib.redirect_stdout(words):
            train(folder / f"spoilt-{way}", tiny_lora(), way, objective=Spoiling(3, 4))
        (folder / f"spoilt-{way}/told{rank}").write_text(" ".join(words.getvalue().split()), encoding="utf-8")
        model = tiny_lora()
        model.model.layers[1].mlp.up_proj.adapters["default"].scaling = 0.0
        with pytest.raises(TrainingStopped, match=r"2 of 28 .* zeros twice: .*up_proj.*lora_A.*up_proj.*lora_B"):
            train(folder / f"silent-{way}", model, way)
    if rank == 0:
        (folder / "told.json").write_text(json.dumps([told, uneven]), encoding="utf-8")
    loop.accelerator.wait_for_everyone()
    if rank == 1:
        raise TrainingStopped("the second process fails")
    loop.accelerator.wait_for_everyone()  # never comes back


def play(folder: Path, *ways: str) -> tuple[Path, int, list[str]]:
    """Act all scenes in two processes; answer the folder, the exit code and what the launcher said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        patch.setenv("OMP_NUM_THREADS", "1")
        lines: list[str] = []
        code = launch.launch(2, [sys.executable, "-c", PROGRAM, str(folder), *ways], lines.append)
    return folder, code, lines


@pytest.fixture(scope="module")
def acted(tmp_path_factory):
    return play(tmp_path_factory.mktemp("processes"), "", "fsdp")


@pytest.fixture(scope="module")
def acted_zero(tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return play(tmp_path_factory.mktemp("zero"), "zero")


def errors(folder: Path) -> list[str]:
    return [(folder / f"error{rank}").read_text(encoding="utf-8") for rank in (0, 1)]


def test_all_scenes_end_and_a_process_that_fails_ends_all_with_its_code_and_one_message(acted):
    folder, code, lines = acted
    assert errors(folder) == ["", "error: the second process fails\n"]
    assert code == 3
    assert lines == [f"processes: 2, 1 threads each ({threads.processors()})"]


def test_who_they_are_is_told(acted):
    told, uneven = json.loads((acted[0] / "told.json").read_text(encoding="utf-8"))
    assert told == "world 2, global batch 16 = 2 processes x 8 rows; rank 0: cpu, rank 1: cpu"
    assert uneven.startswith("world 2, global batch 5 = 3 + 2 rows; ")


@pytest.mark.parametrize("way", ["", "fsdp"], ids=["whole", "fsdp"])
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_what_one_does(acted, tmp_path, name, way):
    compare(acted[0] / f"{name}-{way}", tmp_path, name)


def compare(folder: Path, alone_in: Path, name: str) -> None:
    """What two processes trained into `folder` is what one trains now."""
    loop, alone = train(alone_in, MODELS[name](), **SMALL, **ALONE.get(name, {}))
    shared = load_file(folder / "trained.safetensors")
    assert shared.keys() == alone.keys() == loop.parameters.keys()
    close = [torch.isclose(shared[key], tensor, rtol=0, atol=TOLERANCE).flatten() for key, tensor in alone.items()]
    assert torch.cat(close).float().mean() > 0.999
    one, two = (load_file(place / "checkpoints/step-3/optimizer.safetensors") for place in (alone_in, folder))
    assert one.keys() == two.keys()
    for key in [key for key in one if key.endswith("exp_avg")]:
        torch.testing.assert_close(two[key], one[key], rtol=TOLERANCE, atol=TOLERANCE, msg=key)
    for lone, line in zip(read_log(alone_in), read_log(folder), strict=True):
        for figure in {"loss", "grad_norm", "eval_loss"} & lone.keys():
            assert line[figure] == pytest.approx(lone[figure], rel=TOLERANCE), (lone["step"], figure)


@pytest.mark.parametrize("name", ["lora-fsdp", "full-fsdp", "tied-fsdp"])
def test_a_checkpoint_of_shards_holds_whole_tensors(acted, name):
    found = checkpoint.latest(acted[0] / name / "checkpoints")
    assert found and found.state["processes"] == 2
    trained = load_file(acted[0] / name / "trained.safetensors")
    weights = load_file(found.folder / "weights.safetensors")
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[key], trained[key]) for key in trained)
    assert load_file(found.folder / "random.safetensors").keys() >= {"0.cpu", "1.cpu"}
    assert not {path.suffix for path in found.folder.iterdir()} - {".safetensors", ".json"}


@pytest.mark.parametrize("name", [f"{name}-{way}" for name in ("lora", "full") for way in ("", "fsdp")])
def test_a_signal_to_one_stops_both_and_they_resume_to_the_bit(acted, name):
    check_resumed(acted[0], name)


def check_resumed(folder: Path, name: str) -> None:
    """The log of the run that was stopped and resumed is that of the one that was not."""
    straight, resumed = (read_log(folder / f"{kind}-{name}") for kind in ("straight", "resumed"))
    keys = ("step", "loss", "grad_norm", "eval_loss")
    lines = [[[line.get(key) for key in keys] for line in log] for log in (straight, resumed)]
    assert lines[0] == lines[1] and len(lines[0]) == 7
    stopped = [path.name for path in (folder / f"resumed-{name}" / "checkpoints").iterdir()]
    assert len(stopped) == 1 and 0 < int(stopped[0].removeprefix("step-")) < 7


@pytest.mark.parametrize("way", ["", "fsdp"])
def test_bad_rows_are_named_whichever_process_holds_them(acted, way):
    check_spoilt(acted[0] / f"spoilt-{way}")


def check_spoilt(folder: Path) -> None:
    """The first process named both rows, the second was silent."""
    first, second = ((folder / f"told{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert "rows.jsonl:4" in first and "rows.jsonl:5" in first and "(first: the loss)" in first
    assert second == ""


@pytest.mark.slow
def test_deepspeed_trains_what_one_process_does_and_resumes_to_the_bit(acted_zero, tmp_path):
    folder, code, _ = acted_zero
    assert code == 3 and "error: the second process fails\n" in "".join(errors(folder))
    for name in ADAPTERS:
        compare(folder / f"{name}-zero", tmp_path / name, name)
    check_resumed(folder, "lora-zero")
    check_spoilt(folder / "spoilt-zero")
    assert not {path.suffix for path in folder.rglob("*") if path.is_file()} & {".pt", ".bin", ".pkl", ".pth"}


# ---- the launcher ----


def test_a_process_that_is_killed_is_named(capfd, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.2)
    program = "import os, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(60)"
    assert launch.launch(2, [sys.executable, "-c", program], lambda line: None) == 1
    assert capfd.readouterr().err == "error: process 1 was ended by SIGKILL; was there too little memory for so many?\n"


def test_ctrl_c_reaches_every_process_once_and_is_waited_for(tmp_path):
    program = (
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    with open(sys.argv[1] + os.environ['RANK'], 'a') as told:\n"
        "        told.write('x')\n"
        "    time.sleep(0.5); sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "open(sys.argv[1] + 'ready' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(60)\n"
    )

    def press() -> None:
        while not all((tmp_path / f"ready{rank}").exists() for rank in "01"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    assert launch.launch(2, [sys.executable, "-c", program, f"{tmp_path}{os.sep}"], lambda line: None) == 130
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["x", "x"]


def test_threads_are_shared_out_unless_they_are_set(monkeypatch, tmp_path):
    monkeypatch.setattr(threads, "processors", lambda: threads.Processors(14, 7, None))
    lines: list[str] = []
    program = "import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])"
    for value in (None, "5"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False) if value is None else monkeypatch.setenv(
            "OMP_NUM_THREADS", value
        )
        assert launch.launch(2, [sys.executable, "-c", program, f"{tmp_path}{os.sep}"], lines.append) == 0
        assert (tmp_path / "1").read_text() == (value or "3")
    assert lines[0] == "processes: 2, 3 threads each (7 cores)"


# ---- what is refused ----


@pytest.mark.parametrize(
    ("environment", "train", "told"),
    [
        ({}, {"fsdp": "full_shard"}, r"train\.fsdp: one process has nothing to share.*--processes 2"),
        (
            {"WORLD_SIZE": "4"},
            {"batch_size": 3},
            r"train\.batch_size: 3 rows per update are fewer than the 4 processes",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, r"ACCELERATE_USE_FSDP: .*write 'fsdp: full_shard' in 'train'"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, r"ACCELERATE_USE_MEGATRON_LM: .*fsdp: full_shard"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, r"PARALLELISM_CONFIG: .*fsdp: full_shard"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, r"ACCELERATE_MIXED_PRECISION=bf16: .*'dtype' in 'train'"),
    ],
)
def test_what_a_launch_cannot_do_is_refused(monkeypatch, environment, train, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told):
        processes.check_launch(TrainRecipe(**train), trains_base=False)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes, but 2 GPUs here"):
        processes.check_launch(TrainRecipe(), trains_base=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    processes.check_launch(TrainRecipe(), trains_base=False)


def test_several_processes_on_mps_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"MPS cannot join them.*ACCELERATE_USE_CPU=true"):
        processes.check_launch(TrainRecipe(), trains_base=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes.check_launch(TrainRecipe(), trains_base=False)


@pytest.mark.parametrize(
    ("environment", "train", "trains_base", "told"),
    [
        (
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            {},
            False,
            r"ZeRO stage 3: only stage 2 works.*full_shard",
        ),
        (
            {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"},
            {},
            False,
            r"file is not read here: .*zero_stage 2",
        ),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, False, r"offloading \(param\)"),
        (
            {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            {},
            False,
            r"offloading \(optimizer\)",
        ),
        ({}, {}, True, r"DeepSpeed trains adapters here; for full and freeze tuning .*fsdp: full_shard"),
        ({}, {"fsdp": "full_shard"}, False, r"DeepSpeed and FSDP both spread"),
        ({}, {"dtype": "float16"}, False, r"float16 does not go with DeepSpeed"),
        ({}, {"optim": "adafactor"}, False, r"DeepSpeed spreads the states of adamw alone, not of adafactor"),
        ({"WORLD_SIZE": "1"}, {}, False, r"DeepSpeed: one process has nothing to share"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused(monkeypatch, environment, train, trains_base, told):
    for name, value in ({"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told):
        processes.check_launch(TrainRecipe(**train), trains_base)


@pytest.mark.parametrize(
    ("config", "told"), [({"load_in_8bit": True}, "int8"), ({"quant_method": "bitsandbytes"}, "bitsandbytes")]
)
def test_a_quantised_base_is_not_sharded(tmp_path, config, told):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}), encoding="utf-8")
    with pytest.raises(UsageError, match=f"FSDP cannot shard {told} weights; take the model's 16-bit weights"):
        processes.check_shardable(tmp_path)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (["train.fsdp=full_shard", "train.dtype=float16"], r"train\.fsdp: float16 needs scaled losses.*bfloat16"),
        (["train.fsdp=full_shard", "train.optim=lion"], r"train\.optim: 'fsdp' spreads the states of adamw alone"),
        (["train.fsdp=shard_grad_op"], r"train\.fsdp: must be 'full_shard', got \"shard_grad_op\""),
    ],
)
def test_what_fsdp_cannot_do_is_refused_in_the_recipe(tmp_path, override, told):
    path = write_recipe(tmp_path)
    with pytest.raises(UsageError, match=told):
        load_recipe(path, override)


def test_a_checkpoint_of_another_number_of_processes_is_not_resumed():
    with pytest.raises(UsageError, match=r"of 2 processes, this run has 1.*--processes 2.*--init-adapter"):
        processes.check_number({"processes": 2})


def test_a_launch_within_a_launch_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="a launcher has started 2 processes already"):
        launch.launch(2, ["true"], print)


# ---- the whole command, by each launcher ----


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


ACCELERATE = (
    *("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "smidgen"),
)
LAUNCHERS = {
    "processes": ("smidgen", "train", "--processes", "2"),
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "smidgen", "train"),
    "accelerate": (ACCELERATE[0], "--multi_gpu", *ACCELERATE[1:], "train"),
    "deepspeed": (ACCELERATE[0], "--use_deepspeed", "--zero_stage", "2", *ACCELERATE[1:], "train"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ("processes", ["train.fsdp=full_shard"]),
        ("processes", ["train.fsdp=full_shard", "adapter={method: full}", "train.dtype=bfloat16"]),
        ("torchrun", []),
        ("accelerate", []),
        ("deepspeed", []),
    ],
    ids=["fsdp", "fsdp full", "torchrun", "accelerate", "deepspeed"],
)
def test_a_whole_run_of_two_processes(tmp_path, monkeypatch, launcher, options):
    if launcher == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    monkeypatch.setenv("SMIDGEN_CACHE", str(tmp_path / "cache"))
    recipe = str(write_recipe(tmp_path, save_steps=6, learning_rate=0.005))
    done = command(*LAUNCHERS[launcher], recipe, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("world 2, global batch 8 = 2 processes x 4 rows; rank 0: cpu, rank 1: cpu") == 1
    assert done.stdout.count("report: ") == 1 and "FAIL" not in done.stdout
    whole = "adapter={method: full}" in options
    trained = load_file(tmp_path / "run/checkpoints/step-12/weights.safetensors")
    saved = load_file(tmp_path / ("run/model/model.safetensors" if whole else "run/adapter/adapter_model.safetensors"))
    assert len(saved) == len(trained) == (20 if whole else 28)
    assert all(tensor.isfinite().all() for tensor in saved.values())
    if launcher == "processes":
        refused = command("smidgen", "train", recipe, *options, "--resume")
        assert refused.returncode == 2 and "--processes 2" in refused.stderr
        again = command(*LAUNCHERS[launcher], recipe, *options)
        assert (again.returncode, again.stderr.count("is not empty")) == (2, 1), again.stderr


@pytest.mark.slow
def test_accelerates_own_fsdp_is_refused_once(tmp_path):
    refused = command(ACCELERATE[0], "--use_fsdp", *ACCELERATE[1:], "train", str(write_recipe(tmp_path)))
    assert refused.returncode != 0 and refused.stderr.count("fsdp: full_shard") == 1, refused.stderr
