import json
import math
import shutil
import time
from types import SimpleNamespace

import fake
import pytest
import torch

from burnish.core.errors import BurnishError
from burnish.core.files import write_json
from burnish.methods.objective import Objective
from burnish.train import checkpoint, loop
from burnish.train import run as run_module
from burnish.train.loop import train


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    fake.register(monkeypatch.setattr)


class Stop(Exception):
    pass


def run(root, output, *more, resume=True):
    return train(fake.recipe(root, output, *more), resume=resume, progress=False)


def stop_at(monkeypatch, step):
    """Let the next run die right after the optimiser step `step`, before anything of it is written."""
    original = loop.train_step

    def dying(run, *args, **options):
        edits = original(run, *args, **options)
        if run.step == step:
            raise Stop
        return edits

    monkeypatch.setattr(loop, "train_step", dying)


@pytest.fixture(scope="module")
def whole(dataset, questions, tmp_path_factory):
    """The run folder of an uninterrupted run with everything switched on."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        fake.register(patch.setattr)
        run(dataset, folder, *fake.everything(questions))
    return folder


@pytest.mark.parametrize("death", [3, 5, 8, 11])
def test_resumed_equals_uninterrupted_bit_for_bit(dataset, questions, whole, tmp_path, monkeypatch, curves, death):
    more = fake.everything(questions)
    with monkeypatch.context() as patch:
        stop_at(patch, death)
        with pytest.raises(Stop):
            run(dataset, tmp_path / "cut", *more)
    if death == 8:  # a run of a version that hashed weights by SHA-256
        for path in (tmp_path / "cut/checkpoints").glob("*/meta.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"parent_hash": 2 * "0123abcd"}))
    torch.rand(7)  # the global generator's state must not matter
    result = run(dataset, tmp_path / "cut", *more)
    fake.assert_same_weights(whole / "policy", tmp_path / "cut/policy")
    fake.assert_same_weights(whole / "checkpoints/000012", tmp_path / "cut/checkpoints/000012")
    assert fake.figures(whole / "metrics.jsonl") == fake.figures(tmp_path / "cut/metrics.jsonl")
    assert result.steps == 12 and result.curves.stat().st_size > 1000


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_resume_and_export(dataset, tmp_path, monkeypatch, caplog, method):
    from safetensors.torch import load_file

    more = [f"--train.peft.method={method}", "--train.peft.target_modules=head|backbone.0", "--train.peft.rank=2",
            "--train.ema_decay=0.9"]  # fmt: skip
    run(dataset, tmp_path / "whole", *more)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            run(dataset, tmp_path / "cut", *more)
    run(dataset, tmp_path / "cut", *more)
    assert "beside the adapters" not in caplog.text
    fake.assert_same_weights(tmp_path / "whole" / "policy", tmp_path / "cut" / "policy")
    exported = load_file(tmp_path / "whole/policy/model.safetensors")
    base = fake.FakePolicy().state_dict()
    assert exported.keys() == base.keys()
    changed = {k for k in base if not torch.equal(exported[k], base[k])}
    assert changed == {"head.weight", "backbone.0.weight"}
    adapter = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    config = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert config["r"] == 2 and config["use_dora"] == (method == "dora")
    if method == "lora":  # the adapter alone gives the merged weight back: W + alpha / r * B A
        pair = [adapter[f"base_model.model.head.lora_{x}.weight"] for x in "AB"]
        torch.testing.assert_close(exported["head.weight"], base["head.weight"] + 32 / 2 * pair[1] @ pair[0])


def test_a_finished_run_is_not_repeated_and_fresh_repeats_it(dataset, tmp_path, monkeypatch):
    first = run(dataset, tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Run", None)
        again = run(dataset, tmp_path / "r")
    assert again == first and math.isfinite(first.final["loss"])
    stamp = first.policy.stat().st_mtime_ns
    run(dataset, tmp_path / "r", resume=False)
    assert first.policy.stat().st_mtime_ns > stamp
    assert len(fake.figures(first.metrics)) == 4


def test_only_the_newest_checkpoints_stay_and_last_shows_the_newest(dataset, tmp_path):
    run(dataset, tmp_path / "r", "--train.save_every=2")
    folder = tmp_path / "r" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["000012", "last"]
    assert (folder / "last").resolve().name == "000012"


def test_changed_recipe_names_its_fields(dataset, tmp_path):
    run(dataset, tmp_path / "r")
    with pytest.raises(BurnishError, match=r"train.batch_size 5 -> 6, train.lr 0.01 -> 0.02"):
        run(dataset, tmp_path / "r", "--train.lr=0.02", "--train.batch_size=6")
    run(dataset, tmp_path / "r", "--train.log_every=1", "--data.workers=3")  # these change nothing


def test_changed_data_set_is_refused(dataset, tmp_path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(dataset, own)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            run(own, tmp_path / "r")
    with open(own / "meta" / "info.json", "a") as file:
        file.write("\n")
    with pytest.raises(BurnishError, match="another data set"):
        run(own, tmp_path / "r")


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "cut"])
@pytest.mark.parametrize("part", ["weights", "optimizer"])
def test_damaged_checkpoints_are_one_clear_line(dataset, tmp_path, monkeypatch, part, change):
    from safetensors.torch import load_file, save_file

    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            run(dataset, tmp_path / "r")
    path = tmp_path / f"r/checkpoints/000004/burnish/{part}.safetensors"
    tensors = load_file(path)
    name = "head.weight" if part == "weights" else "head.weight/exp_avg"
    if change == "missing":
        tensors.pop(name)
    elif change == "extra":
        tensors["more"] = torch.zeros(1)
    elif change == "shape":
        tensors[name] = torch.zeros(2, 2)
    save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        BurnishError, match={"missing": f"lacks '{name}'", "extra": "'more'", "shape": name}.get(change, "unreadable")
    ):
        run(dataset, tmp_path / "r")


def test_full_disk_leaves_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    original = checkpoint._save_tensors

    def full(tensors, path):
        if "000008" in str(path):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save_tensors", full)
        with pytest.raises(BurnishError, match="no room left.*000008"):
            run(dataset, tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r/checkpoints").iterdir()) == ["000004", "last"]
    run(dataset, tmp_path / "r")


def test_max_minutes_stops_and_exports(dataset, tmp_path):
    result = run(dataset, tmp_path / "r", "--train.max_minutes=0.000001")
    assert result.steps == 1 and (result.policy / "model.safetensors").is_file()


def test_a_run_that_ran_out_of_time_goes_on_when_it_has_more(dataset, tmp_path, caplog):
    whole = run(dataset, tmp_path / "whole")
    short = run(dataset, tmp_path / "r", "--train.max_minutes=0.000001")
    assert f"1 of {whole.steps} steps" in caplog.text
    assert run(dataset, tmp_path / "r", "--train.max_minutes=0.000001").steps == short.steps == 1
    assert run(dataset, tmp_path / "r").steps == whole.steps
    fake.assert_same_weights(whole.policy, tmp_path / "r/policy")


def test_time_runs_from_the_first_step(dataset, tmp_path, monkeypatch):
    """Frames and a teacher's features may take minutes to make, which are no training."""
    slow, late = run_module.make_objectives, [0.0]
    monkeypatch.setattr(run_module, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late[0]))
    monkeypatch.setattr(run_module, "make_objectives", lambda recipe: (late.append(late.pop() + 600), slow(recipe))[1])
    done = run(dataset, tmp_path / "r", "--train.max_minutes=5")
    assert late == [600] and done.steps == 12 and done.final["minutes"] < 5


