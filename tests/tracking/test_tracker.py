import io
import math
import struct
import sys
import types

import pytest
from pydantic import ValidationError

from megatron_hdpo.tracking.backends import BackendMissing, mlflow_name
from megatron_hdpo.tracking.config import MLflowConfig, TrackingConfig, WandbConfig
from megatron_hdpo.tracking.console import Console
from megatron_hdpo.tracking.metrics import read_metrics
from megatron_hdpo.tracking.tracker import Tracker

QUIET = TrackingConfig(tensorboard=False)
CONFIG = {"model": {"path": "x"}, "train": {"lr": 1e-6, "betas": [0.9, 0.999]}, "seed": 1}


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def console(screen):
    return Console(True, stream=screen)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_tensorboard_is_on_by_default_and_gets_finite_numbers(tmp_path, console, screen):
    with Tracker(TrackingConfig(), tmp_path, console) as tracker:
        tracker.log_config(CONFIG)
        tracker.log(1, {"eval/pass@1": 0.5, "train/grad_norm": math.nan})
        tracker.log(2, {"eval/pass@1": 0.75})
    assert scalars(tmp_path) == {"eval/pass@1": [(1, 0.5), (2, 0.75)]}
    assert [record["eval/pass@1"] for record in read_metrics(tmp_path)] == [0.5, 0.75]
    assert screen.getvalue() == ""


def test_tensorboard_forgets_the_steps_that_a_resumed_run_does_again(tmp_path, console):
    with Tracker(TrackingConfig(), tmp_path, console) as tracker:
        for step in range(1, 5):
            tracker.log(step, {"train/lr": step})
    with Tracker(TrackingConfig(), tmp_path, console, resume_step=2) as tracker:
        tracker.log(3, {"train/lr": 30})
    assert scalars(tmp_path)["train/lr"] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [record["train/lr"] for record in read_metrics(tmp_path)] == [1, 2, 30]


def test_other_ranks_write_nothing(tmp_path, console):
    tracker = Tracker(TrackingConfig(), tmp_path / "run", console, enabled=False)
    tracker.log_config(CONFIG)
    tracker.log(1, {"train/lr": 1.0})
    tracker.close()
    assert not (tmp_path / "run").exists()


def test_wrong_metrics_raise_before_any_backend_sees_them(tmp_path, console):
    with Tracker(TrackingConfig(), tmp_path, console) as tracker, pytest.raises(ValueError, match="room/name"):
        tracker.log(1, {"train/lr": 1.0, "oops": 2.0})
    assert scalars(tmp_path) == {}


@pytest.mark.parametrize(
    ("module", "config", "off"),
    [
        ("wandb", TrackingConfig(tensorboard=False, wandb=WandbConfig(project="p")), "tracking.wandb=null"),
        ("mlflow", TrackingConfig(tensorboard=False, mlflow=MLflowConfig(uri="x")), "tracking.mlflow=null"),
        ("torch.utils.tensorboard", TrackingConfig(), "tracking.tensorboard=false"),
    ],
)
def test_missing_library_stops_at_the_start_and_says_what_to_install(
    tmp_path, console, monkeypatch, module, config, off
):
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(BackendMissing, match="pip install") as error:
        Tracker(config, tmp_path, console)
    assert off in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


class BrokenWriter:
    """A SummaryWriter that fails where it is told to."""

    def __init__(self, where):
        self.where, self.calls = where, []

    def SummaryWriter(self, *args, **kwargs):
        self.call("open")
        return self

    def call(self, what):
        self.calls.append(what)
        if what == self.where:
            raise OSError("disk [quota] exceeded")

    def add_scalar(self, *args):
        self.call("log")

    def add_text(self, *args):
        self.call("config")

    def flush(self):
        pass

    def close(self):
        self.call("close")


@pytest.mark.parametrize("where", ["open", "config", "log", "close"])
def test_broken_backend_is_reported_once_and_the_run_goes_on(tmp_path, console, screen, monkeypatch, where):
    broken = BrokenWriter(where)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", broken)
    with Tracker(TrackingConfig(), tmp_path, console) as tracker:
        tracker.log_config(CONFIG)
        for step in (1, 2, 3):
            tracker.log(step, {"train/lr": 1.0})
    said = screen.getvalue()
    assert said.count("TensorBoard failed") == 1 and "OSError: disk [quota] exceeded" in said
    assert broken.calls.count(where) == 1
    if where != "close":
        assert broken.calls[-1] == where  # nothing is asked of it afterwards
    assert len(read_metrics(tmp_path)) == 3


