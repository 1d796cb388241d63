"""LoRA adapters: several models on one set of base weights, of which one reads at a time.

transformers puts adapters into a model, saves and loads them (`add_adapter`, `load_adapter`, `save_pretrained`), peft computes
with them; here is which one is on, and whose parameters are whose.
"""

import copy
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlgf.config import AdapterConfig
from rlgf.errors import UserError


def has_adapters(model: Any) -> bool:
    """Whether a model carries adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def names(model: Any) -> list[str]:
    """The adapters of a model."""
    return list(model.peft_config) if has_adapters(model) else []


def free_name(model: Any, name: str) -> str:
    """This name for one more adapter of a model, with a number behind it where it is taken."""
    taken, number = names(model), 1
    while name in taken:
        number += 1
        name = f"{name.removesuffix(f'_{number - 1}')}_{number}"
    return name


def is_adapter_folder(path: str) -> bool:
    """Whether a folder holds an adapter instead of a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def base_of(path: str) -> str:
    """The base model that an adapter in a folder belongs to."""
    need()
    from peft import PeftConfig

    folder = Path(path).expanduser()
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise UserError(f"{path}/adapter_config.json names no base model: set its base_model_name_or_path.")
    if Path(base).is_absolute() and not Path(base).exists():  # a run was moved: its stages may have been, too
        near = (place / Path(base).name for parent in folder.resolve().parents[:4] for place in (parent, parent / "stages"))
        return str(next((place for place in near if place.is_dir()), base))
    return str(base)


def has_layers_alone(path: str) -> bool:
    """Whether the adapter in a folder is LoRA layers and nothing else, such as a head or embeddings of its own."""
    file = Path(path).expanduser() / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, "pt") as kept:
        return all(".lora_" in key for key in kept.keys())  # noqa: SIM118  # it is no mapping


def rests_on(path: str, model: Any) -> bool:
    """Whether a folder or Hub name is the base weights of a loaded model, or an adapter on them."""
    base, mine = base_of(path) if is_adapter_folder(path) else path, str(model.config.name_or_path)
    return bool(mine) and Path(base).expanduser().resolve() == Path(mine).expanduser().resolve()


def classifies(path: str) -> bool:
    """Whether the adapter in a folder belongs to a classifier or reward model, whose head it holds too."""
    need()
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(str(Path(path).expanduser())).task_type).endswith("SEQ_CLS")


def need() -> None:
    """Raise where peft is not installed."""
    try:
        import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise UserError("adapters need the extra 'lora': pip install 'rlgf[lora]'.") from None


