"""LoRA adapters: several models on shared base weights, one of them active at a time.

transformers adds, loads and saves adapters (`add_adapter`, `load_adapter`, `save_pretrained`), and
peft computes with them. This module activates them and returns the parameters of each.
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

from rlgf.config.sections import LoraConfig
from rlgf.errors import ConfigError
from rlgf.models.configs import text_config


def has_adapters(model: Any) -> bool:
    """Return whether a model carries adapters."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def adapter_names(model: Any) -> list[str]:
    """Return the names of a model's adapters."""
    return list(model.peft_config) if has_adapters(model) else []


def unique_name(model: Any, name: str) -> str:
    """Return `name` for a new adapter, with a number appended if it is taken."""
    taken, number = adapter_names(model), 1
    while name in taken:
        number += 1
        name = f"{name.removesuffix(f'_{number - 1}')}_{number}"
    return name


def is_adapter_folder(path: str) -> bool:
    """Return whether a folder holds an adapter instead of a whole model."""
    return (Path(path).expanduser() / "adapter_config.json").is_file()


def base_of(path: str) -> str:
    """Return the base model of the adapter in a folder."""
    require_peft()
    from peft import PeftConfig

    folder = Path(path).expanduser()
    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base:
        raise ConfigError(f"{path}/adapter_config.json names no base model: set its base_model_name_or_path.")
    # if the run was moved, its stages may have been moved with it
    if Path(base).is_absolute() and not Path(base).exists():
        near = (place / Path(base).name for parent in folder.resolve().parents[:4] for place in (parent, parent / "stages"))
        return str(next((place for place in near if place.is_dir()), base))
    return str(base)


def is_pure_lora(path: str) -> bool:
    """Return whether the adapter in a folder has LoRA layers and nothing else.

    Others have, for example, a head or embeddings of their own.
    """
    file = Path(path).expanduser() / "adapter_model.safetensors"
    if not file.is_file():
        return False
    with safe_open(file, "pt") as kept:
        return all(".lora_" in key for key in kept.keys())  # noqa: SIM118  # not a mapping


def has_same_base(path: str, model: Any) -> bool:
    """Return whether a path is a loaded model's base weights, or an adapter on them."""
    base, mine = base_of(path) if is_adapter_folder(path) else path, str(model.config.name_or_path)
    return bool(mine) and Path(base).expanduser().resolve() == Path(mine).expanduser().resolve()


def is_sequence_classifier(path: str) -> bool:
    """Return whether an adapter folder belongs to a classifier or reward model.

    Such a folder holds the head, too.
    """
    require_peft()
    from peft import PeftConfig

    return str(PeftConfig.from_pretrained(str(Path(path).expanduser())).task_type).endswith("SEQ_CLS")


def require_peft() -> None:
    """Raise if peft is not installed."""
    try:
        import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ConfigError("adapters need the extra 'lora': pip install 'rlgf[lora]'.") from None


def add(model: Any, name: str, config: LoraConfig, seed: int) -> None:
    """Add a new adapter to a model.

    One of its two matrices is zero, so it changes nothing at first; the other is random, determined
    by the seed.
    """
    require_peft()
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout,  # pyright: ignore[reportArgumentType]
        target_modules=list(config.target_modules) or "all-linear",
        exclude_modules=None if config.target_modules else _unadaptable(model) or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), _allow_multiple_adapters():
        torch.manual_seed(seed)
        try:
            model.add_adapter(lora, name)
        except ValueError as error:
            raise ConfigError(
                f"lora.target_modules are {list(config.target_modules)}, which peft rejects ({error}): choose others."
            ) from None
    if tied := tied_layers(model):
        raise ConfigError(
            f"lora.target_modules names {tied[0].split('.')[-1]}, whose weights this model uses in another layer too, "
            "where the adapter would not work: choose layers with weights of their own."
        )
    _freeze_all(model)


