"""The command line: flags reach the configuration, results go to stdout, every failure has its exit code and one line."""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

import edgeft
from edgeft.artifact import Artifact, write_artifact
from edgeft.cli import app, main
from edgeft.config import Config, build_config
from edgeft.errors import UnsupportedError, VerificationError
from edgeft.export import ExportResult
from edgeft.report import EvalReport, ModelResult, SplitResult
from tests.graphs import residual_net

REPORT = EvalReport((ModelResult("float", (SplitResult("id", "id", 10, 9), SplitResult("sketch", "ood", 10, 5))),))


def make_run(path: Path) -> Artifact:
    return write_artifact(
        path, kind="quantized", config=Config().model_dump(mode="json"), seed=0, preprocessing={"size": 48}, classes=("a", "b"),
        arrays={}, documents={"report.json": REPORT.to_json()},
    )  # fmt: skip


class FakePipeline(ModuleType):
    """Stands in for edgeft.pipeline: remembers its arguments, raises `error` where one is set."""

    def __init__(self, root: Path) -> None:
        super().__init__("edgeft.pipeline")
        self.root = root
        self.calls: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    def _called(self, **arguments: Any) -> None:
        self.calls.append(arguments)
        if self.error is not None:
            raise self.error

    def train_quantize(self, config: Config, *, resume: bool, progress: Any) -> Artifact:
        self._called(config=config, resume=resume)
        progress.line("[1/5] linear probe")
        return make_run(self.root / "run")

    def plan(self, config: Config) -> list[str]:
        self._called(config=config)
        return ["shapes: 10 classes", "21 layers lower"]

    def export(self, run: Path, targets: list[str], out: Path | None, *, evaluate: bool, progress: Any) -> list[ExportResult]:
        self._called(run=run, targets=targets, out=out, evaluate=evaluate)
        return [
            ExportResult(name, run / "export" / name, residual_net(0), {"images": 64}, (f"{name}  exact on 64/64",)) for name in targets
        ]


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline(tmp_path)
    for name in ("pipeline", "exporting"):
        monkeypatch.setitem(sys.modules, f"edgeft.{name}", fake)
        monkeypatch.setattr(edgeft, name, fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def test_the_flags_are_frozen() -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    flags = {
        name: {option for parameter in verb.params for option in parameter.opts if option.startswith("--")} for name, verb in verbs.items()
    }
    assert flags == {
        "train-quantize": {
            "--method", "--backbone", "--weights", "--pretrained", "--data", "--ood", "--out", "--profile", "--recipe", "--loss",
            "--config", "--set", "--seed", "--device", "--resume", "--dry-run", "--print-config", "--json",
        },
        "export": {"--target", "--out", "--no-evaluate", "--json"},
        "predict": {"--top", "--json"},
        "show": {"--formats", "--saturation", "--json"},
        "verify": {"--target", "--n", "--seed", "--json"},
        "evaluate": {"--corruptions", "--severity", "--n", "--ood", "--map", "--mask", "--groups", "--cache", "--workers", "--json"},
        "bench": {"--backend", "--threads", "--batch", "--rounds", "--calls", "--out", "--max-drop", "--json"},
        "diagnose": {"--ref", "--shift", "--run", "--backbone", "--weights", "--baselines", "--seed", "--json"},
        "robustness": {"--baselines", "--split", "--json"},
        "reprobe": {"--target", "--out", "--json"},
        "selfcheck": {"--json"},
        "sweep": {"--grid", "--out", "--config", "--set", "--target", "--workers", "--gpu", "--retry", "--dry-run", "--json"},
        "list": {"--json"},
        "doctor": {"--json"},
    }  # fmt: skip


def test_train_quantize_passes_every_flag(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_text("[quant]\nepochs = 1\nprofile = 'u8'\n")
    flags = (
        "--method ft --backbone resnet18 --weights w.safetensors --data photos --ood sketch=s --ood c --out o --profile s8"
        " --recipe f8net-conventional --loss distill --config c.toml"
    )
    assert main(["train-quantize", *flags.split(), "--set", "train.lr=0.1,0.2", "--seed", "3", "--device", "cpu", "--resume"]) == 0
    (call,) = pipeline.calls
    config = call["config"]
    assert call["resume"] is True
    assert (config.train.method, config.model.backbone, config.model.weights) == ("ft", "resnet18", Path("w.safetensors"))
    assert (config.data.source, config.data.ood, config.out) == ("photos", ("sketch=s", "c"), Path("o"))
    assert (config.quant.profile, config.quant.epochs, config.train.lr, config.seed, config.device) == ("s8", 1, (0.1, 0.2), 3, "cpu")
    assert (config.quant.recipe, config.quant.loss) == ("f8net-conventional", "distill")
    captured = capsys.readouterr()
    assert captured.err == "[1/5] linear probe\n"
    assert captured.out.splitlines()[-1].startswith(f"wrote {pipeline.root}/run (quantized, ")
    assert "mean OOD" in captured.out


def test_train_quantize_without_flags_is_the_default_configuration(pipeline: FakePipeline) -> None:
    assert main(["train-quantize"]) == 0
    assert pipeline.calls == [{"config": Config(), "resume": False}]


def test_json_is_all_there_is_on_stdout(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-quantize", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["report"] == REPORT.to_json()
    assert tree["digest"] == Artifact.load(pipeline.root / "run").digest
    assert main(["export", str(pipeline.root / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"target": "onnx", "path": f"{pipeline.root}/run/export/onnx", "images": 64}]
    assert main(["show", str(pipeline.root / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == tree
    assert main(["list", "targets", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)][:2] == ["c", "onnx"]


def test_processes_but_the_first_say_nothing(
    pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["train-quantize"]) == 0
    assert capsys.readouterr() == ("", "")


def test_dry_run_plans_only(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-quantize", "--dry-run", "--seed", "4"]) == 0
    assert pipeline.calls == [{"config": build_config(flags={"seed": 4})}]
    assert capsys.readouterr().out == "shapes: 10 classes\n21 layers lower\n"


def test_printed_configuration_reads_back(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ["--set", "model.args.pad_type=same", "--set", "data.mean=[0.5,0.5,0.5]", "--set", 'data.source="é\\"😀"', "--out", "a b"]
    assert main(["train-quantize", "--print-config", *changes]) == 0
    Path("c.toml").write_text(capsys.readouterr().out)
    read = build_config(Path("c.toml"))
    assert (read.model.args, read.data.mean, read.data.source, read.out) == ({"pad_type": "same"}, (0.5, 0.5, 0.5), 'é"😀', Path("a b"))
    assert build_config(Path("c.toml")) == build_config(None, {"out": "a b"}, changes[1:6:2])
    assert not pipeline.calls


def test_export_defaults_to_the_latest_run_and_onnx(pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("runs") / "x")
    assert main(["export"]) == 0
    assert pipeline.calls == [{"run": Path("runs/x"), "targets": ["onnx"], "out": None, "evaluate": True}]
    assert capsys.readouterr().out == "onnx  exact on 64/64\n"


def test_export_options(pipeline: FakePipeline) -> None:
    assert main(["export", "r", "--target", "onnx", "--out", "b", "--no-evaluate"]) == 0
    assert pipeline.calls == [{"run": Path("r"), "targets": ["onnx"], "out": Path("b"), "evaluate": False}]


def test_the_package_is_the_verb_too(pipeline: FakePipeline) -> None:
    progress = edgeft.Progress(enabled=False)
    (result,) = edgeft.export(Path("r"), ["onnx"], None, evaluate=False, progress=progress)
    assert result.target == "onnx"
    assert pipeline.calls == [{"run": Path("r"), "targets": ["onnx"], "out": None, "evaluate": False}]
    assert edgeft.train_quantize(Config(), resume=False, progress=progress).manifest.kind == "quantized"
    with pytest.raises(AttributeError, match="module 'edgeft' has no attribute 'nothing'"):
        edgeft.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (
            ["train-quantize", "--mehtod", "ft"],
            "error: No such option: --mehtod\n  did you mean: --method\n  edgeft train-quantize --help\n",
        ),
        (["train-quantize", "--seed", "x"], "error: Invalid value for '--seed'"),
        (["trainquantize"], "error: No such command 'trainquantize'. Did you mean 'train-quantize'?\n  edgeft --help\n"),
        ([], "error: Missing command.\n  edgeft --help\n"),
        (
            ["train-quantize", "--set", "quant.fromat=std", "--profile", "u9"],
            "error: 2 errors in the configuration:\n"
            "  quant.profile: Input should be 'u8' or 's8' (found 'u9')\n"
            "  unknown key 'quant.fromat' (did you mean 'format'?)\n",
        ),
        (
            ["train-quantize", "--set", "epochs=3"],
            "error: 1 error in the configuration:\n  unknown key 'epochs' (did you mean 'train.epochs' or 'quant.epochs'?)\n",
        ),
        (
            ["train-quantize", "--pretrained", "--weights", "w.safetensors"],
            "error: 1 error in the configuration:\n  configuration: give either model.pretrained or model.weights, not both\n",
        ),
        (
            ["export", "r", "--target", "onxn"],
            "error: unknown export target 'onxn'\n  known export targets: c, onnx, onnx-int, trt\n  did you mean: onnx\n",
        ),
        (["export"], "error: there is no finished run in 'runs'\n  edgeft train-quantize --method lpft makes one\n"),
        (["show", "absent"], "error: there is no run at 'absent'\n  edgeft train-quantize makes one\n"),
        (
            ["list", "method"],
            "error: cannot list 'method'\n  known: methods, recipes, quantizers, targets, datasets, backbones\n  did you mean: methods\n",
        ),
    ],
)
def test_what_cannot_be_done_exits_with_2(
    arguments: list[str], error: str, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(error)
    assert not pipeline.calls


@pytest.mark.parametrize(
    ("raised", "code", "error"),
    [
        (VerificationError("layer 'conv1' differs"), 1, "error: layer 'conv1' differs\n"),
        (UnsupportedError("layer 'x' is a GELU", "edgeft list backbones"), 2, "error: layer 'x' is a GELU\n  edgeft list backbones\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/part/a"),
            2,
            "error: no space left on the device ('runs/x/part/a')\n"
            "  free some space, then repeat the command (train-quantize: with --resume)\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "f"), 2, "error: Permission denied ('f')\n  edgeft --debug ... shows where\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n  continue with the same command and --resume\n"),
    ],
)
def test_errors_become_exit_codes(
    raised: BaseException, code: int, error: str, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.error = raised
    assert main(["train-quantize"]) == code
    assert capsys.readouterr() == ("", error)


def test_debug_lets_the_traceback_through(pipeline: FakePipeline) -> None:
    pipeline.error = VerificationError("differs")
    with pytest.raises(VerificationError):
        main(["--debug", "train-quantize"])


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgeft {edgeft.__version__}\n"
    assert main(["--help"]) == 0
    assert "train-quantize" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["methods", "recipes", "quantizers", "targets", "datasets", "backbones"])
def test_list(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    expected = {
        "methods": "lpft",
        "recipes": "f8net-tiny",
        "targets": "onnx",
        "datasets": "shapes",
        "backbones": "edgeft_micro",
        "quantizers": "",
    }[what]
    assert any(line.startswith(expected) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("problems", [[], ["the required package 'timm' is not installed"]])
def test_doctor_fails_on_a_problem(problems: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("edgeft.doctor.examine", lambda: {"problems": problems})
    assert main(["doctor", "--json"]) == (1 if problems else 0)
    assert json.loads(capsys.readouterr().out) == {"problems": problems}


def test_an_edited_run_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    report = replace(REPORT.models[0], model="better")
    (tmp_path / "report.json").write_text(json.dumps(EvalReport((report,)).to_json()))
    assert main(["show", str(tmp_path)]) == 2
    assert f"'{tmp_path}/report.json'" in capsys.readouterr().err