def test_one_broken_backend_leaves_the_others_alone(tmp_path, console, screen, monkeypatch):
    wandb = types.ModuleType("wandb")  # an installed library of another make: no init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with Tracker(TrackingConfig(wandb=WandbConfig(project="p")), tmp_path, console) as tracker:
        tracker.log(1, {"train/lr": 1.0})
    assert "Weights & Biases failed" in screen.getvalue() and "AttributeError" in screen.getvalue()
    assert scalars(tmp_path) == {"train/lr": [(1, 1.0)]}


def test_failure_to_write_the_record_is_not_swallowed(tmp_path, console, monkeypatch):
    with Tracker(QUIET, tmp_path, console) as tracker:
        monkeypatch.setattr("os.write", lambda fd, data: 0)
        with pytest.raises(OSError, match=r"metrics\.jsonl.*disk full"):
            tracker.log(1, {"train/lr": 1.0})
        monkeypatch.undo()
        tracker.log(1, {"train/lr": 2.0})
    assert [record["train/lr"] for record in read_metrics(tmp_path)] == [2.0]


@pytest.mark.parametrize(
    "config",
    [
        {"wandb": {}},
        {"wandb": {"project": "p", "mode": "sometimes"}},
        {"mlflow": {"experiment": "e"}},
        {"tensorbord": True},
    ],
)
def test_wrong_config_is_refused(config):
    with pytest.raises(ValidationError):
        TrackingConfig.model_validate(config)


def offline_records(path):
    """The records of a .wandb file: a 7-byte header, then blocks of 32 KiB that hold (crc, length, type) chunks."""
    from wandb.proto import wandb_internal_pb2

    data, offset, message, records = path.read_bytes(), 7, b"", []
    while offset + 7 <= len(data):
        if offset % 32768 > 32768 - 7:  # no room for a chunk's header: the rest of the block is filling
            offset += 32768 - offset % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, offset + 4)
        message += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(wandb_internal_pb2.Record.FromString(message))
            message = b""
    return records


def history(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: float(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def test_wandb_offline_and_resumed(tmp_path, console, screen, monkeypatch):
    pytest.importorskip("wandb", reason="optional: pip install wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = TrackingConfig(tensorboard=False, wandb=WandbConfig(project="p", name="n", mode="offline", tags=["t"]))
    with Tracker(config, tmp_path, console) as tracker:
        tracker.log_config(CONFIG)
        tracker.log(1, {"eval/pass@1": 0.5, "train/grad_norm": math.inf})
        tracker.log(2, {"eval/pass@1": 0.75})
    with pytest.raises(KeyError), Tracker(config, tmp_path, console, resume_step=1) as tracker:
        tracker.log(2, {"eval/pass@1": 0.25})
        raise KeyError
    assert screen.getvalue() == ""
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    first, second = [offline_records(path) for path in files]
    assert history(first) == [{"step": 1, "eval/pass@1": 0.5}, {"step": 2, "eval/pass@1": 0.75}]
    assert history(second) == [{"step": 2, "eval/pass@1": 0.25}]
    run_ids = {record.run.run_id for record in first + second if record.WhichOneof("record_type") == "run"}
    assert len(run_ids) == 1
    exits = [r.exit.exit_code for records in (first, second) for r in records if r.WhichOneof("record_type") == "exit"]
    assert exits == [0, 1]


def test_mlflow_local_store_and_resumed(tmp_path, console, screen, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="optional: pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "mlruns").as_uri()
    config = TrackingConfig(tensorboard=False, mlflow=MLflowConfig(uri=store, experiment="e", run_name="n"))
    with Tracker(config, tmp_path, console) as tracker:
        tracker.log_config(CONFIG)
        tracker.log(1, {"eval/pass@1": 0.5, "train/grad_norm": math.nan})
        tracker.log(2, {"eval/pass@1": 0.75})
    with pytest.raises(KeyError), Tracker(config, tmp_path, console, resume_step=1) as tracker:
        tracker.log_config({**CONFIG, "seed": 2, "extra": "x" * 9000})  # a changed key must not end the tracking
        tracker.log(2, {"eval/pass@1": 0.25})
        raise KeyError
    assert screen.getvalue() == ""
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.run_name == "n" and run.info.status == "FAILED"
    assert run.data.params["train.lr"] == "1e-06" and run.data.params["seed"] == "1"
    assert len(run.data.params["extra"]) == 500
    points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "eval/pass_at_1")]
    assert points == [(1, 0.5), (2, 0.75), (2, 0.25)]
    assert "train/grad_norm" not in run.data.metrics
    assert mlflow_name("eval/gsm+x/pass@4") == "eval/gsm_x/pass_at_4"