# the layer of state-space models whose weights their kernels take as they are; peft refuses it
STATE_SPACE_OUTPUT = "out_proj"
STATE_SPACE_MODELS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def _unadaptable(model: Any) -> list[str]:
    """Return the last names of linear layers that cannot have an adapter.

    These are routers, which return more than a product, and what peft refuses.
    """
    found = {STATE_SPACE_OUTPUT} if getattr(model.config, "model_type", None) in STATE_SPACE_MODELS else set[str]()
    for name, module in model.named_modules():
        if type(module) is not nn.Linear and isinstance(module, nn.Linear) and not _is_product(module):
            found.add(name.split(".")[-1])
    return sorted(found)


def _is_product(layer: nn.Linear) -> bool:
    """Return whether a layer of a model's own class gives what `nn.Linear` does.

    One in 4 bits or of another library is that library's: peft knows it.
    """
    if not type(layer).__module__.startswith("transformers.models."):
        return True
    states = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device).view(2, -1).to(layer.weight.dtype)
    with torch.no_grad():
        expected = nn.functional.linear(states, layer.weight, layer.bias)
        try:
            found = layer(states)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it takes other inputs
            return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


def tied_layers(model: Any) -> list[str]:
    """Return the names of adapted layers whose weights belong to another layer too."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(users[id(parameter)] > 1 for parameter in module.get_base_layer().parameters(recurse=False))
    ]


@contextmanager
def _allow_multiple_adapters() -> Generator[None]:
    """Suppress peft's warning about several adapters in one model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings=True")  # `add` refuses tied weights
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True but")  # GPT-2 has layers of both kinds
        yield


def clone(model: Any, source: str, name: str) -> None:
    """Add a new adapter to a model as a copy of another of its adapters."""
    _add_with(model, name, copy.deepcopy(model.peft_config[source]), trainable_state(model, source))


def _add_with(model: Any, name: str, settings: Any, values: Mapping[str, Tensor]) -> None:
    settings.inference_mode = False
    with _allow_multiple_adapters():
        model.add_adapter(settings, name)
    load_trainable_state(model, name, values)
    _freeze_all(model)


def load(model: Any, folder: str, name: str) -> None:
    """Add the adapter in a folder to a model."""
    require_peft()
    with _allow_multiple_adapters():
        model.load_adapter(str(Path(folder).expanduser()), adapter_name=name)
    _freeze_all(model)


def _freeze_all(model: Any) -> None:
    """Freeze all parameters and turn off dropout; peft adds modules in training mode."""
    _forget_layers(model)
    model.requires_grad_(False).eval()


def load_layers(model: Any, folder: Path, name: str) -> dict[str, Tensor]:
    """Add an adapter of another head on the same base weights to a model.

    Returns the other tensors of its folder, by name: that head.
    """
    require_peft()
    from peft import PeftConfig

    settings: Any = PeftConfig.from_pretrained(str(folder))
    settings.modules_to_save, settings.task_type = None, None
    found = {key.removeprefix("base_model.model."): v for key, v in load_file(folder / "adapter_model.safetensors").items()}
    _add_with(model, name, settings, {key: value for key, value in found.items() if ".lora_" in key})
    return {key: value for key, value in found.items() if ".lora_" not in key}


def save(model: Any, name: str, folder: Path) -> None:
    """Write one adapter for peft and transformers; the base model is named, not copied."""
    settings, base = model.peft_config[name], Path(str(model.config._name_or_path)).expanduser()
    settings.base_model_name_or_path = str(base.resolve()) if base.exists() else str(model.config._name_or_path)
    # peft's AutoPeftModelForCausalLM and the like choose the model class by it
    settings.task_type = settings.task_type or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")
    model.set_adapter(name)
    model.save_pretrained(folder)
    model.requires_grad_(False)


