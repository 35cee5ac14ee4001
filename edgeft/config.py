"""Frozen pydantic models of a run: defaults, TOML file, flags and --set, with all errors shown at once."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from edgeft.errors import ConfigError
from edgeft.registry import nearest


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str | Path | int | float) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_list)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_list)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_as_list)]
"""One alone need not be written as a list."""


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class DataConfig(Section):
    """Images: where they are and how they are prepared."""

    source: str = Field("shapes", description="'shapes' (embedded) or a folder with one sub-folder per class")
    ood: Names = Field((), description="shifted test sets, each NAME=DIR or DIR")
    size: int | None = Field(None, ge=8, le=2048, description="square input size in pixels; default: the model's own record")
    crop_pct: float | None = Field(None, gt=0, le=1, description="centre crop share of the resized short side; default: the model's")
    interpolation: Literal["bilinear", "bicubic"] | None = Field(None, description="resize filter; default: the model's")
    mean: tuple[float, float, float] | None = Field(None, description="channel means of pixels in 0 ... 1; default: the model's")
    std: tuple[float, float, float] | None = Field(None, description="channel deviations of pixels in 0 ... 1; default: the model's")
    augment: Literal["auto", "none", "flip", "crop-flip"] = Field("auto", description="training augmentation; auto: the dataset's own")
    val_fraction: float = Field(0.1, gt=0, lt=0.5, description="share of a single tree carved out for validation")
    test_fraction: float = Field(0.2, gt=0, lt=0.5, description="share of a single tree carved out as ID test")
    workers: int = Field(0, ge=0, le=64, description="processes that decode training images; 0: in the main process")
    cache_mb: int = Field(2048, ge=0, description="decoded images kept in memory, in MiB")

    @model_validator(mode="after")
    def _positive_std(self) -> Self:
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class ModelConfig(Section):
    """The backbone."""

    backbone: str = Field("edgeft_micro", description="timm model name")
    pretrained: bool = Field(False, description="take timm's pretrained weights (needs its hub)")
    weights: Path | None = Field(None, description="checkpoint: .safetensors, or .pth read with weights_only=True")
    args: dict[str, Any] = Field(default_factory=dict, description="constructor arguments, e.g. model.args.pad_type=same")


class ProbeConfig(Section):
    """The linear probe."""

    penalties: Numbers | None = Field(
        None, min_length=1, description="L2 strengths to try (1/C per image); default: 1e-1, 1e-2 for 'shapes', else 1e-1 ... 1e-6"
    )
    max_iter: int = Field(200, ge=1, description="L-BFGS iterations for each strength")


class TrainConfig(Section):
    """Float fine-tuning."""

    method: str = Field("lpft", description="fine-tuning method (edgeft list methods)")
    epochs: int | None = Field(None, ge=1, description="epochs of each fine-tuning run; default: 40 for 'shapes', else 8")
    batch: int = Field(32, ge=1, description="images per step, over all processes")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    lr: Numbers | None = Field(None, min_length=1, description="learning rates to try; default: the method's own grid")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(0.0, ge=0, description="SGD weight decay")
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast type of the float stages")
    l2sp: float | None = Field(None, ge=0, description="weight of |w - w0|^2, all but the head; default: the method's own (l2sp 0.01)")
    freeze_k: int | None = Field(None, ge=0, description="coarse layers left as they are, from the input; default: the method's (freeze 2)")
    layers: Names = Field((), description="names or patterns of the layers that alone are trained, e.g. blocks.[56],head")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="factor of the rate for each layer nearer to the input; default: the method's (layer-decay 0.75)"
    )
    ema: float | None = Field(None, ge=0, lt=1, description="decay of the weights' moving average; default: the method's own (ema 0.999)")
    label_smoothing: float | None = Field(None, ge=0, lt=1, description="label smoothing; default: the method's own (bang 0.1)")
    mixup: float | None = Field(None, ge=0, description="Beta parameter of mixup; default: the method's own (bang 0.2)")
    clip: str | None = Field(None, description="method flyp: open_clip model whose image tower is the backbone")
    clip_weights: str | None = Field(None, description="its weights: a file, or a tag of open_clip (downloads)")
    prompts: Names = Field(("a photo of a {}.",), min_length=1, description="texts of a class, {} being its name")
    sampler: Literal["shuffle", "balanced"] = Field("shuffle", description="balanced: every class (or group in it) is drawn equally often")
    keep_checkpoints: int = Field(
        0, ge=0, description="epochs of the chosen rate whose weights the run keeps, evenly spaced: baselines for edgeft robustness"
    )
    groups: Path | None = Field(None, description="CSV with the columns file,group for the balanced sampler; files relative to the CSV")

    @model_validator(mode="after")
    def _groups_are_for_the_sampler(self) -> Self:
        if self.groups is not None and self.sampler != "balanced":
            raise ValueError(f"groups are drawn by sampler balanced, and it is {self.sampler}")
        return self

    @model_validator(mode="after")
    def _clips_are_for_flyp(self) -> Self:
        if (self.clip is not None or self.clip_weights is not None) and self.method != "flyp":
            raise ValueError(f"clip and clip_weights are for method flyp, and it is {self.method}")
        return self


RECIPE_EPOCHS = {"f8net-tiny": 0, "f8net-finetune": 3, "f8net-conventional": 30}
"""Epochs of QAT of each recipe where quant.epochs is not given."""


class QuantConfig(Section):
    """The fixed-point stage."""

    recipe: Literal["f8net-tiny", "f8net-finetune", "f8net-conventional"] = Field(
        "f8net-finetune", description="f8net-tiny: calibration only; -finetune: short QAT, frozen batch norm; -conventional: long QAT, PACT"
    )
    profile: Literal["u8", "s8"] = Field("u8", description="activation storage: u8 for CPUs, s8 for TensorRT")
    format: Literal["std", "grid", "l4", "minmax", "pact", "search"] = Field(
        "l4", description="rule that chooses fractional lengths; default: l4, for recipe f8net-conventional std"
    )
    granularity: Literal["tensor", "channel"] = Field("tensor", description="weight formats per layer or per output channel")
    residual: Literal["branch", "wide"] = Field(
        "branch", description="residual addition: of two 8-bit tensors, or (for TensorRT) wide: of a convolution's accumulators and one"
    )
    calibration_images: int = Field(128, ge=1, description="training images (labels unused) that calibration sees")
    equalize: bool = Field(True, description="cross-layer equalisation around depthwise layers")
    fit_ranges: bool = Field(
        True, description="scale tensors, where neighbouring weights can take the factor, so that they fill their format"
    )
    rounding: Literal["nearest", "gptq", "flexround"] = Field(
        "gptq", description="weight rounding of calibration; all but nearest compensate its errors and correct biases"
    )
    headroom: Literal["none", "augmented", "target"] = Field(
        "none", description="widen activation formats for shifted images: augmented training images, or those of quant.unlabelled"
    )
    unlabelled: Paths = Field((), description="folders of unlabelled target images, for loss=distill and headroom=target")
    accumulator_bits: int = Field(32, ge=12, le=32, description="width that accumulators must provably fit, held by QAT (A2Q)")
    epochs: int | None = Field(None, ge=0, description="epochs of QAT; default: the recipe's (f8net-tiny 0, -finetune 3, -conventional 30)")
    lr: float | None = Field(None, gt=0, description="QAT learning rate; default: a tenth of the fine-tuning's")
    loss: Literal["labels", "distill"] = Field("labels", description="QAT loss: cross-entropy, or KL to the float model (needs no labels)")
    update_every: int = Field(10, ge=1, description="QAT steps between format updates ('std' only)")
    sigma_momentum: float = Field(0.9, ge=0, lt=1, description="weight of the old sigma in its running average")
    hysteresis: float = Field(0.15, ge=0, lt=0.5, description="octaves a sigma must pass a threshold by before the format moves")
    freeze_at: float = Field(0.5, ge=0, le=1, description="share of QAT steps after which formats stay as they are")

    @property
    def qat_epochs(self) -> int:
        """Epochs of QAT: the configured ones, or the recipe's."""
        return RECIPE_EPOCHS[self.recipe] if self.epochs is None else self.epochs

    @model_validator(mode="before")
    @classmethod
    def _recipe_defaults(cls, tree: Any) -> Any:
        # Long training has time to mend what a Gaussian rule gets wrong, and formats that follow it; calibration and a short QAT have not.
        return {"format": "std", **tree} if isinstance(tree, dict) and tree.get("recipe") == "f8net-conventional" else tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = [text for contradiction, text in self._contradictions() if contradiction]
        if found:
            raise ValueError("; ".join(found))
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        distil, target = self.loss == "distill", self.headroom == "target"
        return [
            (self.recipe == "f8net-tiny" and self.qat_epochs > 0, f"recipe f8net-tiny trains nothing, but epochs is {self.qat_epochs}"),
            (self.recipe == "f8net-conventional" and self.qat_epochs == 0, "recipe f8net-conventional trains, but epochs is 0"),
            (distil and self.qat_epochs == 0, f"loss distill needs epochs of QAT, and recipe {self.recipe} has none here"),
            (self.format == "pact" and self.recipe != "f8net-conventional", f"format pact is not for recipe {self.recipe}"),
            (target and not self.unlabelled, "headroom target needs folders in quant.unlabelled"),
            (bool(self.unlabelled) and not (distil or target), "unlabelled images are used by loss distill and headroom target only"),
        ]