def test_a_fresh_start_leaves_no_figures_of_the_old_weights(dataset, tmp_path):
    run(dataset, tmp_path / "r")
    (tmp_path / "r/eval/tuned").mkdir(parents=True)
    (tmp_path / "r/retention.json").write_text("{}")
    run(dataset, tmp_path / "r", resume=False)
    assert not (tmp_path / "r/eval").exists() and not (tmp_path / "r/retention.json").exists()


class Poison(Objective):
    def __init__(self, step, where):
        super().__init__()
        self.step, self.where = step, where

    def loss(self, run, batch, out):
        bad = float("nan") if run.step == self.step and self.where == "loss" else 0.0
        return {"poison": out.total * bad}

    def edit_gradients(self, run, batch, grads):
        if run.step == self.step and self.where == "gradient":
            grads["words.bias" if "words.bias" in grads else "head.bias"][0] = float("inf")
        return {}


@pytest.mark.parametrize(
    ("where", "words"), [("loss", "loss term 'poison' is nan"), ("gradient", "the gradient of 'head.bias'")]
)
def test_nan_stops_with_the_batch_saved(dataset, tmp_path, monkeypatch, where, words):
    from safetensors.torch import load_file

    from burnish.methods.objective import OBJECTIVES

    monkeypatch.setitem(OBJECTIVES._entries, "poison", Poison)
    with pytest.raises(BurnishError, match=f"step 6: {words}.*nan_batch.safetensors"):
        run(dataset, tmp_path / "r", f"--objectives=[{{name: poison, step: 5, where: {where}}}]")
    batch = load_file(tmp_path / "r/nan_batch.safetensors")
    about = json.loads((tmp_path / "r/nan_batch.json").read_text())
    assert batch["robot/action"].shape == (5, 4, 3) and about["step"] == 6
    assert len(about["robot/episode_index"]) == len(about["robot/index"]) == len(about["robot/task"]) == 5
    assert [p.name for p in sorted((tmp_path / "r/checkpoints").iterdir())] == ["000004", "last"]