@contextmanager
def quiet_peft() -> Generator[None]:
    """Suppress the warning about an attribute that transformers renamed.

    peft accesses it when it wraps a model in its own.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings=True")  # `merged` unties them
        yield


def merged(model: Any, folder: str) -> Any:
    """Merge the adapter in a folder into a base model, in place; return it.

    An adapter on tied embeddings unties them. Raises ConfigError for weights in 4 bits, which
    cannot be merged into.
    """
    if getattr(model, "is_quantized", False):
        raise ConfigError("4-bit base weights cannot be merged into: load them unquantized (lora.load_in_4bit=false).")
    require_peft()
    from peft import PeftModel

    with quiet_peft():
        whole: Any = PeftModel.from_pretrained(model, str(Path(folder).expanduser()))
    if tied := tied_layers(model):
        _untie(model, tied)
    return whole.merge_and_unload()


def _untie(model: Any, names: list[str]) -> None:
    """Untie adapted layers: copy their weights, so that the other layer stays unchanged."""
    if model.config.is_encoder_decoder:  # T5 scales the states before a tied head
        raise ConfigError(
            f"the adapter changes {names[0].split('.')[-1]}, whose weights an encoder–decoder uses in several layers: it "
            "cannot be merged."
        )
    for config in (model.config, text_config(model.config)):
        config.tie_word_embeddings = False
    for name in names:
        layer = model.get_submodule(name).get_base_layer()
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def trainable_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """Return the parameters of one adapter."""
    return [value for _, value in _named(model, name)]


def trainable_state(model: Any, name: str) -> dict[str, Tensor]:
    """Return the values of one adapter, by keys without the adapter's name."""
    return {key: value.detach() for key, value in _named(model, name)}


def load_trainable_state(model: Any, name: str, values: Mapping[str, Tensor]) -> None:
    """Set an adapter's values to those of a checkpoint or of another adapter."""
    mine = dict(_named(model, name))
    if set(mine) != set(values):
        raise ConfigError(
            f"the adapter '{name}' has other parameters than those that are loaded into it: use the same settings."
        )
    with torch.no_grad():
        for key, value in values.items():
            mine[key].copy_(value)


def _named(model: Any, name: str) -> list[tuple[str, nn.Parameter]]:
    inside = f".{name}."
    found = [(key.replace(inside, "."), value) for key, value in model.named_parameters() if inside in f"{key}."]
    return [(key, value) for key, value in found if ".lora_" in key]


def _layers(model: Any) -> list[Any]:
    """Return the modules of a model that adapters change, looked up once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "_rlgf_adapted"):
        model._rlgf_adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return model._rlgf_adapted


def adapted_names(model: Any) -> list[str]:
    """Return the last names of the layers that adapters change, each once, sorted."""
    adapted = {id(layer) for layer in _layers(model)}
    names = {name.split(".")[-1] for name, module in model.named_modules() if id(module) in adapted}
    return sorted(names - {"base_layer"})  # peft adapts several weights of a mixture's experts, one inside another


def _forget_layers(model: Any) -> None:
    if hasattr(model, "_rlgf_adapted"):
        del model._rlgf_adapted


@contextmanager
def activate(model: Any, name: str | None, owner: Any = None) -> Generator[None]:
    """Activate one adapter of a model within the block; None: no adapter.

    The adapters that were active before are active again after it. A model without adapters stays
    as it is. `owner` carries the adapters if `model` is a part of it
    (a backbone without its head).
    """
    carrier = owner if owner is not None else model
    if not has_adapters(carrier):
        yield
        return
    before = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _layers(carrier)]
    for layer, _, disabled in before:
        if name is None:
            layer.enable_adapters(False)
            continue
        if disabled:
            layer.enable_adapters(True)
        layer.set_adapter([name], inference_mode=not torch.is_grad_enabled())
    try:
        yield
    finally:
        # not by set_adapter, which would change requires_grad before the backward pass
        for layer, active, disabled in before:
            layer._active_adapter, layer._disable_adapters = active, disabled