class VerifyConfig(Section):
    """The check that the integers are the same everywhere."""

    samples: int = Field(256, ge=1, description="test images compared layer by layer between training graph and interpreter")
    golden: int = Field(64, ge=1, description="images stored in the artifact with their expected integers")


class Config(Section):
    """Everything a run depends on."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    probe: ProbeConfig = ProbeConfig()
    train: TrainConfig = TrainConfig()
    quant: QuantConfig = QuantConfig()
    verify: VerifyConfig = VerifyConfig()
    seed: int = Field(0, ge=0, description="seed of splits, order, augmentation and heads")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda)$", description="auto, cpu or cuda")
    out: Path | None = Field(None, description="run directory; default: runs/<data>-<method>-<seed>")

    @model_validator(mode="after")
    def _bundled_backbone_takes_no_weights(self) -> Self:
        if self.model.pretrained and self.model.weights is not None:
            raise ValueError("give either model.pretrained or model.weights, not both")
        return self

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return self.out
        return Path("runs") / f"{Path(self.data.source).name or 'data'}-{self.train.method}-{self.seed}"


def parse_assignment(text: str) -> tuple[list[str], Any]:
    """'section.key=value' to key path and value; the value is TOML where it parses as TOML, otherwise a string."""
    key, equals, raw = text.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"--set '{text}' is not of the form section.key=value", "example: --set quant.format=grid")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = tuple(raw.split(",")) if "," in raw else raw
    return path, value


def assign(tree: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key in place. Raises ConfigError when a part of the path is a plain value."""
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"'{part}' in '{'.'.join(path)}' is a value, not a section")
    tree[path[-1]] = value