def scaled(scale):
    """A run as with train.precision=fp16, which needs a GPU; the scaler itself works anywhere."""

    class Scaled(run_module.Run):
        def _place(self):
            scaler = self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.accelerator.unscale_gradients = lambda stepper: scaler.unscale_(stepper.optimizer)
            super()._place()

    return Scaled


def test_a_scaler_skips_the_step_whose_gradient_overflows_and_no_other(dataset, tmp_path, monkeypatch):
    from burnish.methods.objective import OBJECTIVES

    def noting(run, *args, **options):
        before = [p.detach().clone() for p in run.trained.values()]
        edits = original(run, *args, **options)
        moved.append(not all(map(torch.equal, before, run.trained.values())))
        scales.append(run.accelerator.scaler.get_scale())
        return edits

    moved, scales, original = [], [], loop.train_step
    monkeypatch.setitem(OBJECTIVES._entries, "poison", Poison)
    monkeypatch.setattr(loop, "Run", scaled(256.0))
    monkeypatch.setattr(loop, "train_step", noting)
    done = run(dataset, tmp_path / "r", "--objectives=[{name: poison, step: 5, where: loss}]")
    assert moved == [step != 5 for step in range(12)] and scales == [256.0] * 5 + [128.0] * 7
    assert done.steps == 12 and math.isfinite(done.final["loss"]) and not (tmp_path / "r/nan_batch.json").exists()
    assert all(tensor.isfinite().all() for tensor in fake.weights(tmp_path / "r/policy")["model.safetensors"].values())


def test_no_questions_are_asked_of_a_language_model_that_is_not_trained(dataset, questions, tmp_path):
    asked = [f"--language.root={questions}", "--language.weight=0.5"]
    for frozen in ("--train.freeze=[backbone]", "--train.train_only=[head]"):
        field = frozen.partition("=")[0]
        with pytest.raises(BurnishError, match=rf"language model is not trained.*try: {field}='\[\]'"):
            run(dataset, tmp_path / "r", *asked, frozen)
    run(dataset, tmp_path / "r", *asked[:1], "--language.weight=0", "--train.freeze=[backbone]")


@pytest.mark.parametrize(("size", "remedy"), [
    (5, "--train.batch_size=3 --train.grad_accumulation=2"), (1, "--train.memory.checkpointing=true"),
])  # fmt: skip
@pytest.mark.parametrize("lacking", [
    lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: bytearray(1 << 62),
    lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")),
], ids=["torch", "python", "cuda"])  # fmt: skip
def test_a_step_without_memory_says_what_takes_less(dataset, tmp_path, monkeypatch, lacking, size, remedy):
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: lacking() and next(lacking()))
    with pytest.raises(BurnishError, match=f"{size} samples at once.*try: {remedy}"):
        run(dataset, tmp_path / "r", f"--train.batch_size={size}")
    monkeypatch.undo()
    fake.register(monkeypatch.setattr)
    run(dataset, tmp_path / "r", f"--train.batch_size={size}", *remedy.split())  # the remedy goes on in that folder


def test_freezing_keeps_weights(dataset, tmp_path):
    from safetensors.torch import load_file

    run(dataset, tmp_path / "r", "--train.freeze=[backbone]")
    after, base = load_file(tmp_path / "r/policy/model.safetensors"), fake.FakePolicy().state_dict()
    assert {k for k in base if not torch.equal(base[k], after[k])} == {"head.weight", "head.bias"}


def test_retention_is_measured_before_during_and_after(dataset, questions, tmp_path, monkeypatch):
    import burnish.evaluate.retention as module

    seen = []

    class Figures:
        loss, accuracy = 0.5, 0.25

    def retention(policy, root, *, limit):
        seen.append((policy.training, str(root), policy.head.bias.detach().clone()))
        torch.rand(3)
        return Figures

    monkeypatch.setattr(module, "retention", retention)
    more = ["--train.retention_every=4", "--train.ema_decay=0.5"]
    run(dataset, tmp_path / "with", *more, f"--eval.questions.root={questions}")
    run(dataset, tmp_path / "without", *more)
    rows = [row for row in fake.figures(tmp_path / "with/metrics.jsonl") if "retention_loss" in row]
    assert [row["step"] for row in rows] == [0, 4, 8, 12] and rows[0]["retention_accuracy"] == 0.25
    assert not any(training for training, _, _ in seen)
    fake.assert_same_weights(tmp_path / "with/policy", tmp_path / "without/policy")
    exported = fake.weights(tmp_path / "with/policy")["model.safetensors"]
    assert torch.equal(seen[-1][2], exported["head.bias"])  # measured on the averaged weights