def add(model: Any, name: str, config: AdapterConfig, seed: int) -> None:
    """Put a new adapter into a model; it begins as no change at all, its other half drawn by the seed."""
    need()
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,  # pyright: ignore[reportArgumentType]
        target_modules=list(config.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _meaning_several():
        torch.manual_seed(seed)
        try:
            model.add_adapter(lora, name)
        except ValueError as error:
            raise UserError(f"adapter.targets are {list(config.targets)}, which peft refuses ({error}): name others.") from None
    _at_rest(model)


@contextmanager
def _meaning_several() -> Generator[None]:
    """Several adapters in one model are what is wanted: peft need not warn of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


def copy_of(model: Any, source: str, name: str) -> None:
    """Put a new adapter into a model that begins as a copy of another of its adapters."""
    _add_with(model, name, copy.deepcopy(model.peft_config[source]), weights(model, source))


def _add_with(model: Any, name: str, settings: Any, values: Mapping[str, Tensor]) -> None:
    settings.inference_mode = False
    with _meaning_several():
        model.add_adapter(settings, name)
    load_weights(model, name, values)
    _at_rest(model)


def load(model: Any, folder: str, name: str) -> None:
    """Put the adapter of a folder into a model."""
    need()
    with _meaning_several():
        model.load_adapter(str(Path(folder).expanduser()), adapter_name=name)
    _at_rest(model)


def _at_rest(model: Any) -> None:
    """Nothing trained and no dropout until somebody asks for it; peft makes new parts as for training."""
    _forget_layers(model)
    model.requires_grad_(False).eval()


def load_layers(model: Any, folder: Path, name: str) -> dict[str, Tensor]:
    """Put an adapter that belongs to another head on the same base weights into a model.

    Returns what else its folder holds, by name: that head.
    """
    need()
    from peft import PeftConfig

    settings: Any = PeftConfig.from_pretrained(str(folder))
    settings.modules_to_save, settings.task_type = None, None
    found = {key.removeprefix("base_model.model."): v for key, v in load_file(folder / "adapter_model.safetensors").items()}
    _add_with(model, name, settings, {key: value for key, value in found.items() if ".lora_" in key})
    return {key: value for key, value in found.items() if ".lora_" not in key}


def save(model: Any, name: str, folder: Path) -> None:
    """Write one adapter as peft and transformers read it; the base model is named in it, not copied."""
    settings, base = model.peft_config[name], Path(str(model.config._name_or_path)).expanduser()
    settings.base_model_name_or_path = str(base.resolve()) if base.exists() else str(model.config._name_or_path)
    # by which peft's AutoPeftModelForCausalLM and its sisters know what to load
    settings.task_type = settings.task_type or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")
    model.set_adapter(name)
    model.save_pretrained(folder)
    model.requires_grad_(False)


@contextmanager
def quiet_peft() -> Generator[None]:
    """Where peft puts a model of its own around one: it asks for what transformers calls by another name now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def merged(model: Any, folder: str) -> Any:
    """A base model with the adapter of a folder added to its weights, in place; weights in 4 bits cannot take it."""
    if getattr(model, "is_quantized", False):
        raise UserError("base weights in 4 bits cannot be merged into: load them whole (adapter.load_in_4bit=false).")
    need()
    from peft import PeftModel

    with quiet_peft():
        whole: Any = PeftModel.from_pretrained(model, str(Path(folder).expanduser()))
    return whole.merge_and_unload()


def parameters(model: Any, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter."""
    return [value for _, value in _named(model, name)]


def weights(model: Any, name: str) -> dict[str, Tensor]:
    """The values of one adapter, under names that do not hold its own."""
    return {key: value.detach() for key, value in _named(model, name)}


def load_weights(model: Any, name: str, values: Mapping[str, Tensor]) -> None:
    """Set the values of one adapter to those of another of its shape, or of a checkpoint."""
    mine = dict(_named(model, name))
    if set(mine) != set(values):
        raise UserError(f"the adapter '{name}' has other parts than those that are loaded into it: use the same settings.")
    with torch.no_grad():
        for key, value in values.items():
            mine[key].copy_(value)


def _named(model: Any, name: str) -> list[tuple[str, nn.Parameter]]:
    inside = f".{name}."
    found = [(key.replace(inside, "."), value) for key, value in model.named_parameters() if inside in f"{key}."]
    return [(key, value) for key, value in found if ".lora_" in key]


def _layers(model: Any) -> list[Any]:
    """The parts of a model that adapters change, looked up once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "_rlgf_adapted"):
        model._rlgf_adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return model._rlgf_adapted


def _forget_layers(model: Any) -> None:
    if hasattr(model, "_rlgf_adapted"):
        del model._rlgf_adapted


@contextmanager
def active(model: Any, name: str | None, owner: Any = None) -> Generator[None]:
    """Within it a model reads with this adapter, or, for None, with none; nothing happens where it carries no adapters.

    `owner` carries the adapters where `model` is a part of it (a trunk without its head).
    """
    carrier = owner if owner is not None else model
    if not has_adapters(carrier):
        yield
        return
    for layer in _layers(carrier):
        if name is None:
            layer.enable_adapters(False)
            continue
        if layer.disable_adapters:
            layer.enable_adapters(True)
        layer.set_adapter([name], inference_mode=not torch.is_grad_enabled())
    yield