def read_toml(path: Path) -> dict[str, Any]:
    """A configuration file. Raises ConfigError when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file '{path}'", str(error)) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"'{path}' is not valid TOML: {error}") from error


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in location[:-1]:
        model = model.model_fields[str(part)].annotation if str(part) in getattr(model, "model_fields", {}) else None
    return list(getattr(model, "model_fields", {}))


def _elsewhere(name: str) -> list[str]:
    """Keys of that name in all sections."""
    return [f"{section}.{name}" for section in Config.model_fields if name in _known_keys((section, name))]


def _explain(error: ValidationError, source: str) -> ConfigError:
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "configuration"
        if item["type"] == "extra_forbidden":
            close = nearest(str(item["loc"][-1]), _known_keys(item["loc"]), n=1) or _elsewhere(str(item["loc"][-1]))
            lines.append(f"unknown key '{key}'" + (f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""))
        else:
            found = "" if isinstance(item["input"], dict) else f" (found {item['input']!r})"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{found}")
    return ConfigError(f"{len(lines)} error{'s' if len(lines) > 1 else ''} in the configuration{source}:\n  " + "\n  ".join(lines))


def build_config(file: Path | None = None, flags: dict[str, Any] | None = None, sets: list[str] | None = None) -> Config:
    """Resolve a configuration: defaults < `file` (TOML) < `flags` (dotted keys, None is "not given") < `sets`.

    Raises ConfigError that lists every wrong key and value at once.
    """
    tree = read_toml(file) if file is not None else {}
    for key, value in (flags or {}).items():
        if value is not None:
            assign(tree, key.split("."), value)
    for text in sets or []:
        assign(tree, *parse_assignment(text))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, f" ('{file}', flags, --set)" if file is not None else "") from error


def to_toml(config: Config) -> str:
    """The configuration as text that `--config` reads back. Keys without a value, which TOML cannot say, are comments."""
    lines: list[str] = []
    sections: dict[str, dict[str, Any]] = {"": {}}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            sections[key] = value
        else:
            sections[""][key] = value
    for section, values in sections.items():
        lines += [f"\n[{section}]"] if section else []
        lines += [f"# {key} =" if value is None else f"{key} = {_toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    # JSON's scalars are TOML's, but for characters beyond U+FFFF, which JSON escapes in pairs when it escapes them.
    return json.dumps(value, ensure_ascii=False)