def test_missing_statistics_and_wrong_action_dimension(dataset, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(dataset, own)
    stats = json.loads((own / "meta/stats.json").read_text())
    (own / "meta/stats.json").write_text(json.dumps({k: v for k, v in stats.items() if k != "action"}))
    with pytest.raises(BurnishError, match="action: statistics lack mean"):
        run(own, tmp_path / "r")
    wide = fake.make_dataset(tmp_path / "wide", episodes=1, action_dim=5)
    with pytest.raises(BurnishError, match="actions of dimension 5; expected 3"):
        run(wide, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_unknown_objective_and_options(dataset, tmp_path):
    with pytest.raises(BurnishError, match="unknown objective 'nothing'"):
        run(dataset, tmp_path / "r", "--objectives=[{name: nothing}]")
    with pytest.raises(BurnishError, match="objective 'probe' does not take"):
        run(dataset, tmp_path / "r", "--objectives=[{name: probe, wait: 1}]")
    with pytest.raises(BurnishError, match="no loss reaches a trained parameter"):
        train(fake.recipe(dataset, tmp_path, "--train.imitation_weight=0"), progress=False)
    with pytest.raises(BurnishError, match="listed twice"):
        run(dataset, tmp_path / "r", "--objectives=[{name: probe}, {name: probe}]")


def test_the_loss_falls_and_two_precisions_fit_in_one_process(dataset, tmp_path):
    first = run(dataset, tmp_path / "a", "--train.steps=60", "--train.log_every=20", "--train.save_every=100")
    rows = fake.figures(first.metrics)
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    second = run(dataset, tmp_path / "b", "--train.precision=bf16")
    assert math.isfinite(second.final["loss"])
    kept = fake.weights(second.policy)["model.safetensors"]
    assert all(t.dtype == torch.float32 for t in kept.values())


def test_a_run_of_which_every_step_overflows_is_no_success(dataset, tmp_path, monkeypatch):
    from burnish.methods.objective import OBJECTIVES

    monkeypatch.setitem(OBJECTIVES._entries, "poison", Poison)
    monkeypatch.setattr(loop, "Run", scaled(2.0**-13))  # what some thirty overflows before have left
    with pytest.raises(BurnishError, match=r"every step overflows in fp16; expected finite losses; try: --train.prec"):
        run(dataset, tmp_path / "r", "--objectives=[{name: poison, step: 1, where: loss}]")


def test_a_step_that_overflowed_before_a_checkpoint_does_not_damage_it(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Stop):
            run(dataset, tmp_path / "r")
    meta = tmp_path / "r/checkpoints/000004/burnish/meta.json"
    for figure, sound in ((math.inf, True), (math.nan, True), ("x", False), (True, False), (None, False)):
        found = json.loads(meta.read_text())
        found["window"]["sums"]["loss"] = figure
        write_json(meta, found)
        if sound:
            assert checkpoint.read_meta(meta.parents[1])["step"] == 4
        else:
            with pytest.raises(BurnishError, match="'window' of it"):
                checkpoint.read_meta(meta.parents[1])
    found["window"]["sums"]["loss"] = math.inf
    write_json(meta, found)
    assert run(dataset, tmp_path / "r").steps == 12


def test_a_pause_for_a_checkpoint_is_no_part_of_a_steps_time(dataset, tmp_path, monkeypatch):
    now = [0.0]

    def taking(call, seconds):
        def timed(*args, **options):
            now[0] += seconds
            return call(*args, **options)

        return timed

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop, "train_step", taking(loop.train_step, 1.0))
    monkeypatch.setattr(loop, "_save", taking(loop._save, 100.0))
    run(dataset, tmp_path / "r", "--train.save_every=2")
    rows = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["step_seconds"] for row in rows] == pytest.approx([1.0] * 4)


class Closing(Objective):
    def __init__(self):
        super().__init__()
        self.figures = {}

    def end(self, run):
        self.figures = {"ended_after": run.step}

    def metrics(self):
        return self.figures


@pytest.mark.parametrize(("limit", "steps"), [(0, 12), (0.000001, 1)])
def test_a_method_hears_of_the_end_before_the_last_row(dataset, tmp_path, monkeypatch, limit, steps):
    from burnish.methods.objective import OBJECTIVES

    monkeypatch.setitem(OBJECTIVES._entries, "closing", Closing)
    run(dataset, tmp_path / "r", "--objectives=[{name: closing}]", f"--train.max_minutes={limit}")
    rows = fake.figures(tmp_path / "r/metrics.jsonl")
    assert [row.get("ended_after") for row in rows] == [None] * (len(rows) - 1) + [steps]
